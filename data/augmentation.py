"""Augmentation of training images: a random crop, and a flip unless question or answer contains left or right.

It depends on seed, epoch and question alone, so that a resumed run, and any number of workers, sees the same images.
"""

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from data.question_table import QuestionTable

LEAST_AREA = 0.8  # of a crop, as a share of the image
SIDES = ("left", "right")  # the beginnings of words that a flip would make wrong: "left", "leftmost", "right-hand"


@dataclass(frozen=True)
class Augmentation:
    """A random square of 80 to 100 % of an image's area, resized back, and flipped in half of the cases if allowed."""

    seed: int
    may_flip: np.ndarray  # bool [N], for each question of the table

    def augment(self, image: np.ndarray, epoch: int, row: int) -> np.ndarray:
        """Return the image of question `row` in an epoch, uint8 [S, S, 3]."""
        area, left, top, flip = np.random.default_rng([self.seed, epoch, row]).random(4)
        size = len(image)
        side = size * (LEAST_AREA + (1 - LEAST_AREA) * area) ** 0.5
        left, top = left * (size - side), top * (size - side)
        box = (left, top, min(left + side, size), min(top + side, size))
        cropped = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR, box=box))
        return cropped[:, ::-1] if self.may_flip[row] and flip < 0.5 else cropped


def augmentation(kind: str, seed: int, table: QuestionTable) -> Augmentation | None:
    """Return the augmentation `none`, `crop` or `crop_flip` of the questions of a table."""
    if kind == "none":
        return None
    may_flip = np.zeros(len(table), bool) if kind == "crop" else ~_has_side(table)
    return Augmentation(seed, may_flip)


def _has_side(table: QuestionTable) -> np.ndarray:
    """Whether a question, or one of its answers, contains left or right, bool [N]."""
    side = re.compile(rf"\b({'|'.join(SIDES)})", re.IGNORECASE)
    asked, spelt = ([side.search(text) is not None for text in texts] for texts in (table.texts, table.spellings))
    return np.array(asked) | np.array([*spelt, False])[table.given].any(1)  # the last one is NO_ANSWER's
