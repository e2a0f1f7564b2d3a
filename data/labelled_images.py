"""Images labelled by the folders that they lie in, in a folder or in a zip file, which is read without unpacking it."""

import csv
import hashlib
import io
import os
import posixpath
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image

from vqa.io.errors import InputError, first_line
from vqa.io.files import read_bytes
from vqa.io.images import FORMATS, decode_image
from vqa.io.progress import progress

GROUPS = "classes.csv"  # in the folder of the class folders, or above it
_MOST_BYTES = 2**28  # of an image file
_IMAGES_A_TASK = 16  # of a thread: a task takes 2 KB, one for each image of ImageNet would take gigabytes
_NAMED = 5  # bad images that an error names


class LabelledImages:
    """The images below a folder, or in a zip file; the class of each is the name of the folder that it lies in.

    The images below a folder `val` are held out; without one, a tenth of each class is, chosen by a checksum of their
    names. Where there are folders `train`, no others are trained on. A table `classes.csv` with the columns
    `class` and `group` assigns a group to every class. Files without an image ending, and hidden ones, are skipped.

    Attributes:
        names: of the images, the held-out ones last.
        training: number of images that are not held out.
        classes: their names in alphabetical order.
        groups: the group of each class; None without a table.
        labels: int64 [N], indices of the images' classes.
        digest: of names, sizes, classes and groups.

    Raises:
        InputError: the source is neither folder nor zip file, there are fewer than two classes, a class has no image to
            train on, nothing is held out, or the table lacks a class.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self._sizes, self._read = _files_in(source)
        endings = tuple(end for end, form in Image.registered_extensions().items() if form in FORMATS)
        class_of = {
            name: name.split("/")[-2]
            for name in sorted(self._sizes)
            if "/" in name and name.lower().endswith(endings) and not f"/{name}".count("/.") and "__MACOSX" not in name
        }
        parts = {tuple(name.split("/")[-3:-1]) for name in class_of}
        if len(inside := sorted(part for part in parts if part[-1] in ("train", "val") and len(part) == 2)) > 2:
            raise InputError(
                f"{source}: images lie in {'/'.join(inside[0])}; put train and val outside, as train/CLASS"
            )
        training, held_out = (
            [name for name in class_of if folder in name.split("/")[:-2]] for folder in ("train", "val")
        )
        held_out = held_out or _tenth_of_each_class({name: class_of[name] for name in training or class_of})
        apart = set(held_out)
        training = [name for name in training or class_of if name not in apart]
        self.names, self.training = [*training, *held_out], len(training)
        self.classes = sorted({class_of[name] for name in training})
        if len(self.classes) < 2 or not held_out:
            raise InputError(
                f"{source}: found {len(self.classes)} classes and {len(self.names)} images ({', '.join(FORMATS)}); "
                "needs two folders or more, one per class, with two images or more each"
            )
        if untrained := {class_of[name] for name in held_out} - set(self.classes):
            raise InputError(f"{source}: class {min(untrained)!r} has images below val but none to train on")
        self.groups = self._read_groups()
        index = {name: number for number, name in enumerate(self.classes)}
        self.labels = np.array([index[class_of[name]] for name in self.names], np.int64)
        said = [(name, self._sizes[name]) for name in self.names], self.training, self.classes, self.groups
        self.digest = hashlib.sha256(ascii(said).encode()).hexdigest()

    def decode_into(self, pixels: np.ndarray) -> np.ndarray:
        """Decode all images into uint8 [N, S, S, 3], each resized to S x S; return `labels`.

        Raises:
            InputError: some cannot be read; it names the first few.
        """

        def decode(row: int) -> str | None:
            try:
                pixels[row] = self.decode(self.names[row], pixels.shape[1])
            except InputError as error:
                return str(error)
            return None

        def decode_some(start: int) -> list[str | None]:
            return [decode(row) for row in range(start, min(start + _IMAGES_A_TASK, len(pixels)))]

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            try:
                done = chain.from_iterable(pool.map(decode_some, range(0, len(pixels), _IMAGES_A_TASK)))
                reasons = list(progress(done, len(pixels), "images"))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        bad = {name: reason for name, reason in zip(self.names, reasons, strict=True) if reason is not None}
        if bad:
            first, *others = bad
            named = ", ".join(others[: _NAMED - 1]) + (", …" if len(others) >= _NAMED else "")
            more = f"; {len(others)} more cannot be read: {named}" if others else ""
            raise InputError(f"{bad[first]}{more}; repair or remove them")
        return self.labels

    def decode(self, name: str, size: int) -> np.ndarray:
        """Decode one image, uint8 [S, S, 3]. Raises InputError if it cannot be read."""
        file = self._source / name
        if self._sizes[name] > _MOST_BYTES:
            raise InputError(f"{file}: an image file must not be larger than {_MOST_BYTES >> 20} MiB")
        content = self._read(name)
        try:
            return decode_image(content, size)
        except InputError as error:
            raise InputError(f"{file}: {str(error).removeprefix('image: ')}") from None

    def _read_groups(self) -> list[str] | None:
        tables = [name for name in self._sizes if name.split("/")[-1] == GROUPS]
        if not tables:
            return None
        name = min(tables, key=len)
        try:
            rows = list(csv.DictReader(io.StringIO(self._read(name).decode("utf-8-sig")), strict=True))
            group_of = {row["class"]: row["group"] for row in rows}
        except (UnicodeDecodeError, csv.Error, KeyError):
            raise InputError(f"{self._source / name}: must be a UTF-8 table with the columns class and group") from None
        if missing := [one for one in self.classes if not group_of.get(one)]:
            raise InputError(f"{self._source / name}: has no group for class {missing[0]!r}")
        return [group_of[one] for one in self.classes]


def _files_in(source: Path) -> tuple[dict[str, int], Callable[[str], bytes]]:
    """The sizes of all files by name, and a function that reads one by its name."""
    if source.is_dir():
        # also links whose target is missing: reading them fails and names them
        below = (path for path in _below(source) if path.is_file() or not path.exists())
        files = {path.relative_to(source).as_posix(): path for path in below}
        sizes = {name: path.stat().st_size if path.exists() else 0 for name, path in files.items()}
        return sizes, lambda name: read_bytes(files[name])
    if not source.is_file() or not zipfile.is_zipfile(source):
        raise InputError(f"{source}: {'neither a folder nor a zip file' if source.exists() else 'no such file'}")
    try:
        archive = zipfile.ZipFile(source)
    except Exception as error:  # the reader raises errors of several kinds on a damaged file
        raise InputError(f"{source}: cannot be read as a zip file ({first_line(error):.100})") from None

    def read(name: str) -> bytes:
        try:
            return archive.read(entries[name])
        except Exception as error:  # damaged, encrypted, an unknown compression
            raise InputError(f"{source / name}: cannot be read from the zip file ({first_line(error):.100})") from None

    # some programs write ./CLASS/NAME or CLASS\\NAME
    entries = {posixpath.normpath(e.filename.replace("\\", "/")): e for e in archive.infolist() if not e.is_dir()}
    return {name: entry.file_size for name, entry in entries.items()}, read


def _below(source: Path) -> Iterator[Path]:
    """Yield the files below a folder; links to other folders are followed. Raises OSError if a folder is unreadable."""

    def refuse(error: OSError) -> NoReturn:
        raise error

    for name, inner, files in os.walk(source, onerror=refuse, followlinks=True):
        folder, here = Path(name), Path(name).resolve()
        # a link to a folder around it would be followed without end
        inner[:] = [one for one in inner if not here.is_relative_to((folder / one).resolve())]
        yield from (folder / file for file in files)


def _tenth_of_each_class(class_of: Mapping[str, str]) -> list[str]:
    """A tenth of the names of each class, but at least one of two; the same for the same names."""
    by_class: dict[str, list[str]] = defaultdict(list)
    for name in sorted(class_of, key=lambda name: (zlib.crc32(name.encode(errors="surrogateescape")), name)):
        by_class[class_of[name]].append(name)
    return sorted(
        name for names in by_class.values() for name in names[: max(len(names) // 10, min(len(names) - 1, 1))]
    )
