"""SIGINT (Ctrl-C), SIGTERM and a cluster's signal before a time limit: heard everywhere, held back where something is
to be ended first.
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # SLURM sends the last two where `sbatch --signal` asks for them
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has the first two


class Interrupted(KeyboardInterrupt):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(f"by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """As shells have it: 130 for SIGINT, 143 for SIGTERM, 140 for SIGUSR2."""
        return 128 + self.number


class _State:
    held = 0  # blocks that hold signals back
    waiting: int | None = None  # the signal that came meanwhile


def listen() -> None:
    """From here on a signal raises Interrupted; one that was ignored when the process began (nohup) still is."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _heard)


def _heard(number: int, _frame: FrameType | None) -> None:
    # A second Ctrl-C is impatience. A second one of the others is not: a process may get it from its group and from its
    # parent.
    if _State.held and (_State.waiting is None or number != signal.SIGINT):
        _State.waiting = _State.waiting or number
        return
    raise Interrupted(number)


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block a signal waits (ask `waits`); at its end it is raised. A second Ctrl-C does not wait.

    Raises:
        Interrupted: at the end of the block.
    """
    _State.held += 1
    try:
        yield
    except BaseException:
        _State.waiting = None  # it ends anyway
        raise
    finally:
        _State.held -= 1
    if waits() and not _State.held:
        stop()


@contextmanager
def let_through() -> Iterator[None]:
    """Within the block, inside one of `held_back`, a signal is raised at once.

    Raises:
        Interrupted: anywhere in the block.
    """
    held, _State.held = _State.held, 0
    try:
        if waits():
            stop()
        yield
    finally:
        _State.held = held


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


def waits() -> bool:
    """Whether a signal came that is held back."""
    return _State.waiting is not None


def stop() -> NoReturn:
    """Raises the signal that waits; SIGTERM, if it came to another process of this run."""
    number, _State.waiting = _State.waiting or signal.SIGTERM, None
    raise Interrupted(number)
