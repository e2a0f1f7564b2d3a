"""The object that a GuessWhat?! question is about: its box, the vector of its position, its crop; needs no torch."""

import math

import numpy as np

ANSWERS = ("yes", "no", "n/a")  # in the order of the classes; the files say "Yes", "No" and "N/A"
Box = tuple[float, float, float, float]  # x, y, width, height in pixels, from the top left, as COCO has it
ROUNDING = 1.0  # pixels by which a box may exceed its image


def check_box(box: Box, width: int, height: int) -> None:
    """Raise ValueError if a box is empty, not finite, or not within its image up to ROUNDING."""
    x, y, w, h = box
    said = ", ".join(f"{number:g}" for number in box)
    if not all(map(math.isfinite, box)):
        raise ValueError(f"box [{said}] is not finite")
    if w <= 0 or h <= 0:
        raise ValueError(f"box [{said}] is empty: it needs a width and a height (x, y, width, height)")
    within = -ROUNDING <= x < width and x + w <= width + ROUNDING and x + w > 0
    if not (within and -ROUNDING <= y < height and y + h <= height + ROUNDING and y + h > 0):
        raise ValueError(f"box [{said}] is not within its image of {width} x {height} pixels")


def spatial_features(box: Box, width: int, height: int) -> np.ndarray:
    """Return [x_min, y_min, x_max, y_max, x_centre, y_centre, w, h] of a box, float32 [8] (the paper's section 4).

    The image reaches from -1 to 1 and its centre is 0, so that w and h are between 0 and 2. As in the authors' code y
    points upwards: y_min is the lower edge of the box.
    """
    x, y, w, h = box
    lower = height - y - h
    across = 2 * np.array([x, x + w, x + w / 2, w]) / width - [1, 1, 1, 0]
    upwards = 2 * np.array([lower, lower + h, lower + h / 2, h]) / height - [1, 1, 1, 0]
    return np.stack([across, upwards], axis=1).astype(np.float32).ravel()


def crop_region(box: Box, width: int, height: int, factor: float) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a box enlarged by `factor` about its centre and cut at the image's border.

    Whole pixels, the nearest, at least one each way. The authors' code enlarges from the image's lower left corner
    instead: it multiplies right and upper edge by `factor`, left and lower edge by 2 - `factor`.
    """

    def side(start: float, length: float, most: int) -> tuple[int, int]:
        centre, half = start + length / 2, factor * length / 2
        first = min(max(round(centre - half), 0), most - 1)
        return first, max(min(round(centre + half), most), first + 1)

    (left, right), (top, bottom) = side(box[0], box[2], width), side(box[1], box[3], height)
    return left, top, right, bottom
