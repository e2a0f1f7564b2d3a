"""Evaluation by several processes: the files and scores of one, and one line in all where one is refused."""

import shutil
import subprocess
import sys

import pytest

from tests.processes import MAIN, start_ranks

FILES = ("metrics_val.json", "results_val.json")


def read(folder):
    return [(folder / name).read_bytes() for name in FILES]


def check_as_one(trained, tmp_path, command, start, batch):
    """Compares what `start` evaluates in two processes with what one process does."""
    words = [f"train.batch_size={batch}", "device=cpu", "workers=0"]
    one = command("eval", "--run", trained, "--out", tmp_path / "one", *words)
    printed = start("eval", "--model", trained, "--out", tmp_path / "two", *words)
    assert read(tmp_path / "two") == read(tmp_path / "one")
    assert printed == one.out  # once
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(FILES)


def test_torchrun_evaluates_as_one_process(trained_wide, tmp_path, command):
    def start(*words):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", MAIN]
        two = subprocess.run([*torchrun, *map(str, words)], capture_output=True, text=True, check=False)
        assert two.returncode == 0, two.stderr[-3000:]
        return two.stdout

    check_as_one(trained_wide, tmp_path, command, start, batch=4)


def test_one_batch_is_evaluated_by_two_processes(trained, tmp_path, command):
    def start(*words):
        ended = [rank.end() for rank in start_ranks(*words)]
        assert [end.code for end in ended] == [0, 0], ended
        return "".join(end.out for end in ended)

    check_as_one(trained, tmp_path, command, start, batch=64)


def ends_of_two(*words):
    """How two processes end that torchrun would not stop: exit code and last line of each."""
    ended = [rank.end() for rank in start_ranks("eval", *words, "device=cpu", "workers=0")]
    return [(end.err.splitlines()[-1], end.code) for end in ended]


def test_an_image_that_one_process_cannot_read_ends_all(trained, tiny, tmp_path):
    shutil.copytree(tiny.parent / "world", tmp_path / "world")
    last = max((tmp_path / "world" / "val").iterdir())
    last.write_bytes(b"no image")
    words = [f"data.folder={tmp_path}/world", "data.h5=nowhere.h5", "train.batch_size=4"]
    for line, code in ends_of_two("--model", trained, "--out", tmp_path / "two", *words):
        assert code == 2
        assert line.startswith(f"error: 1 image(s) missing or unreadable, by id: {int(last.stem)}; repair them")
    assert not any((tmp_path / "two" / name).exists() for name in FILES)


def test_what_only_the_main_process_is_refused_ends_all(trained, tmp_path):
    (tmp_path / "two" / "results_val.json").mkdir(parents=True)  # where a file is to be written
    for line, code in ends_of_two("--model", trained, "--out", tmp_path / "two"):
        assert code == 2
        assert line.startswith(f"error: {tmp_path}/two/results_val.json")


@pytest.mark.parametrize("name", ["eval", "ask", "inspect", "features", "recalibrate"])
def test_model_is_another_name_of_run(name, tmp_path, refused):
    words = ["--image", "x.png", "--question", "what?"] if name in ("ask", "inspect") else []
    assert "no model here" in refused(name, "--model", tmp_path, *words)
