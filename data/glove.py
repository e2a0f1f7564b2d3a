"""GloVe vectors (Pennington et al. 2014) of the known words only, from a text or zip file."""

import io
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.errors import InputError
from data.progress import progress

_LONGEST_LINE = 2**20  # bytes


def read_glove(file: Path, vocabulary: Mapping[str, int], size: int) -> tuple[np.ndarray, int]:
    """The vectors of a vocabulary's words; a word without one keeps zeros.

    Args:
        file: lines of a word and `size` numbers, or a zip file that holds one such file.
        vocabulary: id of each word.
        size: length of the vectors E.

    Returns:
        float32 [V, E], and how many words have a vector.

    Raises:
        InputError: the file is missing, of another size, malformed (with the line), or knows none of the words.
    """
    vectors = np.zeros((len(vocabulary), size), np.float32)
    found = 0
    with _opened(file) as stream:
        lines = iter(lambda: stream.readline(_LONGEST_LINE), b"")  # a file without line breaks stays out of memory
        for number, line in enumerate(progress(lines, None, file.name), 1):
            # the 840B file holds words with blanks, so the numbers are counted from the right
            word, *numbers = line.rstrip().rsplit(b" ", size)
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
                found += 1
    if not found:
        raise InputError(f"{file}: holds none of the {len(vocabulary)} known words")
    return vectors, found


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if not file.is_file():
        raise InputError(f"{file}: no such file (question.glove)")
    try:
        if file.suffix != ".zip":
            with file.open("rb") as stream:
                yield stream
            return
        with zipfile.ZipFile(file) as archive:
            members = [name for name in archive.namelist() if name.endswith(".txt")]
            if len(members) != 1:
                raise InputError(f"{file}: must hold one .txt file, holds {len(members)}")
            with archive.open(members[0]) as stream:
                yield io.BufferedReader(stream)
    except InputError:
        raise
    except zipfile.BadZipFile as error:
        raise InputError(f"{file}: not a zip file, or damaged ({error!s:.60})") from None
    except (OSError, EOFError, ValueError, NotImplementedError, RuntimeError, zlib.error) as error:
        # damaged within, encrypted, or packed in a way that Python does not know
        raise InputError(f"{file}: cannot be read ({error!s:.100})") from None
