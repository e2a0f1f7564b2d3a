"""SIGTERM, Ctrl-C, a closed terminal, a cluster's SIGUSR2: work is saved, one line says how to resume, no torn file."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import h5py
import pytest
import torch

import data.preprocess
from data.h5_file import Store, partial_path
from experiments import runner
from experiments.tasks.vqa import VQATask
from experiments.training import loop
from experiments.training.train import train
from tests.calls import calling
from tests.conftest import ROOT
from tests.processes import CHILDREN, MainProcess, wait_until
from tests.runs import lines, same_weights
from vqa.io.processes import Interrupted, StopRequest, unmasked
from vqa.settings.recipes import load_settings

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR2: 140}


pytestmark = pytest.mark.usefixtures("listening")


def ask(number):
    """Send the signal as from outside, and wait for its handler."""
    os.kill(os.getpid(), number)
    time.sleep(0)


def test_a_signal_waits_for_the_end_of_what_holds_it_back():
    done = []
    with pytest.raises(Interrupted) as raised, StopRequest() as stop:
        ask(signal.SIGTERM)
        ask(signal.SIGTERM)  # from the group, and from the parent
        assert stop.made
        done.append(1)
    assert done
    assert raised.value.exit_code == 143
    with pytest.raises(Interrupted):  # after it, one is raised at once
        ask(signal.SIGTERM)


def test_a_second_ctrl_c_does_not_wait():
    done = []
    with pytest.raises(Interrupted), StopRequest():
        ask(signal.SIGINT)
        done.append(1)
        ask(signal.SIGINT)
        done.append(2)
    assert done == [1]
    with StopRequest() as stop:
        assert not stop.made  # it leaves nothing behind


def test_where_it_may_it_comes_through():
    done = []
    with pytest.raises(Interrupted), StopRequest() as stop:
        with pytest.raises(Interrupted), stop.suspended():
            ask(signal.SIGTERM)
            done.append(1)
        ask(signal.SIGTERM)
        done.append(2)
    assert done == [2]


def test_what_was_ignored_from_the_start_stays_so():
    code = "from signal import *; from vqa.io.processes import listen; listen(); print(*map(getsignal, (2, 15)))"
    begun = f"trap '' INT; exec {sys.executable} -c '{code}'"
    told = subprocess.run(["bash", "-c", begun], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert told.startswith("1 <function _interrupt")


TWO_EPOCHS = ["train.epochs=2", "answer.dropout=0.3"]


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The run of two epochs that nothing disturbs."""
    return train(load_settings(tiny, ["name=whole", *TWO_EPOCHS]), runs=tmp_path_factory.mktemp("whole")).path


@pytest.mark.parametrize(("number", "code"), SIGNALS.items())
def test_training_ends_after_the_step_with_a_checkpoint(tiny, whole, here, monkeypatch, done, command, number, code):
    words = TWO_EPOCHS
    stopping = calling(loop.nn.utils.clip_grad_norm_, 2, lambda: ask(number))
    with monkeypatch.context() as patched:
        patched.setattr(loop.nn.utils, "clip_grad_norm_", stopping)
        ended = command("train", "--config", tiny, "name=stopped", *words)
    assert ended.code == code
    assert ended.err == f"interrupted; to resume: train --config {tiny} name=stopped {' '.join(words)} --resume\n"
    progress = torch.load(here / "runs/stopped/checkpoints/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 2)
    done("train", "--config", tiny, "--resume", "name=stopped", *words)
    assert same_weights(whole, here / "runs/stopped")
    assert lines(whole) == lines(here / "runs/stopped")


def test_in_validation_the_epoch_is_kept(tiny, trained, here, monkeypatch, done, command):
    with monkeypatch.context() as patched:
        patched.setattr(VQATask, "score", calling(VQATask.score, 1, lambda: ask(signal.SIGTERM)))
        assert command("train", "--config", tiny, "name=stopped").code == 143
    progress = torch.load(here / "runs/stopped/checkpoints/last.pt", weights_only=True)["progress"]
    assert (progress["epoch"], progress["step"]) == (1, 3)  # all three steps
    with monkeypatch.context() as patched:
        patched.setattr(loop.nn.utils, "clip_grad_norm_", pytest.fail)  # not one more
        done("train", "--config", tiny, "--resume", "name=stopped")
    assert same_weights(trained, here / "runs/stopped")
    assert lines(trained) == lines(here / "runs/stopped")


def test_preprocessing_keeps_what_it_decoded(tiny, tmp_path, monkeypatch, done, command):
    h5 = tmp_path / "new.h5"

    def stopping(decoded, *_, **__):
        for number, image in enumerate(decoded):
            if number == 6:
                ask(signal.SIGINT)
            yield image

    with monkeypatch.context() as patched:
        patched.setattr(data.preprocess, "progress", stopping)
        ended = command("preprocess", "--config", tiny, f"data.h5={h5}")
    assert ended.code == 130
    assert ended.err == f"interrupted; to resume: preprocess --config {tiny} data.h5={h5}\n"
    with h5py.File(partial_path(h5)) as file:
        assert file["images/filled"][:].sum() == 6
    done("preprocess", "--config", tiny, f"data.h5={h5}")
    one, other = Store(h5), Store(tiny.parent / "world.h5")
    assert one.identity(one.splits) == other.identity(other.splits)


FIRST_WORKER = """
import time
from vqa.io.processes import WorkerContext
if __name__ == "__main__":
    worker = WorkerContext().Process(target=time.sleep, args=(600,), daemon=True)  # as those of a loader
    worker.start()
    print(worker.pid, flush=True)
    worker.join(1)
    print(worker.exitcode, flush=True)
"""


def test_a_worker_ignores_signals_from_its_start_and_is_killed_at_exit(tmp_path):
    (tmp_path / "first.py").write_text(FIRST_WORKER)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    begun = subprocess.Popen([sys.executable, tmp_path / "first.py"], stdout=subprocess.PIPE, env=environment)
    worker = int(begun.stdout.readline())
    for number in SIGNALS:
        os.kill(worker, number)
    assert begun.communicate(timeout=60)[0] == b"None\n"


def worker_of(parent):
    """The process id of a worker of `parent`, as soon as there is one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        time.sleep(0.005)
    pytest.fail("no worker was started")


@pytest.mark.skipif(not CHILDREN.exists(), reason="finds the workers in Linux's /proc")
def test_the_last_line_says_that_a_worker_was_killed_and_the_command_resumes(tiny, here, done):
    """As by the kernel where memory is short."""
    words = ["train", "--config", str(tiny), "workers=1", "train.epochs=1"]
    begun = MainProcess(*words, folder=here)
    os.kill(worker_of(begun.pid), signal.SIGKILL)
    ended = begun.end()
    assert ended.code == 2, ended.err
    last = ended.err.splitlines()[-1]
    assert last.startswith("error: a worker process was killed, probably because memory ran out")
    assert last.endswith(f"to resume: {shlex.join(words)} --resume")
    done(*words, "--resume", "workers=0")


def meets_a_lock():
    """A signal comes where `threading.Condition.wait` has just released the lock."""
    condition = threading.Condition()
    with condition:
        condition.release()
        ask(signal.SIGTERM)


@pytest.mark.parametrize("block", [unmasked, lambda: StopRequest().suspended()], ids=["unmasked", "suspended"])
def test_a_signal_that_meets_a_lock_is_the_signal(block):
    with pytest.raises(RuntimeError, match="un-acquired lock"):
        meets_a_lock()
    with pytest.raises(Interrupted, match="SIGTERM"), block():
        meets_a_lock()
    with pytest.raises(RuntimeError, match="another"), block():
        raise RuntimeError("another")


def test_a_command_whose_signal_meets_a_lock_says_how_to_begin_again(command, monkeypatch):
    monkeypatch.setattr("experiments.demo.run_demo", lambda *_, **__: meets_a_lock())
    ended = command("demo")
    assert ended.code == 143
    assert ended.err.splitlines()[-1].startswith("interrupted; to ")


POOL = """
import sys, time
from data.scenes.write import in_order
from vqa.io.processes import Interrupted, listen, unmasked
if __name__ == "__main__":
    listen()
    try:
        with unmasked():
            list(in_order(time.sleep, [60], 2))
    except Interrupted as signal:
        sys.exit(signal.exit_code)
"""


@pytest.mark.skipif(not CHILDREN.exists(), reason="finds the workers in Linux's /proc")
@pytest.mark.parametrize("number", [*SIGNALS, signal.SIGKILL])
def test_workers_leave_signals_to_their_parent_and_end_with_it(tmp_path, number):
    (tmp_path / "pool.py").write_text(POOL)
    begun = subprocess.Popen(
        [sys.executable, tmp_path / "pool.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        process_group=0,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker_of(begun.pid)
    if number == signal.SIGKILL:
        begun.kill()  # alone, as by the kernel where memory is short
    else:
        os.killpg(begun.pid, number)  # all, as by Ctrl-C
    _, said = begun.communicate(timeout=100)  # which is when the last of them has ended
    assert said == "" or number == signal.SIGKILL  # Python's own process for semaphores warns of that
    assert begun.returncode == (-number if number == signal.SIGKILL else 128 + number)


CHILD = """
import pathlib, signal, sys, time
def end(*_):
    time.sleep(0.2)
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1]).write_text("begun")
time.sleep(60)
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_suite_ends_its_runs_after_they_saved(suite, tmp_path, monkeypatch, number):
    told = tmp_path / "told"
    monkeypatch.setattr(runner, "command_of", lambda *_: [sys.executable, "-c", CHILD, str(told)])

    def outside():
        wait_until(lambda: told.exists() and told.read_text() == "begun")
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=outside)
    thread.start()
    with pytest.raises(Interrupted) as raised:
        runner.run_suite(suite, tmp_path / "runs")
    thread.join()
    assert raised.value.number == number
    assert told.read_text() == "saved"
    assert not list((tmp_path / "runs" / "experiments").glob("*.lock"))
