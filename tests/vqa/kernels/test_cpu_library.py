"""The library of the C++ kernels: by which compiler it is built, when again, and that it is never half there."""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from vqa.kernels import cpu


def test_an_empty_cxx_names_no_compiler(monkeypatch):
    def run(words, **_):
        raise OSError(words[0])

    monkeypatch.setenv("CXX", "")
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(OSError, match=r"^c\+\+$"):
        cpu._built()


def test_a_compiler_that_fails_without_a_word_is_a_warning(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "sh -c 'echo >&2; exit 1'")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="computed without the C\\+\\+ kernel, which is slower: .*exit status 1"):
        assert cpu._library.__wrapped__() is None


@pytest.fixture
def slow(monkeypatch, tmp_path):
    """A compiler that only takes time, and an empty cache."""
    slow = tmp_path / "compiler"
    slow.write_text('while [ "$1" != -o ]; do [ "$1" = -dM ] && exit; shift; done; sleep 0.2; echo begun > "$2"\n')
    monkeypatch.setenv("CXX", f"sh {slow}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return slow


def test_a_damaged_library_is_built_again(slow):  # noqa: ARG001
    file = cpu._built()
    whole = file.read_bytes()
    for damaged in (whole[:-1], b"", b"B" + whole[1:], whole + b"more"):
        file.write_bytes(damaged)
        assert cpu._built() == file
        assert file.read_bytes() == whole


def test_a_library_is_on_the_disk_before_it_has_its_name(slow, monkeypatch):  # noqa: ARG001
    done = []
    sync, name = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append("synced") or sync(file))
    monkeypatch.setattr(Path, "replace", lambda *names: done.append("named") or name(*names))
    cpu._built()
    assert done == ["synced", "named"]


def test_processes_that_compile_at_once_leave_one_complete_library(slow, monkeypatch):
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda _: cpu._built(), range(2))
    assert one == other
    assert list(one.parent.iterdir()) == [one]
    written = one.stat().st_mtime_ns
    assert cpu._built().stat().st_mtime_ns == written
    monkeypatch.setenv("CXX", f"sh {slow} -g")
    assert cpu._built() != one
