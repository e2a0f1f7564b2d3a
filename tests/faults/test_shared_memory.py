"""Limits of what worker processes share: one line names the limit, and a signal ends any wait."""

import gc
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch

import data.loader
from data.batches import Planned
from data.loader import make_loader
from data.scenes.write import in_order
from experiments.training import trainer
from experiments.training.train import train
from tests.conftest import ROOT
from tests.processes import CHILDREN, wait_until
from vqa.io.processes import Interrupted
from vqa.settings.recipes import load_settings

pytestmark = pytest.mark.usefixtures("listening")

FULL = "/dev/shm: full; enlarge it (docker: --shm-size=1g), or use fewer worker processes (workers=0: none)"
READ_ONLY = "/dev/shm: cannot be written, but worker processes share memory there; mount it writable"
FILES = "too many open files: raise `ulimit -n`, or use fewer worker processes (workers=0: none)"
SMALL = "/dev/shm: batches of 1 workers need 0.4 MB, but it has 0.3 MB left; "
SHM = "mount -t tmpfs -o {} tmpfs /dev/shm"

# Imports once what takes long, then runs each command in a fork under its limit: a mount, or a number of files.
IN_TURN = """
import json, os, resource, subprocess, sys
sys.path.insert(0, sys.argv[1])
import experiments.training.train
import main
ends = []
for limit, words in json.loads(sys.argv[2]):
    process = os.fork()
    if process == 0:
        os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if limit.isdigit():
            resource.setrlimit(resource.RLIMIT_NOFILE, (int(limit), int(limit)))
        else:
            subprocess.run(limit.split(), check=True)
        sys.argv[1:] = words
        sys.exit(main.main())
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if not limit.isdigit():
        subprocess.run(["umount", "--lazy", "/dev/shm"], check=True)
    with open("err") as file:
        ends.append([code, file.read()])
print(json.dumps(ends))
"""


def run_in_namespace(*words, folder):
    """Runs a Python program in its own mount namespace."""
    namespace = ["unshare", "--mount", "--map-root-user"]
    possible = [*namespace, *SHM.format("size=1m").split()]
    if not shutil.which("unshare") or subprocess.run(possible, capture_output=True, check=False).returncode:
        pytest.skip("no mount namespace can be made here")
    command = [*namespace, sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)


def test_workers_that_cannot_share_end_in_one_line(trained_wide, tiny, tmp_path):
    evaluate = ["eval", "--run", trained_wide, "--out", tmp_path, "workers=1", "device=cpu"]
    train = ["train", "--config", tiny, "name=small", "workers=1", "data.cache_gib=0"]
    jobs = {
        FULL: (SHM.format("size=32k"), evaluate),
        READ_ONLY: (SHM.format("ro"), evaluate),
        FILES: ("40", evaluate),
        SMALL: (SHM.format("size=256k"), train),  # refused before the run begins
    }
    ended = run_in_namespace("-c", IN_TURN, ROOT, json.dumps([*jobs.values()], default=str), folder=tmp_path)
    assert ended.returncode == 0, ended.stderr
    for why, (code, said) in zip(jobs, json.loads(ended.stdout.splitlines()[-1]), strict=True):
        assert (code, said.count("\n")) == (2, 1), said
        assert said.startswith(f"error: {why}")
    assert said.endswith("enlarge it (docker: --shm-size=1g), or set fewer `workers` (0 needs none)\n")
    assert not (tmp_path / "runs" / "small").exists()


POOL = "import data.scenes.write as w; print(list(w.in_order(str, range(9), 2))) if __name__ == '__main__' else 0"


def test_a_pool_that_cannot_begin_is_an_input_error():
    mounting = f"import subprocess; subprocess.run({SHM.format('ro').split()}, check=True)\n"
    ended = run_in_namespace("-c", mounting + POOL, folder=ROOT)
    assert ended.stderr.endswith(
        f"vqa.io.errors.InputError: {READ_ONLY}, or use fewer worker processes (data.processes=1: none)\n"
    )


class Stopping(Planned):
    """Its worker returns one batch and is then stopped, as by a debugger or a frozen container."""

    asked = itertools.count()

    def __init__(self, dataset, arrived):
        self.__dict__ = dataset.__dict__ | {"arrived": arrived}

    def __getitem__(self, item):
        if next(self.asked):
            wait_until(self.arrived.exists)
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().__getitem__(item)


def after_the_first_step(arrived, what):
    """The function that ends a step; after the first step it prints so and does `what` a little later, in a thread."""
    real = trainer.Trainer._stop_if_asked

    def function(self, save=False):
        if self.progress.step == 1:
            arrived.touch()
            threading.Timer(0.5, what).start()
        return real(self, save)

    return function


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.skipif(sys.platform != "linux", reason="stops a process")
def test_a_signal_ends_the_wait_for_a_batch_and_keeps_the_steps(tiny, here, monkeypatch, command):
    words, arrived = ["workers=1"], here / "arrived"
    with monkeypatch.context() as patched:
        patched.setattr(data.loader, "_SECONDS_OF_WAITING", 1)
        patched.setattr(trainer, "make_loader", lambda dataset, *rest: make_loader(Stopping(dataset, arrived), *rest))
        asking = after_the_first_step(arrived, lambda: os.kill(os.getpid(), signal.SIGTERM))
        patched.setattr(trainer.Trainer, "_stop_if_asked", asking)
        ended = command("train", "--config", tiny, "name=stopped", *words)
    assert ended.code == 143
    last = ended.err.splitlines()[-1]  # if this takes long, progress is printed before
    assert last == f"interrupted; to resume: train --config {tiny} name=stopped {' '.join(words)} --resume"
    progress = torch.load(here / "runs/stopped/checkpoints/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 1)


class Killed(Planned):
    """Its worker is killed, as by the kernel where memory is short, when it is asked for no rows."""

    def __init__(self, dataset, arrived):
        self.__dict__ = dataset.__dict__ | {"arrived": arrived}

    def __getitem__(self, item):
        if item[1] is None:
            wait_until(self.arrived.exists)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(item)


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.parametrize("steps", [1, 3], ids=["training", "validation"])
def test_a_killed_worker_costs_no_step(tiny, tmp_path, monkeypatch, steps):
    arrived, plan, asked = tmp_path / "arrived", trainer.Trainer._plan, trainer.Trainer._stop_if_asked

    def without_rows(self):
        yield from ((epoch, rows if number < steps else None) for number, (epoch, rows) in enumerate(plan(self)))

    def asked_after_the_last(self, save=False):
        if self.progress.step == steps:
            arrived.touch()
        return asked(self, save)

    monkeypatch.setattr(trainer.Trainer, "_plan", without_rows)
    monkeypatch.setattr(trainer.Trainer, "_stop_if_asked", asked_after_the_last)
    monkeypatch.setattr(trainer, "make_loader", lambda dataset, *rest: make_loader(Killed(dataset, arrived), *rest))
    settings = load_settings(tiny, ["name=mine", "workers=2", "train.checkpoint_every=0"])
    with pytest.raises(BrokenExecutor):
        train(settings, runs=tmp_path)
    progress = torch.load(tmp_path / "mine/checkpoints/last.pt", weights_only=True)["progress"]
    assert progress["step"] == steps


@pytest.mark.usefixtures("forked_workers")
def test_no_worker_outlives_an_error_that_is_kept_as_in_a_notebook(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer.Trainer, "_stop_if_asked", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError) as kept:
        train(load_settings(tiny, ["name=mine", "workers=2"]), runs=tmp_path)
    assert kept.tb is not None  # which keeps the frames
    assert not multiprocessing.active_children()


def stopped_children():
    """Workers of this process that are stopped."""
    stopped = []
    for child in CHILDREN.read_text().split():
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            stopped += [child] * (" T " in Path(f"/proc/{child}/stat").read_text())
    return stopped


@pytest.mark.skipif(not CHILDREN.exists(), reason="finds the workers in Linux's /proc")
def test_a_signal_ends_the_wait_for_a_pool():
    def interrupt():
        wait_until(stopped_children)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        list(in_order(signal.raise_signal, [signal.SIGSTOP] * 2, 2))
    thread.join()
    assert not stopped_children()


@pytest.mark.usefixtures("forked_workers")
def test_a_signal_while_the_workers_of_a_loader_start_waits_until_they_can_be_stopped(monkeypatch):
    dropped, begun, process = [], [], data.loader.WorkerContext.Process
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)

    def second_after_a_signal(*arguments, **named):
        if begun:
            os.kill(os.getpid(), signal.SIGTERM)
        begun.append(process(*arguments, **named))
        return begun[-1]

    monkeypatch.setattr(data.loader.WorkerContext, "Process", second_after_a_signal)
    loader = make_loader([1, 2], [0, 1], 2, torch.device("cpu"))
    with pytest.raises(Interrupted, match="SIGTERM"):
        list(data.loader.readable(loader))
    gc.collect()
    assert not dropped
