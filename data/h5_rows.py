"""An array in an h5 file whose rows are written and read one by one, each with a checksum.

    ARRAY   [N, …], contiguous: one row is one read
    crc32   uint32 [N], in the same group
    filled  bool [N], in the same group: which rows are written

HDF5 makes the file once, with a fixed place for each array. Rows are then written to their places by plain writes, so
that HDF5 buffers nothing that a kill or a full disk would leave half-written; a row is marked in `filled` only after
it and its checksum are on the disk.
"""

import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

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
        """Write all of it, or set `error`."""
        rest = memoryview(data).cast("B")
        count = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = self.error or error
        return count

    def truncate(self, size: int | None = None) -> int:
        """Truncate, or set `error`."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell()


@contextmanager
def structured(path: Path, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """Open an h5 file to change its structure or attributes; the end of the block synchronises it to the disk.

    Raises:
        OSError: the disk is full, or fails (at the end of the block).
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
    """Turn any error of the block, which reads `path`, into an InputError that names it and the remedy."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py and what reads texts raise errors of many kinds on damaged files
        raise InputError(f"{path}: damaged ({first_line(error):.100}); {remedy}") from None


def reserve_rows(group: h5py.Group, name: str, shape: Sequence[int], dtype: Any) -> None:
    """Reserve an array of `shape` [N, …]; nothing is written there, so no space is taken on the disk yet."""
    group.create_dataset("crc32", data=np.zeros(shape[0], np.uint32))
    group.create_dataset("filled", data=np.zeros(shape[0], bool))
    placed = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    placed.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    group.create_dataset(name, tuple(shape), dtype, dcpl=placed, fill_time="never")


def opened_for_filling(partial: Path) -> h5py.File:
    """Open a file with unfilled rows, under the caller's lock (`vqa.io.locks`); HDF5's own fails on some disks.

    Raises:
        InputError: the file is damaged.
    """
    try:
        return h5py.File(partial, "r+", locking=False)
    except OSError as error:
        raise InputError(f"{partial}: cannot resume ({error!s:.100}); remove it to start again") from None


class RowWriter:
    """Writes rows of an array in an open h5 file, from any thread; only `mark_rows` makes them count."""

    def __init__(self, file: h5py.File, array: str) -> None:
        data = file[array]
        self.path = Path(file.filename)
        self.shape, self.dtype = data.shape, data.dtype
        self._file, self._offset = file.id.get_vfd_handle(), data.id.get_offset()

    def write(self, row: int, value: Any) -> int:
        """Write one row and return its CRC-32.

        Raises:
            NotWrittenError: the disk is full, or fails.
        """
        kept = np.asarray(value, self.dtype, order="C")
        if kept.shape != self.shape[1:] or not 0 <= row < self.shape[0]:
            raise ValueError(f"an array of {self.shape} has no row {row} of {kept.shape}")
        rest, offset = memoryview(kept.reshape(-1).view(np.uint8)), self._offset + row * kept.nbytes
        with naming_write_errors(self.path):
            while rest:  # a disk that gets full takes a part first
                written = os.pwrite(self._file, rest, offset)
                rest, offset = rest[written:], offset + written
        return zlib.crc32(kept)


def write_rows(file: h5py.File, array: str, rows: Sequence[int], values: Iterable[np.ndarray]) -> None:
    """Write rows with their checksums; only `mark_rows` makes them count. Raises NotWrittenError."""
    writer = RowWriter(file, array)
    checksums = [writer.write(row, value) for row, value in zip(rows, values, strict=True)]
    set_rows(file, file[array].parent["crc32"].name, rows, checksums)


def mark_rows(file: h5py.File, array: str, rows: Sequence[int]) -> None:
    """Wait until all that was written is on the disk, and mark rows as filled.

    Raises:
        NotWrittenError: the disk is full, or fails; the rows are not marked then.
    """
    with naming_write_errors(Path(file.filename)):
        os.fsync(file.id.get_vfd_handle())
    # a kill does not undo what is written, and when the marks reach the disk does not matter once the rows are there
    set_rows(file, file[array].parent["filled"].name, rows, [True] * len(rows))


def set_rows(file: h5py.File, array: str, rows: Sequence[int], values: Sequence[float]) -> None:
    """Write rows of a small array, one value each. Raises NotWrittenError."""
    writer = RowWriter(file, array)
    for row, value in zip(rows, values, strict=True):
        writer.write(row, value)


class H5Rows:
    """Random access to the rows of an array in an h5 file, verified; safe to hand to worker processes and threads."""

    def __init__(
        self, path: Path, array: str, remedy: str = "make it again", expected: np.ndarray | None = None
    ) -> None:
        """`remedy` is what the user should do with a damaged file; `expected` the rows' checksums, uint32 [N], 0 where
        any is right: another file may be there when it is opened, in each worker process.
        """
        self.path, self.array, self.remedy, self.expected = path, array, remedy, expected
        self._file = None

    def __getitem__(self, row: int) -> np.ndarray:
        """Read one row and verify its checksum; the array is read-only.

        Raises:
            InputError: the file is truncated or damaged, or the disk fails.
        """
        if self._file is None:
            self._open()
        if not 0 <= row < self._count:
            raise IndexError(f"{self.array} has {self._count} rows, no row {row}")
        try:
            # `pread` moves no file position, which processes after a fork share
            read = os.pread(self._file.fileno(), self._bytes, self._offset + row * self._bytes)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({os.strerror(error.errno).lower()})") from None
        if len(read) != self._bytes:
            raise InputError(f"{self.path}: ends before row {row} of {self.array}: truncated; {self.remedy}")
        if zlib.crc32(read) != self._checksums[row]:
            raise InputError(f"{self.path}: row {row} of {self.array} is damaged (checksum mismatch); {self.remedy}")
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
        if (expected := self.expected) is not None:
            found = self._checksums[: len(expected)]
            if len(found) < len(expected) or (found != expected)[expected != 0].any():
                said = f"was replaced by other {self.array} while this command ran"
                raise InputError(f"{self.path}: {said}; run it again")
        self._bytes = int(np.prod(self._shape)) * self._dtype.itemsize
        self._file = self.path.open("rb", buffering=0)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("path", "array", "remedy", "expected")} | {"_file": None}
