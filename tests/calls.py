"""Stand-ins for functions: one that fails, and one that does something else before it is what it was."""

import os
from collections.abc import Callable
from typing import NoReturn


def failing(number: int) -> Callable[..., NoReturn]:
    """A function that raises the system's error of a number."""

    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    return fail


def interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def calling(real: Callable, at: int, what: Callable[[], object]) -> Callable:
    """`real`, which in its call number `at` first does `what`."""
    calls = []

    def function(*arguments, **named):
        calls.append(1)
        if len(calls) == at:
            what()
        return real(*arguments, **named)

    return function
