"""GloVe vectors (Pennington et al. 2014) of the known words only, from a text or zip file."""

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqa.io.errors import InputError
from vqa.io.progress import progress

_LONGEST_LINE = 2**20  # bytes


def read_glove(file: Path, vocabulary: Mapping[str, int], size: int) -> tuple[np.ndarray, int]:
    """The vectors of a vocabulary's words; a word without one keeps zeros.

    Args:
        file: lines of a word and `size` numbers, a zip file that holds one such file, or `FILE.zip/MEMBER`, one of
            the files that a zip file holds.
        vocabulary: id of each word.
        size: length of the vectors E.

    Returns:
        float32 [V, E], and how many words have a vector.

    Raises:
        InputError: the file is missing, of another size, malformed (with the line), knows none of the words, or is a
            zip file of several.
    """
    vectors = np.zeros((len(vocabulary), size), np.float32)
    found = np.zeros(len(vocabulary), bool)  # a word may occur twice; its last vector counts
    with _opened(file) as stream:
        lines = iter(lambda: stream.readline(_LONGEST_LINE), b"")  # a file without line breaks stays out of memory
        for number, line in enumerate(progress(lines, None, file.name), 1):
            # the 840B file holds words with blanks, so the numbers are counted from the right
            word, *numbers = line.rstrip().rsplit(b" ", size)
            if number == 1 and (more := _numbers_at_the_end(word)):
                raise InputError(f"{file}: its vectors are of {size + more} numbers, question.glove_size is {size}")
            row = vocabulary.get(word.decode("utf-8", "replace"))
            if row is None and number > 1:
                continue
            try:
                vector = np.array(numbers, np.float32)
            except ValueError:
                vector = np.empty(0)
            if len(vector) != size or not np.isfinite(vector).all():
                raise InputError(f"{file}: line {number}: expected a word and {size} numbers; see question.glove_size")
            if row is not None:
                vectors[row] = vector
                found[row] = True
    if not found.any():
        raise InputError(f"{file}: holds none of the {len(vocabulary)} known words")
    return vectors, int(found.sum())


def _numbers_at_the_end(word: bytes) -> int:
    """How many of the pieces after a word's first are numbers, counted from the end."""
    count = 0
    for piece in reversed(word.split(b" ")[1:]):
        try:
            float(piece)
        except ValueError:
            break
        count += 1
    return count


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    archive_file = next((path for path in (file, *file.parents) if path.suffix == ".zip" and path.is_file()), None)
    if archive_file is None and not file.is_file():
        raise InputError(f"{file}: no such file (question.glove)")
    try:
        if archive_file is None:
            with file.open("rb") as stream:
                yield stream
            return
        with (
            zipfile.ZipFile(archive_file) as archive,
            archive.open(_member(archive, archive_file, file)) as stream,
        ):
            yield io.BufferedReader(stream)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{file}: not a zip file, or damaged ({error!s:.60})") from None
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        # damaged within, encrypted, or packed in a way that Python does not know
        raise InputError(f"{file}: cannot be read ({error!s:.100})") from None


def _member(archive: zipfile.ZipFile, archive_file: Path, asked: Path) -> str:
    """The file of an archive that is asked for, or its only text file."""
    names = archive.namelist()
    texts = [name for name in names if name.endswith(".txt") and not name.startswith("__MACOSX/")]  # a Mac's own
    if asked != archive_file:
        texts = [name for name in names if name == asked.relative_to(archive_file).as_posix()][:1]
    if len(texts) == 1:
        return texts[0]
    listed = ", ".join(names[:9]) + (", …" if len(names) > 9 else "")
    raise InputError(f"{asked}: name one file of the archive, question.glove={archive_file}/NAME; it holds {listed}")
