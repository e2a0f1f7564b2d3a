"""InputError for user errors; untrusted text escaped for terminals; warnings ignored, by several threads too."""

import threading
import unicodedata
import warnings

_ESCAPED = {"Cc", "Cs", "Cf", "Zl", "Zp"}  # control characters, lone surrogates, direction marks, line separators
_JOINERS = "\u200c\u200d"  # part of words in some scripts, and of emoji


class InputError(ValueError):
    """The user's input is wrong: the message is one line that names the file or key and what would be right.

    `main.py` prints it as `error: MESSAGE` and exits with 2.
    """

    def __str__(self) -> str:
        """Return the message on one line, whatever it quotes."""
        return printable(super().__str__())


class NotWrittenError(InputError):
    """An output cannot be written: its disk is full, read-only or failing. Optional outputs are skipped then."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error says that memory ran out, the main one or a GPU's; torch is not imported for it."""
    # on a CPU torch raises a RuntimeError that only its text tells from others
    names = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return names or "can't allocate memory" in str(error)


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates, so that a text is safe on a terminal."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _ESCAPED and character not in _JOINERS
        else character
        for character in text
    )


class _WithoutWarnings:
    """Ignores warnings in its blocks; of several threads the last one out restores the filters of the first one in.

    Each with its own `warnings.catch_warnings`, they would leave warnings off for good.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.filters = warnings.catch_warnings(action="ignore")
                self.filters.__enter__()

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.filters.__exit__(*error)


without_warnings = _WithoutWarnings()
