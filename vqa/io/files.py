"""Files written whole or not at all, and read with errors that name them."""

import csv
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vqa.io.errors import InputError, NotWrittenError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to; it takes the place of `path` only when the block ends well.

    Raises:
        InputError: as `naming_write_errors`; `path` is as it was.
    """
    aside = path.with_name(f".{path.name}.unfinished")  # one name, so that a killed run leaves at most one behind
    with naming_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield aside
            _sync(aside)
            aside.replace(path)
            with suppress(OSError):  # some disks cannot; the file has its name by now
                _sync(path.parent)
        finally:
            with suppress(OSError):
                aside.unlink(missing_ok=True)


@contextmanager
def naming_write_errors(path: Path) -> Iterator[None]:
    """Names the file that is written in the block where the system does not let it.

    Raises:
        NotWrittenError: the disk is full, fails or is read-only, or the like.
    """
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno).lower() if error.errno else f"{error!s:.100}"
        remedy = "; make space, then go on" if error.errno in _FULL else ""
        raise NotWrittenError(f"{path}: cannot be written ({reason}){remedy}") from None


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def write_text(path: Path, text: str) -> None:
    """Writes `text` (UTF-8) whole or not at all."""
    with written_whole(path) as aside:
        aside.write_text(text, encoding="utf-8")


def as_cell(text: str) -> str:
    """A text from outside for a CSV file: a spreadsheet takes what begins with one of these for a formula."""
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows as CSV, whole or not at all."""
    with written_whole(path) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Writes `value` as JSON whole or not at all."""
    write_text(path, json.dumps(value, indent=indent, ensure_ascii=False) + "\n")


def read_bytes(path: Path) -> bytes:
    """All bytes of a regular file; a pipe or a device, which might never end, is not opened.

    Raises:
        InputError: there is no such file, or it cannot be read.
    """
    try:
        regular = path.is_file() or path.is_dir() or not path.exists()
        content = path.read_bytes() if regular else b""
    except OSError as error:
        raise InputError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except ValueError:  # a null character
        raise InputError(f"{path}: no file can have this name") from None
    if not regular:
        raise InputError(f"{path}: not a regular file")
    return content


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark. Raises InputError as `read_bytes`, or not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

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
    raise ValueError(f"{name} is no number in JSON")


def check_room(file: Path, size: int, otherwise: str) -> None:
    """Refuses a file that will have `size` bytes where its disk has no room for what is missing of it.

    Args:
        file: it may be there already, wholly or partly written, with holes.
        size: bytes in the end.
        otherwise: what the user can do but make room.

    Raises:
        NotWrittenError: it does not fit.
    """
    missing = max(0, size - (file.stat().st_blocks * 512 if file.exists() else 0))
    free = shutil.disk_usage(next(folder for folder in file.absolute().parents if folder.exists())).free
    if missing > free:
        has = f"needs {shown(missing)} more, but its disk has {shown(free)} left"
        raise NotWrittenError(f"{file}: {has}; make room or {otherwise}")


def shown(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
