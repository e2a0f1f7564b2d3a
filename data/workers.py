"""Processes that work for this one: they leave signals to it, and they end when it does."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from multiprocessing import parent_process, resource_tracker
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any

from data.interruption import SIGNALS

_TELLS_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS
_LEFT_TO_PARENT = [number for number in SIGNALS if _TELLS_SENDER or number != signal.SIGTERM]


@contextmanager
def deaf_children(*numbers: signal.Signals) -> Iterator[None]:
    """Processes that are started in this block do not hear these signals; here they only wait until its end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker(SpawnProcess):
    def start(self) -> None:
        with deaf_children(*_LEFT_TO_PARENT):
            super().start()

    def run(self) -> None:
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class WorkerContext(SpawnContext):
    """For a pool or a loader: spawned processes, since forked ones would inherit locks of threads and open files."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[_Worker] = []
        # a process as well, which locks and workers would start, and which, when it is started, ends the deafness
        with deaf_children(*_LEFT_TO_PARENT):
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


def is_of_lost_worker(error: RuntimeError) -> bool:
    """Whether an error says that a worker process of a pool or a loader was killed by others."""
    return isinstance(error, BrokenExecutor) or str(error).startswith("DataLoader worker (pid")


def _end_with_parent() -> None:
    """A parent that was killed leaves workers that wait for work for ever; one that lives may end them itself."""
    parent = parent_process()
    while parent.is_alive():
        if not _TELLS_SENDER:
            parent.join()
        elif (heard := signal.sigtimedwait([signal.SIGTERM], 1)) and heard.si_pid == os.getppid():
            break
    os._exit(1)
