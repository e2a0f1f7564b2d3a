"""Lock files that name their holder and are released when its process ends in any way."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from vqa.io.errors import InputError
from vqa.io.files import followed, naming_write_errors

try:
    import fcntl
except ImportError:
    raise InputError("this command needs a POSIX system (Linux, macOS, or WSL on Windows) to lock its files") from None

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # on some network disks


def lock_beside(path: Path) -> Path:
    """The lock file of a file or folder, in the same folder; one for all symbolic links to it."""
    path = followed(path)
    return path.with_name(f".{path.name}.lock")


@contextmanager
def held(lock: Path, what: object, *, wait: bool = False) -> Iterator[None]:
    """Hold a lock file during the block.

    Args:
        lock: the file.
        what: the name of the locked output in messages.
        wait: wait for another process that holds it, and print so.

    Raises:
        InputError: another process, which is named, holds it, and `wait` is False.
    """
    file = _acquired(lock, what, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # the disk fails: the block's own error is more specific
            lock.unlink(missing_ok=True)  # while it is locked: a waiting process notices and makes a new one
        file.close()


def _acquired(lock: Path, what: object, wait: bool) -> TextIO:
    while True:
        with naming_write_errors(lock):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                file.close()
                raise InputError(f"{what}: locked by {holder}") from None
            print(f"{what}: locked by {holder}; waiting", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise InputError(f"{lock}: cannot be locked ({os.strerror(error.errno).lower()})") from None
            print(f"{lock}: this disk has no locks; make sure that no other process works on {what}", flush=True)
        if _is_current(lock, file):
            break
        file.close()
    with naming_write_errors(lock):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def _is_current(lock: Path, file: TextIO) -> bool:
    """Whether the opened file still has that name; the process that held it may have removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False
