"""Files written whole: by several processes at once, and what killed ones left."""

import fcntl
import os
import socket
import stat
import subprocess

import pytest

from vqa.io.files import read_json, write_json, write_text, written_whole


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_processes_that_write_a_file_at_once_do_not_meet(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    with written_whole(file) as ours:
        ours.write_text("ours")
        with monkeypatch.context() as patched:
            patched.setattr(os, "getpid", os.getppid)  # as another process that is running
            write_text(file, "theirs")
        assert file.read_text() == "theirs"
    assert file.read_text() == "ours"
    assert names(tmp_path) == {"a.json"}


@pytest.mark.parametrize("left", ["file", "folder", "file of this process's number"])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path, left):
    with subprocess.Popen(["true"]) as ended:
        pass
    number = os.getpid() if left.endswith("number") else ended.pid
    us = f".a.json.{socket.gethostname()}"
    unfinished = tmp_path / f"{us}-{number}.unfinished"
    if left == "folder":
        unfinished.mkdir()
        unfinished /= "part"
    unfinished.write_text("part")
    others = {f"{us}-{os.getppid()}.unfinished", f"{us}.b-{ended.pid}.unfinished", ".a.json.unfinished.csv"}
    for name in others:
        (tmp_path / name).write_text("of another file, or of a process that is running")
    write_text(tmp_path / "a.json", "whole")
    assert names(tmp_path) == {"a.json", *others}


def test_what_a_process_of_another_host_writes_is_not_removed(tmp_path, monkeypatch):
    """On a disk that hosts share; here no process has its number, or it is this one's."""
    file = tmp_path / "a.json"
    with subprocess.Popen(["true"]) as ended:
        pass
    for number in (ended.pid, os.getpid()):
        with monkeypatch.context() as patched:
            patched.setattr(socket, "gethostname", lambda: "other")
            patched.setattr(os, "getpid", lambda: number)  # noqa: B023
            theirs = written_whole(file)
            theirs.__enter__().write_text("theirs")
        write_text(file, "ours")
        theirs.__exit__(None, None, None)
        assert file.read_text() == "theirs"
    assert names(tmp_path) == {"a.json"}


def test_files_are_synchronised_opened_for_writing_as_windows_demands(tmp_path, monkeypatch):
    opened = []

    def synchronise(file):
        is_folder = stat.S_ISDIR(os.fstat(file).st_mode)
        opened.append((is_folder, fcntl.fcntl(file, fcntl.F_GETFL) & os.O_ACCMODE))

    monkeypatch.setattr(os, "fsync", synchronise)
    write_text(tmp_path / "a.json", "whole")
    assert opened == [(False, os.O_RDWR), (True, os.O_RDONLY)]


def test_a_folder_that_is_not_finished_is_removed(tmp_path):
    with pytest.raises(RuntimeError), written_whole(tmp_path / "made") as aside:
        aside.mkdir()
        (aside / "part").write_text("part")
        raise RuntimeError
    assert not names(tmp_path)


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_followed_and_stays(tmp_path, there):
    (tmp_path / "disk").mkdir()
    file, link = tmp_path / "disk" / "a.json", tmp_path / "a.json"
    link.symlink_to(file)
    if there:
        file.write_text("older")
    write_text(link, "new")
    assert link.is_symlink()
    assert file.read_text() == "new"
    assert names(tmp_path) == {"disk", "a.json"}
    assert names(tmp_path / "disk") == {"a.json"}


def test_names_of_files_that_are_no_utf8_can_be_written(tmp_path):
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_json(tmp_path / "a.json", [name, "café"])
    assert read_json(tmp_path / "a.json") == [name, "café"]
    assert "café" in (tmp_path / "a.json").read_text("utf-8")
