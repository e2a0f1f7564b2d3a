"""Signals that ask this process to stop, and worker processes: they ignore signals and exit with their parent."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any, ClassVar, NoReturn, Self

from vqa.io.errors import InputError

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # SLURM sends the last two where `sbatch --signal` asks for them
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has the first two
SHARED_MEMORY = "/dev/shm"  # where Linux keeps shared memory and semaphores
_TELLS_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS
_LEFT_TO_PARENT = [number for number in SIGNALS if _TELLS_SENDER or number != signal.SIGTERM]


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 for SIGINT, 143 for SIGTERM, 140 for SIGUSR2."""
        return 128 + self.number


class StopRequest:
    """The signal that asked this process to end within the object's `with` block; it is raised when the block ends.

    A second Ctrl-C is raised at once. A second one of the other signals is not: a process may get it from its group and
    from its parent.
    """

    receiver: "ClassVar[StopRequest | None]" = None  # of signals; None raises them at once

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> Self:
        StopRequest.receiver = self
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        StopRequest.receiver = None
        if error is None and self.made:
            self.obey()

    @property
    def made(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def obey(self) -> NoReturn:
        """Raises the signal that came; SIGTERM, if it came to another process of this run."""
        raise Interrupted(self.number or signal.SIGTERM)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within this block, inside of the object's own, a signal is raised at once.

        Raises:
            Interrupted: anywhere in the block.
        """
        StopRequest.receiver = None
        try:
            if self.made:
                self.obey()
            yield
        finally:
            StopRequest.receiver = self


def listen() -> None:
    """Raises Interrupted, or tells a StopRequest, when a signal comes; one that was ignored from the start still is."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # by nohup
            signal.signal(number, _handle)


def _handle(number: int, _frame: FrameType | None) -> None:
    request = StopRequest.receiver
    if request is None or (request.made and number == signal.SIGINT):
        raise Interrupted(number)
    request.number = request.number or number


@contextmanager
def calling(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Calls a function every so many seconds within the block, in the main thread; its exception ends a wait there."""
    before = signal.signal(signal.SIGALRM, lambda *_: function())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def block_signals_in_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that are started in this block do not hear these signals; here they only wait until its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(SpawnProcess):
    def start(self) -> None:
        with block_signals_in_children(*_LEFT_TO_PARENT):
            super().start()

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()

    def terminate(self) -> None:
        self.kill()  # a stopped or blocked process does not handle SIGTERM, and would be waited for


class WorkerContext(SpawnContext):
    """For a pool or a loader: spawned processes, since forked ones would inherit locks of threads and open files."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Worker] = []
        # a process as well, which locks and workers would start, and which, when it is started, ends the deafness
        with block_signals_in_children(*_LEFT_TO_PARENT):
            resource_tracker.ensure_running()

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # noqa: N802  (the name that contexts have)
        """A process that is yet to be started."""
        self._started.append(_Worker(*arguments, **named))
        return self._started[-1]

    def kill(self) -> None:
        """Ends the processes at once that are still there."""
        for worker in self._started:
            if worker.is_alive():
                worker.kill()

    def any_was_killed(self) -> bool:
        """Whether a signal ended one of the processes."""
        return any((worker.exitcode or 0) < 0 for worker in self._started)


def require_files(count: int) -> None:
    """Raises OSError unless this process can open so many more files."""
    with ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))


@contextmanager
def naming_worker_limits(setting: str) -> Iterator[None]:
    """Names the limit of the system that keeps worker processes from starting or from sharing memory in the block.

    `setting` is the `key=value` that does without such processes.

    Raises:
        InputError: there is no room in /dev/shm or it is not writable, or too many files or processes are open.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch raises the latter, with the system's words
        if (limit := _limit_behind(error)) is None:
            raise
        raise InputError(f"{limit}, or use fewer worker processes ({setting}: none)") from None


def _limit_behind(error: OSError | RuntimeError) -> str | None:
    def is_any(*numbers: int) -> bool:
        return any(os.strerror(number) in str(error) for number in numbers)

    if is_any(errno.EMFILE, errno.ENFILE):
        return "too many open files: raise `ulimit -n`"
    if is_any(errno.EAGAIN, errno.ENOMEM):
        return "too many processes, or too little memory: raise `ulimit -u` or the memory limit"
    if sys.platform != "linux":
        return None
    if is_any(errno.ENOSPC):
        return f"{SHARED_MEMORY}: full; enlarge it (docker: --shm-size=1g)"
    if not os.access(SHARED_MEMORY, os.W_OK):
        return f"{SHARED_MEMORY}: cannot be written, but worker processes share memory there; mount it writable"
    return None


def _end_with_parent() -> None:
    """A parent that was killed leaves workers that wait for work for ever; one that lives may end them itself."""
    parent = parent_process()
    while parent.is_alive():
        if not _TELLS_SENDER:
            parent.join()
        elif (heard := signal.sigtimedwait([signal.SIGTERM], 1)) and heard.si_pid == os.getppid():
            break
    os._exit(0)  # torch reports any other code of a loader's worker, also when it is told to end
