"""InputError for user errors; untrusted text escaped for terminals."""

import unicodedata

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


def printable(text: str) -> str:
    """Escape control characters, line breaks and lone surrogates, so that a text is safe on a terminal."""
    return "".join(
        character.encode("unicode_escape").decode("ascii")
        if unicodedata.category(character) in _ESCAPED and character not in _JOINERS
        else character
        for character in text
    )
