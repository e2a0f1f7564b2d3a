"""Processes that work for this one: they leave signals to it, and they end when it does."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from multiprocessing.context import SpawnContext, SpawnProcess

_TELLS_SENDER = hasattr(signal, "sigtimedwait")  # not on macOS
_LEFT_TO_PARENT = (signal.SIGINT, signal.SIGTERM) if _TELLS_SENDER else (signal.SIGINT,)


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

    Process = _Worker


def _end_with_parent() -> None:
    """A parent that was killed leaves workers that wait for work for ever; one that lives may end them itself."""
    parent = parent_process()
    while parent.is_alive():
        if not _TELLS_SENDER:
            parent.join()
        elif (heard := signal.sigtimedwait([signal.SIGTERM], 1)) and heard.si_pid == os.getppid():
            break
    os._exit(1)
