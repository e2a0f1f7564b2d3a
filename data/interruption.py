"""Handle SIGINT (Ctrl-C), SIGTERM and a cluster's signal before a time limit; defer them in critical sections."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Self

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")  # SLURM sends the last two where `sbatch --signal` asks for them
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows has the first two
_Handler = Callable[[int, FrameType | None], None]


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
            yield
        finally:
            _replace_handler(_interrupt, self._note)


@contextmanager
def calling(function: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds in the main thread; an exception of it ends a wait in the block."""
    before = signal.signal(signal.SIGALRM, lambda *_: function())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
