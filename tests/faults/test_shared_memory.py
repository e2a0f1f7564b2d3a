"""Limits of what worker processes share: one line names the limit, and a signal ends any wait."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import data.loader
from data.batches import QuestionDataset
from data.loader import make_loader
from data.scenes.write import in_order
from experiments.training import trainer
from tests.conftest import ROOT
from vqa.io.processes import Interrupted

pytestmark = pytest.mark.usefixtures("listening")

FULL = "/dev/shm: full; enlarge it (docker: --shm-size=1g), or use fewer worker processes (workers=0: none)"
READ_ONLY = "/dev/shm: cannot be written, but worker processes share memory there; mount it writable"
LIMITS = {
    "full": ("mount -t tmpfs -o size=32k tmpfs /dev/shm", FULL),
    "read-only": ("mount -t tmpfs -o ro tmpfs /dev/shm", READ_ONLY),
    "files": (
        "ulimit -n 40",
        "too many open files: raise `ulimit -n`, or use fewer worker processes (workers=0: none)",
    ),
}


def run_under(limit, *words, **options):
    """Runs a Python program in its own mount namespace, after the shell's `limit`."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    possible = [*namespace, "mount", "-t", "tmpfs", "tmpfs", "/dev/shm"]
    if not shutil.which("unshare") or subprocess.run(possible, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    shell = ["sh", "-c", f'{limit} && exec "$@"', "sh", sys.executable]
    return subprocess.run(
        [*namespace, *shell, *map(str, words)], capture_output=True, text=True, timeout=300, check=False, **options
    )


@pytest.mark.parametrize("limit", LIMITS)
def test_workers_that_cannot_share_end_in_one_line(trained, tmp_path, limit):
    shell, why = LIMITS[limit]
    ended = run_under(shell, ROOT / "main.py", "eval", "--run", trained, "--out", tmp_path, "workers=1", "device=cpu")
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"error: {why}")


def test_batches_that_cannot_fit_are_refused_before_the_run_begins(tiny, tmp_path):
    words = [ROOT / "main.py", "train", "--config", tiny, "name=small", "workers=1", "data.cache_gib=0"]
    ended = run_under("mount -t tmpfs -o size=256k tmpfs /dev/shm", *words, cwd=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("error: /dev/shm: batches of 1 workers need 0.4 MB, but it has 0.3 MB left; ")
    assert ended.stderr.endswith("enlarge it (docker: --shm-size=1g), or set fewer `workers` (0 needs none)\n")
    assert not (tmp_path / "runs" / "small").exists()


POOL = "import data.scenes.write as w; print(list(w.in_order(str, range(9), 2))) if __name__ == '__main__' else 0"


def test_a_pool_that_cannot_begin_is_an_input_error():
    ended = run_under(LIMITS["read-only"][0], "-c", POOL, cwd=ROOT)
    assert ended.stderr.endswith(
        f"vqa.io.errors.InputError: {READ_ONLY}, or use fewer worker processes (data.processes=1: none)\n"
    )


class Stopping(QuestionDataset):
    """Its worker returns one batch and is then stopped, as by a debugger or a frozen container."""

    asked = itertools.count()

    def __init__(self, dataset, arrived):
        self.__dict__ = dataset.__dict__ | {"arrived": arrived}

    def __getitem__(self, rows):
        if next(self.asked):
            while not self.arrived.exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(rows)


def after_the_first_step(arrived, what):
    """The function that ends a step; after the first step it prints so and does `what` a little later, in a thread."""
    real = trainer.Trainer._stop_if_asked

    def function(self, save=False):
        if self.progress.step == 1:
            arrived.touch()
            threading.Timer(0.5, what).start()
        return real(self, save)

    return function


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
def test_a_signal_ends_the_wait_for_a_batch_and_keeps_the_steps(tiny, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    words, arrived = ["workers=1"], tmp_path / "arrived"
    with monkeypatch.context() as patched:
        patched.setattr(data.loader, "_SECONDS_OF_WAITING", 1)
        patched.setattr(trainer, "make_loader", lambda dataset, *rest: make_loader(Stopping(dataset, arrived), *rest))
        asking = after_the_first_step(arrived, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patched.setattr(trainer.Trainer, "_stop_if_asked", asking)
        ended = command("train", "--config", tiny, "name=stopped", *words)
    assert ended.code == 143
    last = ended.err.splitlines()[-1]  # if this takes long, progress is printed before
    assert last == f"interrupted; to resume: train --config {tiny} name=stopped {' '.join(words)} --resume"
    progress = torch.load(tmp_path / "runs/stopped/checkpoints/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)


def stopped_children():
    """Workers of this process that are stopped."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [child for child in children if " T " in Path(f"/proc/{child}/stat").read_text()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in Linux's /proc")
def test_a_signal_ends_the_wait_for_a_pool():
    def interrupt():
        while not stopped_children():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        list(in_order(signal.raise_signal, [signal.SIGSTOP] * 2, 2))
    thread.join()
    assert not stopped_children()
