"""The h5 file of a dataset at one image size: what is in it, how it is written safely and read back.

    /                attributes: format, version, complete, provenance (JSON), image_size, digest
    /tokenizer       text (JSON)
    /images          pixels uint8 [N, S, S, 3], crc32 uint32 [N], filled bool [N], usable bool [N], id int64 [N],
                     file text [N]
    /answers         vocabulary text [A]: the answer classes, most common first
    /splits/NAME     the arrays of a `data.question_table.QuestionTable`, by the same names; attribute: digest of them

Work is done in `NAME.h5.partial`, which has that name as soon as its tables are written, and its final name when every
row is filled. A complete file is never written to: one with other tables takes its place, in which the images that it
held have the same rows, so that who reads images of the one can go on with the other. Pixels are written by the
processes that decode, without h5py, also while the tables are made; a row is marked in `filled` only after it was
flushed to the disk, so a killed run loses at most the rows of one flush.

What is read is verified: a row of `pixels` by its checksum, all else that a model learns from by the digests (SHA-256).
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tokenizers import Tokenizer

from data.h5_rows import (
    H5Rows,
    RowPlace,
    damage_named,
    mark_rows,
    opened_for_filling,
    reserve_rows,
    set_rows,
    structured,
    write_rows,
)
from data.question_table import QuestionTable
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, written_whole
from vqa.text.tokenizer import read_tokenizer

FORMAT, VERSION = "modern-vqa", 2
_ARRAYS = ("ids", "images", "tokens", "lengths", "given", "classes")
_TEXTS = ("texts", "question_types", "answer_types", "spellings")
_TEXT = h5py.string_dtype("utf-8")
_REMEDY = "remove it and run `preprocess` again"
_NO_DIGEST = "0" * 64  # until the file is complete


def partial_path(path: Path) -> Path:
    """Where the file is while it is not complete."""
    return path.with_name(path.name + ".partial")


@contextmanager
def begun(
    partial: Path, *, image_size: int, image_ids: Sequence[int], image_files: Sequence[str]
) -> Iterator[tuple[h5py.File, RowPlace]]:
    """Begins a file: gives it without its tables, which the block has to write, and the place of its pixels, which may
    be filled from now on. It is `partial` once the block has ended well; else it is gone.

    Raises:
        InputError: the disk is full, or fails.
    """
    count = len(image_ids)
    with written_whole(partial) as aside, structured(aside, "w") as file:
        file.attrs.update(format=FORMAT, version=VERSION, complete=False, image_size=image_size)
        file.attrs["digest"] = np.bytes_(_NO_DIGEST)
        images = file.create_group("images")
        images.create_dataset("id", data=np.array(image_ids, np.int64))
        images.create_dataset("file", data=list(image_files), dtype=_TEXT)
        images.create_dataset("usable", data=np.ones(count, bool))
        reserve_rows(images, "pixels", (count, image_size, image_size, 3), np.uint8)
        yield file, RowPlace(partial, images["pixels"].id.get_offset(), aside)


def write_tables(
    file: h5py.File,
    *,
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer,
    vocabulary: Sequence[str],
    splits: Mapping[str, QuestionTable],
) -> None:
    """Writes all that a file of `begun` holds beside its images."""
    file.attrs["provenance"] = json.dumps(provenance)
    # over 64 KiB does not fit into an attribute
    file.create_dataset("tokenizer", data=tokenizer.to_str(), dtype=_TEXT)
    file.create_dataset("answers/vocabulary", data=list(vocabulary), dtype=_TEXT)
    for name, table in splits.items():
        group = file.create_group(f"splits/{name}")
        for array in _ARRAYS:
            group.create_dataset(array, data=getattr(table, array))
        for text in _TEXTS:
            group.create_dataset(text, data=getattr(table, text), dtype=_TEXT, shape=(len(getattr(table, text)),))
        group.attrs["digest"] = np.bytes_(_digest_of_table(table))


def mark(file: h5py.File, written: Sequence[tuple[int, int]]) -> None:
    """Marks rows of pixels, each with its checksum, as filled, once they are on the disk; whichever process wrote them.

    Raises:
        InputError: the disk is full, or fails; the rows are not marked then.
    """
    rows, checksums = ([pair[part] for pair in written] for part in (0, 1))
    set_rows(file, "images/crc32", rows, checksums)
    set_rows(file, "images/usable", rows, [True] * len(rows))  # of an image that was mended meanwhile
    mark_rows(file, "images/pixels", rows)


def fill_unusable(file: h5py.File, rows: Sequence[int], image: np.ndarray) -> None:
    """Writes one image uint8 [S, S, 3] into rows that have none of their own, and marks them so. Raises InputError as
    `mark` does.
    """
    write_rows(file, "images/pixels", rows, [image] * len(rows))
    set_rows(file, "images/usable", rows, [False] * len(rows))
    mark_rows(file, "images/pixels", rows)


def opened_for_writing(partial: Path) -> h5py.File:
    """A partial file to fill. Raises InputError if it is damaged, or of another version."""
    _opened(partial).close()
    return opened_for_filling(partial)


def finish(partial: Path, path: Path) -> None:
    """Gives a partial file its final name.

    Raises:
        RuntimeError: a row was never filled.
    """
    with naming_write_errors(partial), structured(partial, "r+") as file:
        if not file["images/filled"][:].all():
            raise RuntimeError(f"{partial}: not every image is filled")
        # changed in place: nothing in the file moves
        file.attrs.modify("digest", np.bytes_(_digest_of(file)))
        file.attrs.modify("complete", True)
    with naming_write_errors(path):
        partial.replace(path)


def read_provenance(path: Path) -> dict[str, Any]:
    """Where a file (partial or complete) came from. Raises InputError if it is none of ours or of another version."""
    with _opened(path) as file, damage_named(path, _REMEDY):
        return json.loads(file.attrs["provenance"])


class Store:
    """A complete file, for reading. The handle is closed again: `H5Images` opens its own, one a process."""

    def __init__(self, path: Path) -> None:
        """Reads what is small.

        Raises:
            InputError: the file is missing, unreadable, damaged, of another version, or not complete.
        """
        if not path.exists() and partial_path(path).exists():
            raise InputError(
                f"{path}: preprocessing is not finished; run `preprocess` again, it goes on where it stopped"
            )
        with _opened(path) as file, damage_named(path, _REMEDY):
            if not file.attrs["complete"]:
                raise InputError(f"{path}: not complete; run `preprocess` again")
            self.path = path
            self.image_size = int(file.attrs["image_size"])
            self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
            self.tokenizer = read_tokenizer(file["tokenizer"].asstr()[()], path)
            self.vocabulary: list[str] = list(file["answers/vocabulary"].asstr()[:])
            self.usable: np.ndarray = file["images/usable"][:]
            self.image_ids: np.ndarray = file["images/id"][:]
            self.checksums: np.ndarray = file["images/crc32"][:]
            self.splits = list(file["splits"])
            self._digest = file.attrs["digest"].decode()
            if self._digest != _digest_of(file):
                raise ValueError("its digest is another")

    def stand_ins(self, splits: Sequence[str]) -> int:
        """How many images that some splits ask about were missing or unreadable."""
        with _opened(self.path) as file, damage_named(self.path, _REMEDY):
            rows = [file[f"splits/{split}/images"][:] for split in splits]
            return int((~self.usable[np.unique(np.concatenate(rows))]).sum())

    def identity(self, splits: Sequence[str]) -> str:
        """A digest of what a model learns from in some splits; what the file holds beside them is not in it."""
        sources = {name: source for name, source in self.provenance["sources"].items() if name in splits}
        parts: list[Any] = [self.provenance | {"sources": sources}, self.tokenizer.to_str(), self.vocabulary]
        if stand_ins := self.stand_ins(splits):
            parts.append(stand_ins)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def images_identity(self) -> str:
        """A digest of the images, whatever is asked about them."""
        return hashlib.sha256(f"{self.image_size}".encode() + self.checksums.tobytes()).hexdigest()

    def table(self, split: str) -> QuestionTable:
        """The questions of a split.

        Raises:
            InputError: the file has no such split, or is damaged.
        """
        if split not in self.splits:
            raise InputError(f"{self.path}: no split {split!r}; it holds {', '.join(self.splits)}")
        with _opened(self.path) as file, damage_named(self.path, _REMEDY):
            if file.attrs["digest"].decode() != self._digest:
                raise InputError(f"{self.path}: was made anew meanwhile; start the command again")
            group = file[f"splits/{split}"]
            arrays = {name: group[name][:] for name in _ARRAYS}
            texts = {name: list(group[name].asstr()[:]) for name in _TEXTS}
            table = QuestionTable(**arrays, **texts)
            if group.attrs["digest"].decode() != _digest_of_table(table):
                raise ValueError(f"the digest of split {split!r} is another")
        return table


class H5Images(H5Rows):
    """The images of a store: uint8 [S, S, 3] each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "images/pixels", _REMEDY)

    @property
    def bad(self) -> np.ndarray:
        """Which of them are stand-ins, bool [N]."""
        return ~Store(self.path).usable


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"{path}: no such file; `preprocess` makes it")
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise InputError(f"{path}: cannot be read as an h5 file ({error!s:.100})") from None
    with damage_named(path, _REMEDY):
        made = file.attrs.get("format", "another program"), file.attrs.get("version", "?")
        if made != (FORMAT, VERSION):
            raise InputError(
                f"{path}: made by {made[0]} version {made[1]}, not {FORMAT} version {VERSION}; name another data.h5, "
                "or remove it and run `preprocess`"
            )
    return file


def _digest_of(file: h5py.File) -> str:
    """Of all that a model learns from; of the pixels it takes their checksums, of the tables their digests."""
    digest = hashlib.sha256()
    digest.update(f"{file.attrs['image_size']} {file.attrs['provenance']}".encode())
    digest.update(json.dumps([file["tokenizer"].asstr()[()], *file["answers/vocabulary"].asstr()[:]]).encode())
    for name in ("crc32", "usable", "filled"):
        digest.update(file[f"images/{name}"][:].tobytes())
    for name in sorted(file["splits"]):
        digest.update(name.encode() + file[f"splits/{name}"].attrs["digest"])
    return digest.hexdigest()


def _digest_of_table(table: QuestionTable) -> str:
    digest = hashlib.sha256()
    for name in _ARRAYS:
        array = np.ascontiguousarray(getattr(table, name))
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    for name in _TEXTS:
        digest.update(json.dumps([name, *getattr(table, name)]).encode())
    return digest.hexdigest()
