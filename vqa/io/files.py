"""Files written whole or not at all, and read with errors that name them."""

import csv
import errno
import json
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqa.io.errors import InputError, NotWrittenError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def followed(path: Path) -> Path:
    """What a symbolic link points to, so that a file that is renamed to it does not replace the link; else `path`."""
    return path.resolve() if path.is_symlink() else path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is synchronised and renamed to `path` if the block ends without an error.

    It may become a file or a folder. Each process has its own; those that killed processes of this host left are
    removed. A process of another host that shares the disk cannot be looked for: its path stays.

    Raises:
        NotWrittenError: as `naming_write_errors`; `path` is unchanged.
    """
    path = followed(path)
    of_host = f".{path.name}.{socket.gethostname()}-"
    aside = path.with_name(f"{of_host}{os.getpid()}.unfinished")
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.iterdir():
            of = re.fullmatch(rf"{re.escape(of_host)}(\d{{1,9}})\.unfinished", left.name)
            if of and (left == aside or not _is_running(int(of[1]))):
                _remove(left)
        try:
            yield aside
            _sync(aside)
            aside.replace(path)
            with suppress(OSError):  # some disks cannot; the file already has its name
                _sync(path.parent)
        finally:
            _remove(aside)


def _is_running(process: int) -> bool:
    try:
        if os.name == "posix":  # elsewhere this signal would end it
            os.kill(process, 0)
    except OSError as error:
        return error.errno != errno.ESRCH
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block, which writes `path`, into an error that names it.

    Raises:
        NotWrittenError: the disk is full, fails, is read-only, …
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else f"{error!s:.100}"
        remedy = "; free some space, then run the command again" if error.errno in _FULL else ""
        raise NotWrittenError(f"{path}: cannot be written ({reason}){remedy}") from None


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows refuses a read-only one
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) as `written_whole`; bytes of file names that are no UTF-8 become escapes, as of JSON."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8", errors="backslashreplace")


def as_cell(text: str) -> str:
    """Quote a text for a CSV file if a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]], end: str = "\r\n") -> None:
    """Write rows as CSV, each with this line `end`, whole or not at all."""
    with written_whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator=end)
        writer.writerow(columns)
        writer.writerows(rows)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write `value` as JSON as `written_whole`."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def is_hub_name(name: str) -> bool:
    """Return whether a text is OWNER/NAME as on the Hub, and no path: there is no folder OWNER."""
    found = re.fullmatch(r"(\w[\w.\-]*)/[\w.\-]+", name)
    return found is not None and not Path(found[1]).is_dir()


def read_bytes(path: Path) -> bytes:
    """Read all bytes of a regular file; does not open a pipe or a device, which might never end.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        if path.is_file() or path.is_dir() or not path.exists():
            return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:  # a null character
        raise InputError(f"{path}: no file can have this name") from None
    raise InputError(f"{path}: not a regular file")


def read_text(path: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark. Raises InputError as `read_bytes`, or if not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """Read the JSON value in `path`.

    Raises:
        InputError: no such file, not UTF-8, or malformed (with its line).
    """
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:  # NaN, or a number of thousands of digits
        raise InputError(f"{path}: {str(error).split(';')[0]}") from None
    except RecursionError:
        raise InputError(f"{path}: nested too deeply") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number in JSON")


def check_room(file: Path, size: int, otherwise: str) -> None:
    """Check that a file that will have `size` bytes fits on its disk.

    Args:
        file: may exist already, wholly or partly written, with holes.
        size: bytes of the complete file.
        otherwise: what the user can do instead of making room.

    Raises:
        NotWrittenError: it does not fit.
    """
    missing = max(0, size - (file.stat().st_blocks * 512 if file.exists() else 0))
    free = shutil.disk_usage(next(folder for folder in file.absolute().parents if folder.exists())).free
    if missing > free:
        has = f"needs {size_text(missing)} more, but its disk has {size_text(free)} left"
        raise NotWrittenError(f"{file}: {has}; make room or {otherwise}")


def size_text(size: int) -> str:
    """Format a number of bytes as MB or GB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
