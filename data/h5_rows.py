"""An array in an h5 file whose rows are written and read one by one, each with a checksum.

    ARRAY   [N, …], contiguous: one row is one read
    crc32   uint32 [N], beside it
    filled  bool [N], beside it: which rows are written

HDF5 makes the file once, with a fixed place for each array. Rows are then written to their places by plain writes, so
that HDF5 holds nothing back which a kill or a full disk would leave half-written; a row is marked in `filled` only
after it and its checksum are on the disk.
"""

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import h5py
import numpy as np

from vqa.io.errors import InputError, first_line
from vqa.io.files import naming_write_errors

# the oldest layout whose own structures have checksums, and that a killed process does not leave marked as open
LAYOUT = ("v108", "v108")


class _PatientFile(io.FileIO):
    """A file that keeps the disk's errors: HDF5 crashes when it closes a file after one."""

    error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """All of it, or nothing and `error`."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return count

    def truncate(self, size: int | None = None) -> int:
        """As that of `io.FileIO`, or nothing and `error`."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell()


@contextmanager
def structured(path: Path, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """An h5 file whose structure or attributes are made or changed; at the end of the block it is on the disk.

    Raises:
        OSError: at the end of the block: the disk is full, or fails.
    """
    with _PatientFile(path, "w+" if mode == "w" else "r+") as raw:
        try:
            with h5py.File(raw, mode, libver=LAYOUT) as file:
                yield file
        except Exception:
            if raw.error is None:
                raise
        if raw.error is not None:
            raise raw.error
        os.fsync(raw.fileno())


@contextmanager
def damage_named(path: Path, remedy: str) -> Iterator[None]:
    """Names the file that is read in the block where it is damaged, and what is to be done.

    Raises:
        InputError: it is.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py and what reads texts raise errors of many kinds on damaged files
        raise InputError(f"{path}: damaged ({first_line(error):.100}); {remedy}") from None


def reserve_rows(group: h5py.Group, name: str, shape: Sequence[int], dtype: Any) -> None:
    """Makes room for an array of `shape` [N, …]; nothing is written there, so the disk is not yet taken."""
    group.create_dataset("crc32", data=np.zeros(shape[0], np.uint32))
    group.create_dataset("filled", data=np.zeros(shape[0], bool))
    placed = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    placed.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    group.create_dataset(name, tuple(shape), dtype, dcpl=placed, fill_time="never")


def opened_for_filling(partial: Path) -> h5py.File:
    """Open a file with unfilled rows, under the caller's lock (HDF5's own fails on disks without locks).

    Raises:
        InputError: the file is damaged.
    """
    try:
        return h5py.File(partial, "r+", locking=False)
    except OSError as error:
        raise InputError(f"{partial}: cannot resume ({error!s:.100}); remove it to start again") from None


class RowPlace(NamedTuple):
    """Where the rows of an array lie in a file: all that another process needs to write some of them."""

    path: Path
    offset: int  # of the first row, bytes
    aside: Path | None = None  # where the file is until it is given its name

    def opened(self) -> BinaryIO:
        """The file, whether it has its name by now or not."""
        if self.aside is not None:
            with suppress(FileNotFoundError):
                return self.aside.open("rb+", buffering=0)
        return self.path.open("rb+", buffering=0)

    def write(self, file: int, row: int, value: np.ndarray) -> int:
        """Writes a contiguous row to an opened file and returns its checksum; only `mark_rows` makes it count."""
        write_at(file, value, self.offset + row * value.nbytes)
        return zlib.crc32(value)


def place_of_rows(file: h5py.File, array: str) -> RowPlace:
    """The place of an array that `reserve_rows` made room for."""
    return RowPlace(Path(file.filename), file[array].id.get_offset())


def write_rows(file: h5py.File, array: str, rows: Sequence[int], values: Iterable[np.ndarray]) -> None:
    """Writes rows with their checksums; only `mark_rows` makes them count.

    Raises:
        InputError: the disk is full, or fails.
    """
    data, place, checksums = file[array], place_of_rows(file, array), []
    with naming_write_errors(place.path):
        for row, value in zip(rows, values, strict=True):
            kept = np.ascontiguousarray(value, data.dtype)
            if kept.shape != data.shape[1:] or not 0 <= row < len(data):
                raise ValueError(f"{array} {data.shape} takes no row {row} of {kept.shape}")
            checksums.append(place.write(file.id.get_vfd_handle(), row, kept))
    set_rows(file, data.parent["crc32"].name, rows, checksums)


def mark_rows(file: h5py.File, array: str, rows: Sequence[int]) -> None:
    """Waits until all that was written is on the disk, and marks rows as filled.

    Raises:
        InputError: the disk is full, or fails; the rows are not marked then.
    """
    _to_disk(file)
    # a kill does not undo what is written; when the marks come to the disk is no matter, as long as the rows are there
    set_rows(file, file[array].parent["filled"].name, rows, [True] * len(rows))


def set_rows(file: h5py.File, array: str, rows: Sequence[int], values: Sequence[float]) -> None:
    """Writes rows of a small array, a value each, by plain writes as well. Raises InputError as `write_rows` does."""
    data, place = file[array], place_of_rows(file, array)
    kept = np.array(values, data.dtype)
    runs = np.split(np.arange(len(rows)), np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    with naming_write_errors(place.path):
        for run in runs:  # rows that lie one after the other
            write_at(file.id.get_vfd_handle(), kept[run], place.offset + rows[run[0]] * kept.itemsize)


def copied_rows(rows: "H5Rows", place: RowPlace, chosen: Sequence[int]) -> Iterator[tuple[int, int | str]]:
    """Copies rows of a file to the same places of another; yields each with its checksum once it is written, or with
    what is wrong with it.

    Raises:
        InputError: the disk is full, or fails.
    """
    with naming_write_errors(place.path), place.opened() as file:
        for row in chosen:
            try:
                value = rows[row]
            except InputError as error:
                yield row, str(error)
                continue
            yield row, place.write(file.fileno(), row, value)


def _to_disk(file: h5py.File) -> None:
    with naming_write_errors(Path(file.filename)):
        os.fsync(file.id.get_vfd_handle())


def write_at(file: int, value: np.ndarray, offset: int) -> None:
    """Writes a contiguous array to a place, in bytes, of an opened file."""
    rest = memoryview(value.reshape(-1).view(np.uint8))
    while rest:  # a disk that gets full takes a part first
        written = os.pwrite(file, rest, offset)
        rest, offset = rest[written:], offset + written


class H5Rows:
    """Random access to the rows of an array in an h5 file, verified; safe to hand to worker processes and threads."""

    def __init__(self, path: Path, array: str, remedy: str = "make it again") -> None:
        """`remedy` is what is to be done with a damaged file."""
        self.path, self.array, self.remedy = path, array, remedy
        self._file = None

    def __getitem__(self, row: int) -> np.ndarray:
        """One row, not to be written to.

        Raises:
            InputError: the file is truncated or damaged, or the disk fails.
        """
        if self._file is None:
            self._open()
        if not 0 <= row < self._count:
            raise IndexError(f"{self.array} has {self._count} rows, no row {row}")
        try:
            # at a place of its own: a handle that is inherited through a fork does not disturb another's
            read = os.pread(self._file.fileno(), self._bytes, self._offset + row * self._bytes)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({os.strerror(error.errno).lower()})") from None
        if len(read) != self._bytes:
            raise InputError(f"{self.path}: ends before row {row} of {self.array}: truncated; {self.remedy}")
        if zlib.crc32(read) != self._checksums[row]:
            raise InputError(f"{self.path}: row {row} of {self.array} is damaged (checksum); {self.remedy}")
        return np.frombuffer(read, self._dtype).reshape(self._shape)

    def _open(self) -> None:
        try:
            with h5py.File(self.path, "r", locking=False) as file:
                data = file[self.array]
                self._count, self._shape, self._dtype = len(data), data.shape[1:], data.dtype
                self._offset = data.id.get_offset()
                self._checksums = data.parent["crc32"][:]
        except (OSError, KeyError, RuntimeError) as error:  # h5py raises each of these on damaged files
            raise InputError(f"{self.path}: cannot be read as an h5 file ({error!s:.100}); {self.remedy}") from None
        if self._offset is None:
            raise InputError(f"{self.path}: {self.array} is not stored in one piece; {self.remedy}")
        self._bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self._file = self.path.open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "array": self.array, "remedy": self.remedy, "_file": None}
