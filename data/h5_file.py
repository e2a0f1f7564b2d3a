"""The h5 file of a dataset at one image size: its contents, safe writing, verified reading.

    /                attributes: format, version, complete, provenance (JSON), image_size, digest
    /tokenizer       text (JSON)
    /images          pixels uint8 [N, S, S, 3], crc32 uint32 [N], filled bool [N], usable bool [N], id int64 [N],
                     file text [N]; where questions are about objects also crop int32 [N, 6]: left, top, right, bottom
                     of the part that is stored, width and height of the whole image
    /categories      text [K]: of objects, where there are any
    /answers         vocabulary text [A]: the answer classes, most common first
    /splits/NAME     the arrays of a `data.question_table.QuestionTable`, by the same names (`extras` is a group, where
                     there are any); attribute: digest of them

The file is `NAME.h5.partial` once its tables are written, and is renamed when every row is filled. A complete
file is never written to: a new one replaces it, in which its images keep their rows, so that a reader of the old file
can continue with the new one. A row is marked in `filled` only after it is on the disk, so a killed run loses at most
the rows of one flush.

Reading verifies: a row of `pixels` by its checksum, all else that a model learns from by the digests (SHA-256).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from tokenizers import Tokenizer

from data.h5_rows import H5Rows, damage_named, mark_rows, reserve_rows, set_rows, structured, write_rows
from data.question_table import ARRAYS, TEXTS, QuestionTable
from data.sources import NeededImage
from vqa.io.errors import InputError
from vqa.io.files import followed, naming_write_errors, written_whole
from vqa.text.tokenizer import read_tokenizer

FORMAT, VERSION = "modern-vqa", 2
_TEXT = h5py.string_dtype("utf-8")
_REMEDY = "remove it and run `preprocess` again"
_NO_DIGEST = "0" * 64  # until the file is complete


def partial_path(path: Path) -> Path:
    """The name of the file while it is not complete."""
    path = followed(path)
    return path.with_name(path.name + ".partial")


def begin(
    partial: Path,
    *,
    image_size: int,
    images: Sequence[NeededImage],
    provenance: Mapping[str, Any],
    tokenizer: Tokenizer,
    vocabulary: Sequence[str],
    splits: Mapping[str, QuestionTable],
    categories: Sequence[str] = (),
) -> None:
    """Write a file that holds everything but its pixels; it appears as `partial` once it is whole.

    Raises:
        NotWrittenError: the disk is full, or fails.
    """
    count = len(images)
    with written_whole(partial) as aside, structured(aside, "w") as file:
        file.attrs.update(format=FORMAT, version=VERSION, complete=False, image_size=image_size)
        file.attrs["digest"] = np.bytes_(_NO_DIGEST)
        group = file.create_group("images")
        group.create_dataset("id", data=np.array([image.id for image in images], np.int64))
        group.create_dataset("file", data=[image.file for image in images], dtype=_TEXT)
        group.create_dataset("usable", data=np.ones(count, bool))
        if any(image.crop for image in images):
            group.create_dataset("crop", data=np.array([image.crop for image in images], np.int32))
        reserve_rows(group, "pixels", (count, image_size, image_size, 3), np.uint8)
        file.attrs["provenance"] = json.dumps(provenance)
        # over 64 KiB does not fit into an attribute
        file.create_dataset("tokenizer", data=tokenizer.to_str(), dtype=_TEXT)
        file.create_dataset("answers/vocabulary", data=list(vocabulary), dtype=_TEXT)
        if categories:
            file.create_dataset("categories", data=list(categories), dtype=_TEXT)
        for name, table in splits.items():
            group = file.create_group(f"splits/{name}")
            for array in ARRAYS:
                group.create_dataset(array, data=getattr(table, array))
            for text in TEXTS:
                group.create_dataset(text, data=getattr(table, text), dtype=_TEXT, shape=(len(getattr(table, text)),))
            for extra, values in table.extras.items():
                group.create_dataset(f"extras/{extra}", data=values)
            group.attrs["digest"] = np.bytes_(_digest_of_table(table))


def mark(file: h5py.File, written: Sequence[tuple[int, int]]) -> None:
    """Mark written rows of pixels, each with its checksum, as filled once they are on the disk.

    Raises:
        NotWrittenError: the disk is full, or fails; the rows are not marked then.
    """
    rows, checksums = ([pair[part] for pair in written] for part in (0, 1))
    set_rows(file, "images/crc32", rows, checksums)
    set_rows(file, "images/usable", rows, [True] * len(rows))  # a stand-in may have been there
    mark_rows(file, "images/pixels", rows)


def fill_unusable(file: h5py.File, rows: Sequence[int], image: np.ndarray) -> None:
    """Write a stand-in uint8 [S, S, 3] to some rows and mark them as not usable. Raises NotWrittenError."""
    write_rows(file, "images/pixels", rows, [image] * len(rows))
    set_rows(file, "images/usable", rows, [False] * len(rows))
    mark_rows(file, "images/pixels", rows)


def finish(partial: Path, path: Path) -> None:
    """Complete a partial file and rename it to its final name. Raises RuntimeError if a row was never filled."""
    with naming_write_errors(partial), structured(partial, "r+") as file:
        if not file["images/filled"][:].all():
            raise RuntimeError(f"{partial}: not every image is filled")
        # changed in place: nothing in the file moves
        file.attrs.modify("digest", np.bytes_(_digest_of(file)))
        file.attrs.modify("complete", True)
    with naming_write_errors(path):
        partial.replace(followed(path))


def read_provenance(path: Path) -> dict[str, Any]:
    """The provenance of a partial or complete file. Raises InputError if it is of another program or version."""
    with _opened(path) as file, damage_named(path, _REMEDY):
        return json.loads(file.attrs["provenance"])


class Store:
    """A complete file, for reading. It keeps no open handle: `H5Images` opens one in each process."""

    def __init__(self, path: Path) -> None:
        """Read and verify everything but the tables and images.

        Raises:
            InputError: the file is missing, unreadable, damaged, of another version, or not complete.
        """
        if not path.exists() and partial_path(path).exists():
            raise InputError(f"{path}: preprocessing is not finished; run `preprocess` again to resume it")
        with _opened(path) as file, damage_named(path, _REMEDY):
            if not file.attrs["complete"]:
                raise InputError(f"{path}: not complete; run `preprocess` again")
            self.path = path
            self.image_size = int(file.attrs["image_size"])
            self.provenance: dict[str, Any] = json.loads(file.attrs["provenance"])
            self.tokenizer = read_tokenizer(file["tokenizer"].asstr()[()], path)
            self.vocabulary: list[str] = list(file["answers/vocabulary"].asstr()[:])
            self.categories = _categories(file)
            self.usable: np.ndarray = file["images/usable"][:]
            self.image_ids: np.ndarray = file["images/id"][:]
            self.checksums: np.ndarray = file["images/crc32"][:]
            self.splits = list(file["splits"])
            self._digest = file.attrs["digest"].decode()
            if self._digest != _digest_of(file):
                raise ValueError("checksum mismatch")

    def stand_ins(self, splits: Sequence[str]) -> int:
        """Count the stand-ins among the images that some splits ask about."""
        return int((~self.usable[np.unique(self._images_of(splits))]).sum())

    def identity(self, splits: Sequence[str]) -> str:
        """A digest of everything in some splits that a model learns from."""
        sources = {name: source for name, source in self.provenance["sources"].items() if name in splits}
        parts: list[Any] = [self.provenance | {"sources": sources}, self.tokenizer.to_str(), self.vocabulary]
        if self.categories:
            parts.append(self.categories)
        parts.append(hashlib.sha256(self.checksums[self._images_of(splits)].tobytes()).hexdigest())
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _images_of(self, splits: Sequence[str]) -> np.ndarray:
        """The rows of the images of all questions of some splits, one after the other."""
        with _opened(self.path) as file, damage_named(self.path, _REMEDY):
            return np.concatenate([file[f"splits/{split}/images"][:].ravel() for split in splits])

    @property
    def images_identity(self) -> str:
        """A digest of the images alone."""
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
                raise InputError(f"{self.path}: was replaced while this command ran; run it again")
            group = file[f"splits/{split}"]
            arrays = {name: group[name][:] for name in ARRAYS}
            texts = {name: list(group[name].asstr()[:]) for name in TEXTS}
            extras = {name: values[:] for name, values in group.get("extras", {}).items()}
            table = QuestionTable(**arrays, **texts, extras=extras)
            if group.attrs["digest"].decode() != _digest_of_table(table):
                raise ValueError(f"checksum mismatch in split {split!r}")
        return table


class H5Images(H5Rows):
    """The images of a store: uint8 [S, S, 3] each."""

    def __init__(self, path: Path, expected: np.ndarray | None = None) -> None:
        """`expected`: as `H5Rows`."""
        super().__init__(path, "images/pixels", _REMEDY, expected)

    @property
    def bad(self) -> np.ndarray:
        """Which of them are stand-ins, bool [N]."""
        return ~Store(self.path).usable


def _opened(path: Path) -> h5py.File:
    if not path.is_file():
        raise InputError(f"{path}: " + ("not a file" if path.exists() else "no such file; run `preprocess` to make it"))
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


def _categories(file: h5py.File) -> list[str]:
    return list(file["categories"].asstr()[:]) if "categories" in file else []


def _digest_of(file: h5py.File) -> str:
    """SHA-256 of all that a model learns from; pixels enter by their checksums, tables by their digests."""
    digest = hashlib.sha256()
    digest.update(f"{file.attrs['image_size']} {file.attrs['provenance']}".encode())
    digest.update(json.dumps([file["tokenizer"].asstr()[()], *file["answers/vocabulary"].asstr()[:]]).encode())
    if categories := _categories(file):
        digest.update(json.dumps(categories).encode())
    for name in ("crc32", "usable", "filled"):
        digest.update(file[f"images/{name}"][:].tobytes())
    for name in sorted(file["splits"]):
        digest.update(name.encode() + file[f"splits/{name}"].attrs["digest"])
    return digest.hexdigest()


def _digest_of_table(table: QuestionTable) -> str:
    digest = hashlib.sha256()
    arrays = {name: getattr(table, name) for name in ARRAYS} | dict(sorted(table.extras.items()))
    for name, values in arrays.items():
        array = np.ascontiguousarray(values)
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    for name in TEXTS:
        digest.update(json.dumps([name, *getattr(table, name)]).encode())
    return digest.hexdigest()
