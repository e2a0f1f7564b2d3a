"""Locks: the holder is named, no other process writes, and no lock outlives its process."""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from data.h5_file import partial_path
from experiments.runner import run_suite
from tests.calls import failing
from tests.conftest import ROOT
from vqa.io.errors import InputError
from vqa.io.locks import held

NO_LOCKS = "#include <errno.h>\nint flock(int file, int how) { errno = ENOLCK; return -1; }\n"
US = f"locked by process {os.getpid()} on {socket.gethostname()}"
HOLDER = """
import sys, time
from pathlib import Path
from vqa.io.locks import held
with held(Path(sys.argv[1]), "it", wait=True):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(lock, seconds) -> subprocess.Popen:
    arguments = [sys.executable, "-c", HOLDER, str(lock), str(seconds)]
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_the_holder_is_named(tmp_path):
    lock = tmp_path / "some" / ".lock"
    with held(lock, "it"):
        with pytest.raises(InputError, match=f"^it: {US}$"), held(lock, "it"):
            pytest.fail("held twice")
        assert lock.exists()  # who was refused does not remove it
    assert not lock.exists()
    with held(lock, "it"):
        assert lock.exists()


def test_it_vanishes_with_a_killed_process(tmp_path):
    other = holder(tmp_path / ".lock", 60)
    assert other.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"process {other.pid} on "), held(tmp_path / ".lock", "it"):
        pytest.fail("held twice")
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / ".lock").exists()
    with held(tmp_path / ".lock", "it"):
        assert f"process {os.getpid()} on " in (tmp_path / ".lock").read_text()


def test_who_waits_says_for_whom_and_gets_it(tmp_path, capsys):
    first = holder(tmp_path / ".lock", 1.5)  # a busy machine needs a while to come to the next lock
    assert first.stdout.readline() == "held\n"
    second = holder(tmp_path / ".lock", 0.5)
    begun = time.monotonic()
    with held(tmp_path / ".lock", "it", wait=True):
        assert first.wait() == 0
        assert time.monotonic() - begun > 0.2
    assert f"it: locked by process {first.pid} on {socket.gethostname()}; waiting\n" in capsys.readouterr().out
    assert second.wait() == 0


def test_a_second_training_of_a_run_is_refused(tiny, here, refused):
    with held(here / "runs/.mine.lock", "it"):
        for resume in ([], ["--resume"]):
            assert refused("train", "--config", tiny, *resume, "name=mine").startswith(f"error: runs/mine: {US}")
        (here / "runs/link").symlink_to("mine")
        assert refused("train", "--config", tiny, "name=link").startswith(f"error: runs/link: {US}")
    assert not (here / "runs/mine").exists()


def test_a_second_preprocessing_is_refused(tiny, tmp_path, refused):
    h5 = tmp_path / "new.h5"
    with held(tmp_path / ".new.h5.lock", "it"):
        assert refused("preprocess", "--config", tiny, f"data.h5={h5}").startswith(f"error: {h5}: {US}")
    assert not partial_path(h5).exists()


def test_a_second_evaluation_into_a_folder_is_refused(trained, tmp_path, refused, done):
    with held(tmp_path / ".val.lock", "it"):
        assert f"{tmp_path}, split 'val': {US}" in refused("eval", "--run", trained, "--out", tmp_path)
    assert not list(tmp_path.iterdir())
    done("eval", "--run", trained, "--out", tmp_path)


def test_a_second_run_of_a_suite_is_refused(suite, tmp_path):
    lock = tmp_path / "runs/experiments" / f".{suite.report_name}.lock"
    with held(lock, "it"), pytest.raises(InputError, match=f"suite {suite.report_name}: {US}"):
        run_suite(suite, tmp_path / "runs")


IN_TURN = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import main
codes = []
for words in json.loads(sys.argv[1]):
    sys.argv[1:] = words
    codes.append(main.main())
print(codes)
"""


def run_in_turn(commands, folder, first="", environment=None) -> subprocess.CompletedProcess:
    """Runs commands in one process, which imports what takes long once and at the end prints their exit codes."""
    arguments = [sys.executable, "-c", first + IN_TURN, ROOT, json.dumps(commands, default=str)]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_without_posix_one_line_says_so(tiny, trained_wide, image, tmp_path):
    commands = [
        ["preprocess", "--config", tiny],
        ["train", "--config", tiny],
        ["recalibrate", "--run", trained_wide],
        ["experiment", "suite.yaml"],
        ["ask", "--run", trained_wide, "--image", image, "--question", "what color is the circle?"],  # locks nothing
    ]
    ended = run_in_turn(commands, tmp_path, 'import sys; sys.modules["fcntl"] = sys.modules["resource"] = None')
    assert ended.stdout.splitlines()[-1] == "[2, 2, 2, 2, 0]", ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: this command needs a POSIX system") for line in lines)


def test_disks_without_locks_are_said_and_worked_on(tiny, tmp_path):
    """Where flock fails, for HDF5, too."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("no C compiler for a library that refuses locks")
    (tmp_path / "refuse.c").write_text(NO_LOCKS)
    library = tmp_path / "refuse.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "refuse.c"], check=True)
    h5 = tmp_path / "new.h5"
    stored = ["data.cache_gib=1", "cbn.stages=[4]", "train.epochs=1"]  # the first stages' maps are stored
    commands = [[name, "--config", tiny, f"data.h5={h5}"] for name in ("preprocess", "train")]
    commands[1] += stored
    ended = run_in_turn(commands, tmp_path, environment={"LD_PRELOAD": str(library)})
    assert ended.stdout.splitlines()[-1] == "[0, 0]", ended.stderr
    said = "this disk has no locks; make sure that no other process works on"
    assert f"{tmp_path}/.new.h5.lock: {said} {h5}\n" in ended.stdout
    assert list(tmp_path.glob("new_stage*.h5"))
    assert ended.stdout.count(said) == 3


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_the_errors_that_mean_no_locks(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr("fcntl.flock", failing(number))
    with held(tmp_path / ".lock", "it"):
        assert "this disk has no locks; make sure that no other process works on it" in capsys.readouterr().out


def test_an_error_of_locking_names_the_lock(tiny, tmp_path, monkeypatch, refused):
    monkeypatch.setattr("fcntl.flock", failing(errno.EIO))
    said = refused("preprocess", "--config", tiny, f"data.h5={tmp_path}/new.h5")
    assert said == f"error: {tmp_path}/.new.h5.lock: cannot be locked (input/output error)"
