"""`python main.py …` as a process of its own, forked from one that has imported everything: importing takes seconds."""

import contextlib
import functools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

import vqa.backbone
from tests.conftest import ROOT, Command

MAIN = ROOT / "main.py"
CHILDREN = Path(f"/proc/self/task/{os.getpid()}/children")  # of this process; some kernels have no such file
PATIENCE = 300.0  # seconds until a process that does not end is an error


@functools.cache
def forking() -> ForkServerContext:
    """Starts the process that the others are forked from, and imports in it what takes long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.gpu.check"])
    with contextlib.chdir(ROOT):  # where it finds our modules
        forkserver.ensure_running()
    return context


class MainProcess:
    """A running command, with the methods of subprocess.Popen that the tests need.

    Args:
        words: the command and its arguments.
        folder: its working directory.
        environment: variables over those of this process.
        own_group: whether it leads a process group, which can be killed as a whole.
        log: file of its standard output and errors; by default each has one, which `end` reads.
        program: a file or a module to be run instead of main.py.
    """

    def __init__(
        self,
        *words: object,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        own_group: bool = False,
        log: Path | None = None,
        program: str = str(MAIN),
    ) -> None:
        self.kept = tempfile.TemporaryDirectory(prefix="main-")
        self.logs = [log or Path(self.kept.name, name) for name in ("out", "err")]
        variables = dict(os.environ) | dict(environment or {})
        resnet = vqa.backbone.ResNet  # of few channels, or as it is
        given = (program, list(map(str, words)), folder or Path.cwd(), variables, own_group, self.logs, resnet)
        self.process = forking().Process(target=_run, args=given)
        self.process.start()
        self.pid, self.kill, self.terminate = self.process.pid, self.process.kill, self.process.terminate

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, once it has ended."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise TimeoutError(f"it did not end within {timeout} s")
        return self.process.exitcode

    def end(self) -> Command:
        """How it ended, once it has."""
        code = self.wait()
        return Command(code, *(log.read_text(errors="replace") for log in self.logs))


def _run(
    program: str,
    words: list[str],
    folder: Path,
    variables: dict[str, str],
    own_group: bool,
    logs: Sequence[Path],
    resnet: type[nn.Module],
) -> None:
    if own_group:
        os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    vqa.backbone.ResNet = resnet
    torch.set_num_threads(int(variables.get("OMP_NUM_THREADS", "1")))
    for number, log in enumerate(logs, start=1):
        with log.open("a") as file:
            os.dup2(file.fileno(), number)
    sys.argv = [program, *words]
    run = runpy.run_path if program == str(MAIN) else runpy.run_module
    run(program, run_name="__main__")


def wait_until(it_is: Callable[[], object]) -> None:
    """Returns as soon as `it_is()`. Raises TimeoutError if that takes longer than `PATIENCE`."""
    deadline = time.monotonic() + PATIENCE
    while not it_is():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {PATIENCE} s in vain")
        time.sleep(0.005)


def printed_by(code: str) -> str:
    """What a Python process that is not forked prints, which has imported nothing yet."""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def start_ranks(*words: object, folder: Path | None = None) -> list[MainProcess]:
    """A command in two processes, each with what torchrun would tell it."""
    told = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return [
        MainProcess(*words, folder=folder, environment=told | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in (0, 1)
    ]


def free_port() -> int:
    """A port of this machine that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(function: Callable[..., None], *arguments: object) -> None:
    """Runs `function(rank, *arguments)` in two processes; raises what one of them raises."""
    forking()
    torch.multiprocessing.start_processes(function, arguments, nprocs=2, start_method="forkserver")


def fork_children(monkeypatch, module: str) -> None:
    """Lets a module start `python main.py …` and `python -m …` as such processes."""

    def start(command, stdout, env=None, **_):
        _, program, *words = command
        if program == "-m":
            program, *words = words
        return MainProcess(*words, program=program, environment=env, log=Path(stdout.name))

    stand_in = SimpleNamespace(Popen=start, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(f"{module}.subprocess", stand_in)


def fork_workers(monkeypatch) -> None:
    """Forks worker processes, too, and lets torch look at those of a loader ten times a second.

    They are spawned else, and import for seconds; and torch looks at them every five seconds.
    """
    forking()
    monkeypatch.setattr("vqa.io.processes._Worker._Popen", staticmethod(ForkServerProcess._Popen))
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)
    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__", (0.1,))
