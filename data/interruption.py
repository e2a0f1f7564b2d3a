"""Handle SIGINT (Ctrl-C), SIGTERM and a cluster's signal before a time limit; defer them in critical sections."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar, NoReturn, Self

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
