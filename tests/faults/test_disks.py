"""Full and failing disks: one line that names the file, and when there is space again nothing is lost but a step."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

import data.preprocess
from data.h5_file import partial_path
from data.h5_rows import opened_for_filling
from experiments import pretrain, runner
from experiments.runner import run_suite
from experiments.tasks.vqa import VQATask
from experiments.training import stage_cache
from experiments.training.checkpoint import load_checkpoint
from experiments.training.stage_cache import cached_maps
from experiments.training.train import train
from tests.calls import calling, failing
from tests.photographs import photographs
from tests.processes import MainProcess
from tests.raw_files import make, many
from tests.runs import lines, same_weights
from vqa.io.errors import InputError
from vqa.io.files import write_text
from vqa.settings.recipes import load_settings

FULL = r"cannot be written \((no space left on device|file too large)\); free some space, then run the command again"


class MountedDisk:
    """A small disk in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.ballast = folder, folder / "ballast"

    def fill(self, space: int, length: int) -> None:  # noqa: ARG002
        """Leaves `space` bytes."""
        free = shutil.disk_usage(self.folder).free
        self.ballast.write_bytes(bytes(max(free - space, 0)))

    def make_space(self) -> None:
        """Takes that back."""
        self.ballast.unlink(missing_ok=True)


class LimitedDisk:
    """Where none can be mounted: a limit to the length of files, for this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, space: int, length: int) -> None:  # noqa: ARG002
        """Lets no file become longer than `length` bytes."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (length, self.before[1]))

    def make_space(self) -> None:
        """Takes that back."""
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.fixture
def mounted(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield MountedDisk(folder)
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(params=["mounted", "limited"])
def disk(request, tmp_path):
    if request.param == "mounted":
        yield request.getfixturevalue("mounted")
        return
    limited = LimitedDisk(tmp_path)
    yield limited
    limited.make_space()


def test_preprocessing_resumes_when_there_is_space(disk, tmp_path, monkeypatch):
    monkeypatch.setattr("data.preprocess._IMAGES_A_FLUSH", 32)
    (raw := tmp_path / "raw").mkdir()
    splits = many(raw, 40)
    path, whole = disk.folder / "data.h5", tmp_path / "whole.h5"
    make(splits, whole)
    disk.fill(space=10_000, length=10_000)
    with pytest.raises(InputError, match=rf"/data.h5.partial: ({FULL}|needs .* more)"):  # the tables do not fit
        make(splits, path)
    assert not list(disk.folder.glob("*data.h5*"))
    disk.make_space()

    with h5py.File(whole) as file:
        pixels = file["images/pixels"].id.get_offset()

    def fill():  # the first 32 images fit, all 40 do not
        disk.fill(space=110_000, length=pixels + 36 * 3 * 32**2)

    with monkeypatch.context() as patched:
        patched.setattr(data.preprocess, "opened_for_filling", calling(opened_for_filling, 1, fill))
        with pytest.raises(InputError, match=rf"/data.h5.partial: {FULL}"):
            make(splits, path)
    disk.make_space()
    with h5py.File(partial_path(path)) as file:
        assert np.flatnonzero(file["images/filled"][:]).tolist() == list(range(32))
    make(splits, path)
    with h5py.File(path) as one, h5py.File(whole) as other:
        assert np.array_equal(one["images/pixels"][:], other["images/pixels"][:])
        assert one.attrs["digest"] == other.attrs["digest"]


def test_stored_maps_resume_when_there_is_space(disk, monkeypatch):
    monkeypatch.setattr(stage_cache, "_BATCH", 4)
    monkeypatch.setattr(stage_cache, "_SECONDS_A_FLUSH", 0)
    path, encoded = disk.folder / "maps.h5", []

    def encode(rows):  # 32 KiB a map
        encoded.extend(rows)
        return np.array(rows, np.float32)[:, None, None, None] * np.ones((64, 64, 4), np.float32)

    def filling(rows):
        if rows == [12, 13, 14, 15]:
            disk.fill(space=70_000, length=13 * 2**15)
        return encode(rows)

    with pytest.raises(InputError, match=rf"/maps.h5.partial: {FULL}"):
        cached_maps(path, {"data": "a"}, 20, filling)
    disk.make_space()
    encoded.clear()
    stored = cached_maps(path, {"data": "a"}, 20, encode)
    assert encoded == list(range(12, 20))
    assert all((stored[row] == row).all() for row in range(20))


def test_training_resumes_when_there_is_space(disk, tiny, tmp_path, monkeypatch, done, command):
    words = ["train.epochs=3", "answer.dropout=0.3"]
    whole = train(load_settings(tiny, ["name=whole", *words]), runs=tmp_path).path
    monkeypatch.chdir(disk.folder)
    with monkeypatch.context() as patched:
        fill = partial(disk.fill, space=50_000, length=100_000)
        patched.setattr(VQATask, "score", calling(VQATask.score, 2, fill))
        ended = command("train", "--config", tiny, "name=full", *words)
    disk.make_space()
    assert ended.code == 2
    assert ended.err.startswith("error: runs/full/")
    assert ended.err.count("\n") == 1
    assert "free some space, then run the command again" in ended.err
    progress = load_checkpoint(Path("runs/full/checkpoints/last.pt"))["progress"]
    assert (progress["epoch"], progress["step"]) == (2, 0)
    assert not list(Path("runs").rglob("*.unfinished"))
    done("train", "--config", tiny, "--resume", "name=full", *words)
    assert same_weights(whole, Path("runs/full"))
    assert lines(whole) == lines(Path("runs/full"))


def test_pretraining_is_one_line_where_its_images_do_not_fit(disk, tmp_path, monkeypatch):
    """The room is taken before it is written to: the disk may become full meanwhile, or a quota have less than it."""
    file, photos = disk.folder / "b.safetensors", photographs(tmp_path / "photographs")

    # of 98 304 bytes
    monkeypatch.setattr(pretrain, "check_room", lambda *_: disk.fill(space=50_000, length=50_000))
    made = {"seed": 0, "image_size": 32, "epochs": 1, "device": "cpu"}
    with pytest.raises(InputError, match=rf"/b.safetensors: {FULL}"):
        pretrain.pretrain_on_images(file, "resnet10", photos, **made)


def test_a_full_disk_is_one_line_of_the_process(mounted, tiny):
    mounted.fill(space=0, length=0)
    ended = MainProcess("preprocess", "--config", tiny, f"data.h5={mounted.folder}/data.h5").end()
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert ended.err.startswith(f"error: {mounted.folder}/")


def test_a_suite_reports_runs_that_a_full_disk_stops_and_continues(suite, tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    child = "import sys; print('error: last.pt: cannot be written (no space left on device)'); sys.exit(2)"
    monkeypatch.setattr(runner, "command_of", lambda *_: [sys.executable, "-c", child])
    (runner.jobs_of(suite)[1].folder(runs) / "log.txt").mkdir(parents=True)  # no log can be begun
    assert run_suite(suite, runs).startswith("4 of 4 runs failed")
    told = capsys.readouterr().out
    assert told.count("error: last.pt: cannot be written (no space left on device)") == 3
    assert "/log.txt: cannot be written (is a directory)" in told


def test_a_read_only_disk_is_named(mounted, tiny, trained, refused, monkeypatch):
    monkeypatch.chdir(mounted.folder)
    subprocess.run(["mount", "-o", "remount,ro", mounted.folder], check=True)
    for words in (
        ["train", "--config", tiny, "name=new"],
        ["preprocess", "--config", tiny, "data.h5=new.h5"],
        ["eval", "--run", trained, "--out", "new"],
    ):
        assert "cannot be written (read-only file system)" in refused(*words)


def test_features_are_not_computed_where_they_cannot_be_written(mounted, trained, refused, monkeypatch):
    subprocess.run(["mount", "-o", "remount,ro", mounted.folder], check=True)
    monkeypatch.setattr("experiments.features.compare.stage_features", lambda _: pytest.fail("computed"))
    said = refused("features", "--run", trained, "--pairs", "20", "--out", mounted.folder / "new")
    assert "cannot be written (read-only file system)" in said


def test_stored_maps_on_a_read_only_disk_are_read_and_where_there_are_none_training_continues(
    mounted, tiny, here, done, command
):
    h5 = mounted.folder / "world.h5"
    shutil.copyfile(load_settings(tiny).data.h5, h5)
    words = ["train", "--config", tiny, f"data.h5={h5}", "train.validate_on=null"]
    done(*words, "name=makes", "cbn.stages=[4]")
    before = sorted(mounted.folder.iterdir())
    subprocess.run(["mount", "-o", "remount,ro", mounted.folder], check=True)
    ended = command(*words, "name=reads", "cbn.stages=[4]")
    assert (ended.code, ended.err) == (0, "")
    assert "stored feature maps" not in ended.out
    assert (here / "runs/reads/metrics.jsonl").read_text().splitlines()
    ended = done(*words, "name=without", "cbn.stages=[]", "train.epochs=2")
    assert (
        ended.out.count("cannot be written (read-only file system); training continues without stored feature maps\n")
        == 1
    )
    assert sorted(mounted.folder.iterdir()) == before


def test_maps_that_do_not_fit_are_done_without(tiny, here, monkeypatch, done):
    shutil.copyfile(load_settings(tiny).data.h5, here / "world.h5")
    monkeypatch.setattr("vqa.io.files.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    ended = done("train", "--config", tiny, "name=new", "data.h5=world.h5", "cbn.stages=[3, 4]")
    assert (
        "left; make room or set data.cache_gib=0 to do without; training continues without stored feature maps\n"
        in ended.out
    )


def test_tensorboard_that_cannot_be_written_is_said_once_and_done_without(tiny, here, done):
    (here / "runs/new").mkdir(parents=True)
    (here / "runs/new/tensorboard").write_text("in the way")
    ended = done("train", "--config", tiny, "name=new", "train.epochs=2", "train.tensorboard=true")
    assert (
        ended.out.count("tensorboard: cannot be written (file exists); training continues without TensorBoard\n") == 1
    )


def test_an_evaluation_of_a_read_only_run_names_out(mounted, trained, refused, tmp_path, done):
    run = mounted.folder / "run"
    shutil.copytree(trained, run)
    subprocess.run(["mount", "-o", "remount,ro", mounted.folder], check=True)
    said = refused("eval", "--run", run)
    assert said.endswith("cannot be written (read-only file system); --out can name another directory")
    done("eval", "--run", run, "--out", tmp_path / "out")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES, errno.EROFS])
def test_the_systems_reason_is_reported_and_the_file_before_is_kept(tmp_path, monkeypatch, number):
    file = tmp_path / "file.json"
    write_text(file, "before")

    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(InputError, match=rf"file.json: cannot be written \({os.strerror(number).lower()}\)"):
        write_text(file, "after")
    assert file.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
