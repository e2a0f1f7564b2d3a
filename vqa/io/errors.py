"""The one exception for what a user can mend, and texts from outside on one line."""

import unicodedata

_ESCAPED = {"Cc", "Cs", "Cf", "Zl", "Zp"}  # control, lone surrogates, direction marks and the like, line separators
_JOINERS = "\u200c\u200d"  # these spell words in some scripts, and join emoji


class InputError(ValueError):
    """The user's input is wrong: the message is one line that names the file or key and says what would be right.

    `main.py` prints it as `error: MESSAGE` and exits with 2.
    """

    def __str__(self) -> str:
        """Whatever the message quotes, it stays one line."""
        return printable(super().__str__())


class NotWrittenError(InputError):
    """An output cannot be written: its disk is full, read-only, or fails. Work goes on without an optional output."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
    """A text as it may be shown on a terminal: one line, with control characters and lone surrogates as escapes."""
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def _shown(character: str) -> str:
    if unicodedata.category(character) in _ESCAPED and character not in _JOINERS:
        return character.encode("unicode_escape").decode("ascii")
    return character
