"""Locks that say who holds them, and that vanish with the process, however it ends."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors

try:
    import fcntl
except ImportError:
    raise InputError("this command needs a POSIX system (Linux, macOS, or WSL on Windows) to lock its files") from None

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)  # of some network disks


@contextmanager
def held(lock: Path, what: object, *, wait: bool = False) -> Iterator[None]:
    """Holds a lock file, which is there as long as the block runs.

    Args:
        lock: the file.
        what: the output that is locked, as the messages call it.
        wait: whether to wait for another process that holds it, saying so.

    Raises:
        InputError: another process holds it, and `wait` is False; the message says which.
    """
    file = _acquired(lock, what, wait)
    try:
        yield
    finally:
        with suppress(OSError):  # of a disk that fails: what is raised in the block says more
            lock.unlink(missing_ok=True)  # while it is held: who waits for it will notice and make a new one
        file.close()


def _acquired(lock: Path, what: object, wait: bool) -> TextIO:
    told = False
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
            if not told:
                print(f"{what}: locked by {holder}; waiting", flush=True)
                told = True
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                raise InputError(f"{lock}: cannot be locked ({os.strerror(error.errno).lower()})") from None
            print(f"{lock}: this disk has no locks; make sure that no other process works on {what}", flush=True)
        if _is_still(lock, file):
            break
        file.close()
    with naming_write_errors(lock):
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    return file


def _is_still(lock: Path, file: TextIO) -> bool:
    """Whether the opened file is the one of that name: who held it last has removed it."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), lock.stat())
    except FileNotFoundError:
        return False
