"""Evaluation by several processes: the files and scores of one, and one line in all where one is refused."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT

FILES = ("metrics_val.json", "results_val.json")
MAIN = str(ROOT / "main.py")


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def read(folder):
    return [(folder / name).read_bytes() for name in FILES]


@pytest.mark.parametrize("batch", [4, 64], ids=["six batches", "one batch for two processes"])
def test_two_processes_evaluate_as_one(run, tmp_path, command, batch):
    words = [f"train.batch_size={batch}", "device=cpu", "workers=0"]
    one = command("eval", "--run", run, "--out", tmp_path / "one", *words)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run(
        [*torchrun, MAIN, "eval", "--model", str(run), "--out", str(tmp_path / "two"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert two.returncode == 0, two.stderr[-3000:]
    assert read(tmp_path / "two") == read(tmp_path / "one")
    assert two.stdout == one.out  # once
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(FILES)


def ends_of_two(*words):
    """How two processes end that torchrun would not stop: exit code and last line of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    begun = [
        subprocess.Popen(
            [sys.executable, MAIN, "eval", *map(str, words), "device=cpu", "workers=0"],
            env=os.environ | told | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    return [(process.communicate(timeout=300)[1].splitlines()[-1], process.returncode) for process in begun]


def test_an_image_that_one_process_cannot_read_ends_all(run, tiny, tmp_path):
    shutil.copytree(tiny.parent / "world", tmp_path / "world")
    last = max((tmp_path / "world" / "val").iterdir())
    last.write_bytes(b"no image")
    words = [f"data.folder={tmp_path}/world", "data.h5=nowhere.h5", "train.batch_size=4"]
    for line, code in ends_of_two("--model", run, "--out", tmp_path / "two", *words):
        assert code == 2
        assert line.startswith(f"error: 1 image(s) missing or unreadable, by id: {int(last.stem)}; mend them")
    assert not any((tmp_path / "two" / name).exists() for name in FILES)


def test_what_only_the_main_process_is_refused_ends_all(run, tmp_path):
    (tmp_path / "two" / "results_val.json").mkdir(parents=True)  # where a file is to be written
    for line, code in ends_of_two("--model", run, "--out", tmp_path / "two"):
        assert code == 2
        assert line.startswith(f"error: {tmp_path}/two/results_val.json")


@pytest.mark.parametrize("name", ["eval", "ask", "inspect", "features", "recalibrate"])
def test_model_is_another_name_of_run(name, tmp_path, refused):
    words = ["--image", "x.png", "--question", "what?"] if name in ("ask", "inspect") else []
    assert "no model here" in refused(name, "--model", tmp_path, *words)
