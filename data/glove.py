"""Read the GloVe vectors (Pennington et al. 2014) of a vocabulary from a text or zip file."""

import io
import zipfile
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from vqa.io.errors import InputError
from vqa.io.progress import progress

_LONGEST_LINE = 2**20  # bytes


def read_glove(file: Path, vocabulary: Mapping[str, int], size: int) -> tuple[np.ndarray, int]:
    """Read the vectors of a vocabulary's words; a word without one gets zeros.

    Args:
        file: lines of a word and `size` numbers, after word2vec's header or without one; a zip file of one such file,
            or `FILE.zip/NAME` for one of several.
        vocabulary: id of each word.
        size: length of the vectors E.

    Returns:
        float32 [V, E], and the number of words that have a vector.

    Raises:
        InputError: the file is missing, of another size, malformed (with the line), holds none of the words, or is a
            zip file of several files.
    """
    vectors = np.zeros((len(vocabulary), size), np.float32)
    found = np.zeros(len(vocabulary), bool)  # a word may occur twice; its last vector counts
    with _opened(file) as stream:
        lines = iter(lambda: stream.readline(_LONGEST_LINE), b"")  # bounded: the file may hold no line break
        for number, line in enumerate(progress(lines, None, file.name), 1):
            # from the right, because the 840B file holds words with blanks
            word, *numbers = line.removeprefix(BOM_UTF8 if number == 1 else b"").rstrip().rsplit(b" ", size)
            if number == 1 and len(numbers) == 1 < size:  # word2vec's header: how many words, how many numbers
                continue
            more = word.split(b" ")[1:]
            if number == 1 and len(_vector(more)):
                raise InputError(f"{file}: its vectors have {size + len(more)} numbers, question.glove_size is {size}")
            row = vocabulary.get(word.decode("utf-8", "replace"))
            if row is None and number > 1:
                continue
            vector = _vector(numbers)
            if len(vector) != size or not np.isfinite(vector).all():
                raise InputError(f"{file}: line {number}: expected a word and {size} numbers; see question.glove_size")
            if row is not None:
                vectors[row] = vector
                found[row] = True
    if not found.any():
        raise InputError(f"{file}: holds none of the {len(vocabulary)} known words")
    return vectors, int(found.sum())


def _vector(numbers: Sequence[bytes]) -> np.ndarray:
    """Parse numbers; the vector is empty if one of them is not a number."""
    try:
        return np.array(numbers, np.float32)
    except ValueError:
        return np.empty(0)


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
        with zipfile.ZipFile(archive_file) as archive, archive.open(_member(archive, archive_file, file)) as stream:
            yield io.BufferedReader(stream)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{file}: not a zip file, or damaged ({error!s:.60})") from None
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        # a damaged or encrypted member, or an unknown compression
        raise InputError(f"{file}: cannot be read ({error!s:.100})") from None


def _member(archive: zipfile.ZipFile, archive_file: Path, asked: Path) -> str:
    """Return the name of the file that is asked for, or of the only text file of an archive."""
    names = archive.namelist()
    texts = [name for name in names if name.endswith(".txt") and not name.startswith("__MACOSX/")]  # a Mac's own
    if asked != archive_file:
        texts = [name for name in names if name == asked.relative_to(archive_file).as_posix()][:1]
    if len(texts) == 1:
        return texts[0]
    listed = ", ".join(names[:9]) + (", …" if len(names) > 9 else "")
    raise InputError(f"{asked}: name one file of the archive, question.glove={archive_file}/NAME; it holds {listed}")
