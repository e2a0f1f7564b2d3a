"""The h5 file of a dataset at one image size: what is in it, how it is written safely and read back.

    /                attributes: format, version, complete, provenance (JSON), image_size, tokenizer (JSON)
    /images          pixels uint8 [N, S, S, 3], filled bool [N], usable bool [N], id int64 [N], file text [N]
    /answers         vocabulary text [A]: the answer classes, most common first
    /splits/NAME     the arrays of a `data.table.QuestionTable`, by the same names

Work is done in `NAME.h5.partial`. A row of `pixels` is marked in `filled` only after it was flushed to the disk, so a
killed run loses at most the rows of one flush; the file takes its final name when every row is filled.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tokenizers import Tokenizer

from data.errors import InputError
from data.table import QuestionTable

FORMAT, VERSION = "modern-vqa", 1
_ARRAYS = ("ids", "images", "tokens", "lengths", "given", "classes")
_TEXTS = ("texts", "question_types", "answer_types", "spellings")
_TEXT = h5py.string_dtype("utf-8")


def partial_path(path: Path) -> Path:
    """Where the file is while it is not complete."""
    return path.with_name(path.name + ".partial")


def create(
    path: Path,
    *,
    provenance: Mapping[str, Any],
    image_size: int,
    image_ids: Sequence[int],
    image_files: Sequence[str],
    tokenizer: Tokenizer,
    vocabulary: Sequence[str],
    splits: Mapping[str, QuestionTable],
) -> None:
    """Writes a partial file at `path` with everything but the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.unfinished")
    count = len(image_ids)
    try:
        with h5py.File(aside, "w") as file:
            file.attrs.update(format=FORMAT, version=VERSION, complete=False, image_size=image_size)
            file.attrs["provenance"] = json.dumps(provenance)
            # over 64 KiB does not fit into an attribute
            file.create_dataset("tokenizer", data=tokenizer.to_str(), dtype=_TEXT)
            images = file.create_group("images")
            images.create_dataset("id", data=np.array(image_ids, np.int64))
            images.create_dataset("file", data=list(image_files), dtype=_TEXT)
            images.create_dataset("filled", data=np.zeros(count, bool))
            images.create_dataset("usable", data=np.ones(count, bool))
            # contiguous: one row is one read, and nothing is written before its pixels are
            images.create_dataset("pixels", (count, image_size, image_size, 3), np.uint8, fill_time="never")
            file.create_dataset("answers/vocabulary", data=list(vocabulary), dtype=_TEXT)
            for name, table in splits.items():
                group = file.create_group(f"splits/{name}")
                for array in _ARRAYS:
                    group.create_dataset(array, data=getattr(table, array))
                for text in _TEXTS:
                    group.create_dataset(
                        text, data=getattr(table, text), dtype=_TEXT, shape=(len(getattr(table, text)),)
                    )
            to_disk(file)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def fill(file: h5py.File, rows: Sequence[int], pixels: Iterable[np.ndarray], usable: bool = True) -> None:
    """Writes images uint8 [S, S, 3] into rows, and marks them only once they are on the disk."""
    images = file["images"]
    for row, image in zip(rows, pixels, strict=True):
        images["pixels"][row] = image
    to_disk(file)
    for row in rows:
        images["usable"][row] = usable
        images["filled"][row] = True
    to_disk(file)


def opened_for_writing(partial: Path) -> h5py.File:
    """A partial file to fill. Raises InputError if another process holds it, or it is damaged."""
    try:
        return h5py.File(partial, "r+")
    except BlockingIOError:
        raise InputError(f"{partial}: another process is working on it") from None
    except OSError as error:
        raise InputError(f"{partial}: cannot be gone on with ({error!s:.100}); remove it to start again") from None


def finish(partial: Path, path: Path) -> None:
    """Gives a partial file its final name.

    Raises:
        RuntimeError: a row was never filled.
    """
    with opened_for_writing(partial) as file:
        if not file["images/filled"][:].all():
            raise RuntimeError(f"{partial}: not every image is filled")
        file.attrs["complete"] = True
        to_disk(file)
    partial.replace(path)


def read_provenance(path: Path) -> dict[str, Any]:
    """Where a file (partial or complete) came from. Raises InputError if it is none of ours or of another version."""
    with _opened(path) as file:
        return json.loads(file.attrs["provenance"])


class Store:
    """A complete file, for reading. The handle is closed again: `H5Images` opens its own, one a process."""

    def __init__(self, path: Path) -> None:
        """Reads what is small.

        Raises:
            InputError: the file is missing, unreadable, of another version, or not complete.
        """
        if not path.exists() and partial_path(path).exists():
            raise InputError(
                f"{path}: preprocessing is not finished; run `preprocess` again, it goes on where it stopped"
            )
        with _opened(path) as file:
            if not file.attrs["complete"]:
                raise InputError(f"{path}: not complete; run `preprocess` again")
            self.path = path
            self.image_size = int(file.attrs["image_size"])
            self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
            self.tokenizer = Tokenizer.from_str(file["tokenizer"].asstr()[()])
            self.vocabulary: list[str] = list(file["answers/vocabulary"].asstr()[:])
            self.usable: np.ndarray = file["images/usable"][:]
            self.splits = list(file["splits"])

    @property
    def identity(self) -> str:
        """A digest of what a model learns from: sources, settings, words and answer classes."""
        parts = json.dumps([self.provenance, self.tokenizer.to_str(), self.vocabulary], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()

    def table(self, split: str) -> QuestionTable:
        """The questions of a split.

        Raises:
            InputError: the file has no such split.
        """
        if split not in self.splits:
            raise InputError(f"{self.path}: no split {split!r}; it holds {', '.join(self.splits)}")
        with _opened(self.path) as file:
            group = file[f"splits/{split}"]
            arrays = {name: group[name][:] for name in _ARRAYS}
            texts = {name: list(group[name].asstr()[:]) for name in _TEXTS}
        return QuestionTable(**arrays, **texts)


class H5Rows:
    """Random access to the rows of an array in an h5 file; safe to hand to worker processes."""

    def __init__(self, path: Path, array: str) -> None:
        self.path, self.array = path, array
        self._process = -1
        self._file: h5py.File | None = None

    def __getitem__(self, row: int) -> np.ndarray:
        """One row."""
        if self._process != os.getpid():  # a handle inherited through a fork would share its file position
            self._file = h5py.File(self.path, "r", locking=False)
            self._rows = self._file[self.array]
            self._process = os.getpid()
        return self._rows[row]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "array": self.array, "_process": -1, "_file": None}


class H5Images(H5Rows):
    """The images of a store: uint8 [S, S, 3] each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "images/pixels")


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"{path}: no such file; `preprocess` makes it")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an h5 file ({error!s:.100})") from None
    if file.attrs.get("format") != FORMAT or file.attrs.get("version") != VERSION:
        found = f"{file.attrs.get('format', 'another program')!s} version {file.attrs.get('version', '?')}"
        file.close()
        raise InputError(f"{path}: made by {found}, this code reads {FORMAT} version {VERSION}; preprocess again")
    return file


def to_disk(file: h5py.File) -> None:
    """Waits until everything written is on the disk."""
    file.flush()
    os.fsync(file.id.get_vfd_handle())
