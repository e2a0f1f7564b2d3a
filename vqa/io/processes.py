"""Signals that ask this process to stop, and worker processes: they ignore signals and exit with their parent."""

import atexit
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import active_children, parent_process, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess
from types import FrameType
from typing import Any, NoReturn, Self

from vqa.io.errors import InputError

# A terminal that is closed sends SIGHUP, and SLURM the last two where `sbatch --signal` asks for them.
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has the first two
_Handler = Callable[[int, FrameType | None], None]
SHARED_MEMORY = "/dev/shm"  # where Linux keeps shared memory and semaphores


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """The shells' code: 130 for SIGINT, 143 for SIGTERM, 140 for SIGUSR2."""
        return 128 + self.number


def listen() -> None:
    """Raise Interrupted when a signal comes, from now on; signals that are ignored (by nohup) stay so."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _interrupt)


def _interrupt(number: int, _frame: FrameType | None) -> NoReturn:
    raise Interrupted(number)


@contextmanager
def unmasked() -> Iterator[None]:
    """Raise Interrupted where a lock's error has replaced it.

    A signal that comes while a wait for a queue or a pool has released its lock makes the next release a RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        before = error.__context__
        while before is not None:
            if isinstance(before, Interrupted):
                raise before from None
            before = before.__context__
        raise


def _replace_handler(old: _Handler, new: _Handler) -> None:
    for number in SIGNALS:
        if signal.getsignal(number) == old:
            signal.signal(number, new)


class StopRequest:
    """Defers the signals that `listen` listens to until the end of the object's `with` block.

    A second Ctrl-C is raised at once. Second ones of the other signals are not: a process may receive one from its
    group and one from its parent.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __enter__(self) -> Self:
        _replace_handler(_interrupt, self._note)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        _replace_handler(self._note, _interrupt)
        if error is None and self.made:
            self.obey()

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.made and number == signal.SIGINT:
            raise Interrupted(number)
        self.number = self.number or number

    @property
    def made(self) -> bool:
        """Whether a signal came."""
        return self.number is not None

    def obey(self) -> NoReturn:
        """Raise Interrupted with the signal that came; SIGTERM, if it came to another process of this run."""
        raise Interrupted(self.number or signal.SIGTERM)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Raise Interrupted at once within this block, inside of the object's own."""
        _replace_handler(self._note, _interrupt)
        try:
            if self.made:
                self.obey()
            with unmasked():
                yield
        finally:
            _replace_handler(_interrupt, self._note)


@contextmanager
def calling(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function periodically in the main thread; an exception that it raises interrupts a wait in the block."""
    before = signal.signal(signal.SIGALRM, lambda *_: function())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def block_signals_in_children(but: signal.Signals | None = None) -> Iterator[None]:
    """Start processes in this block that never receive SIGNALS, `but` one; in this process they wait until its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, set(SIGNALS) - {but})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(SpawnProcess):
    def start(self) -> None:
        # a signal may come to another thread (of OpenBLAS), and would be raised here before the worker has its task
        with StopRequest(), block_signals_in_children():
            super().start()

    def run(self) -> None:
        threading.Thread(target=_exit_with_parent, daemon=True).start()
        super().run()

    def terminate(self) -> None:
        self.kill()  # SIGTERM is blocked


def _exit_with_parent() -> None:
    parent_process().join()
    os._exit(0)


@atexit.register
def _kill_workers() -> None:
    """Kill the workers before multiprocessing's own exit function, which would send SIGTERM and wait forever."""
    for process in active_children():
        if isinstance(process, _Worker):
            process.kill()


class WorkerContext(SpawnContext):
    """Starts the workers of a pool or a loader; spawned, since forked ones would inherit threads' locks and open
    files.
    """

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Worker] = []
        # Locks and workers would start this process, too; and starting it unblocks signals.
        with block_signals_in_children():
            resource_tracker.ensure_running()

    def Process(self, *arguments: Any, **named: Any) -> _Worker:  # noqa: N802  (the name that contexts have)
        """Make a process that is not started yet."""
        self._started.append(_Worker(*arguments, **named))
        return self._started[-1]

    def kill(self) -> None:
        """Kill the processes that are still running."""
        for worker in self._started:
            if worker.is_alive():
                worker.kill()

    def any_was_killed(self) -> bool:
        """Return whether a signal ended one of the processes; an error of its connection comes just before its end."""
        ended = wait([worker.sentinel for worker in self._started if worker.pid], timeout=0.5)
        for worker in self._started:
            if worker.pid and worker.sentinel in ended:
                worker.join(0.5)  # its sentinel closes a moment before it has an exit code
        return any((worker.exitcode or 0) < 0 for worker in self._started)


def require_files(count: int) -> None:
    """Raise OSError unless this process can open that many more files."""
    with ExitStack() as opened:
        for _ in range(count):
            opened.callback(os.close, os.open(os.devnull, os.O_RDONLY))


@contextmanager
def naming_worker_limits(setting: str) -> Iterator[None]:
    """Name the system's limit that keeps worker processes from starting or from sharing memory in the block.

    `setting` is the `key=value` that does without worker processes.

    Raises:
        InputError: there is no room in /dev/shm or it is not writable, or too many files or processes are open.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (limit := _limit_behind(str(error))) is None:
            raise
        raise InputError(f"{limit}, or use fewer worker processes ({setting}: none)") from None


def _limit_behind(message: str) -> str | None:
    """Find the limit by the system's words: torch's RuntimeErrors have no error number."""

    def is_any(*numbers: int) -> bool:
        return any(os.strerror(number) in message for number in numbers)

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
