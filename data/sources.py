"""A dataset as `preprocess` and evaluation read it: its questions, and the images that each of them needs."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from data.question_table import QuestionTable, question_table
from data.vqa_files import Question, SplitFiles, read_questions, remarks
from vqa.io.errors import InputError
from vqa.io.images import read_image, resize
from vqa.text.answers import answer_vocabulary


class Crop(NamedTuple):
    """A part of an image, in pixels; the image must be of this width and height."""

    left: int
    top: int
    right: int
    bottom: int
    width: int
    height: int


class NeededImage(NamedTuple):
    """An image that is asked about: a file, or a part of it."""

    file: str
    id: int  # its name in messages
    crop: Crop | None = None


class Source:
    """A dataset: VQA in its official format, about whole images; `data.guesswhat` has another.

    Attributes:
        settings: what determines the content of an h5 file, except the size of images and the words.
        categories: of objects, in the order of their numbers, as far as files are read.
    """

    categories: Sequence[str] = ()

    def __init__(self, answers: int) -> None:
        """`answers` is the number of answer classes."""
        self.settings: dict[str, Any] = {"answers": answers}

    def has_answers(self, files: SplitFiles) -> bool:
        """Whether the questions of a split have answers."""
        return files.annotations is not None

    def read(self, files: SplitFiles) -> Sequence[Question]:
        """The questions of a split. Raises InputError if a file is malformed."""
        return read_questions(files.questions, files.annotations)

    def images(self, files: SplitFiles, asked: Sequence[Question]) -> list[tuple[NeededImage, ...]]:
        """The image, or the V images, of each question of a split."""
        ids = dict.fromkeys(question.image_id for question in asked)
        needed = {image_id: (NeededImage(str(files.image(image_id)), image_id),) for image_id in ids}
        return [needed[question.image_id] for question in asked]

    def vocabulary(self, given: Iterable[str]) -> list[str]:
        """The answer classes, made of all given answers."""
        return answer_vocabulary(given, self.settings["answers"])

    def remarks(self, asked: Sequence[Question]) -> Iterable[str]:
        """Remarks on the questions for the user."""
        return remarks(asked)

    def table(
        self, asked: Sequence[Question], rows: np.ndarray, tokenizer: Tokenizer, vocabulary: Sequence[str]
    ) -> QuestionTable:
        """The table of questions whose images have these rows, int64 [N] or [N, V]."""
        return question_table(asked, rows, tokenizer, vocabulary)


def number_images(needed: Sequence[tuple[NeededImage, ...]], rows: dict[NeededImage, int]) -> np.ndarray:
    """Give a row to each image of a split that has none in `rows`, those of one file one after the other.

    Returns:
        The rows of each question's images, int64 [N], or [N, V] where a question has several.
    """
    new = [image for image in dict.fromkeys(chain.from_iterable(needed)) if image not in rows]
    place = {file: place for place, file in enumerate(dict.fromkeys(image.file for image in new))}
    for image in sorted(new, key=lambda image: place[image.file]):
        rows[image] = len(rows)
    numbered = np.array([[rows[image] for image in images] for images in needed], np.int64)
    return numbered[:, 0] if numbered.shape[1] == 1 else numbered


def defect_of(image: NeededImage, size: int) -> str | None:
    """Why an image is missing or cannot be read; None if it can."""
    try:
        decode(Path(image.file), [image.crop], size)
    except InputError as error:
        return str(error)
    return None


def decode(file: Path, crops: Sequence[Crop | None], size: int) -> list[np.ndarray]:
    """Read an image file once and resize these parts of it (None: the whole image), each to uint8 [S, S, 3].

    Raises:
        InputError: as `read_image`, or the image has not the size that a crop needs.
    """
    image = read_image(file)
    for crop in filter(None, crops):
        if image.size != crop[4:]:
            found, said = (f"{width} x {height}" for width, height in (image.size, crop[4:]))
            raise InputError(f"{file}: an image of {found} pixels, where the boxes of its objects need {said}")
    return [resize(image if crop is None else image.crop(crop[:4]), size) for crop in crops]
