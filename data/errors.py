"""The one exception for what a user can mend."""


class InputError(ValueError):
    """The user's input is wrong: the message is one line that names the file or key and says what would be right.

    `main.py` prints it as `error: MESSAGE` and exits with 2.
    """
