"""The policy for missing and unreadable images, in `preprocess` and in evaluation from raw files.

They are listed together and end the command; with `data.skip_bad_images` a stand-in replaces each.
"""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vqa.io.errors import InputError
from vqa.io.images import IMAGENET_MEAN

_LISTED = 20  # bad images that are printed one by one


def stand_in(size: int) -> np.ndarray:
    """An image of the mean colour, uint8 [S, S, 3], that replaces a bad image."""
    return np.full((size, size, 3), np.round(255 * np.array(IMAGENET_MEAN)), np.uint8)


def check_any_exists(files: Iterable[Path], split: str) -> None:
    """Raise InputError if no image of a split exists: its pattern must be wrong."""
    files = list(files)
    if files and not any(file.exists() for file in files):
        raise InputError(
            f"{files[0]}: no such file, nor any other image of split {split!r}; see data.splits.{split}.images"
        )


def settle_bad_images(bad: Iterable[tuple[int, str]], skip: bool) -> None:
    """Print bad images, each with its id and the reason, and once if it is given several times (for its crops).

    Raises:
        InputError: there are some, and `skip` is False.
    """
    bad = list(dict.fromkeys(bad))
    if not bad:
        return
    print(f"{len(bad)} image(s) missing or unreadable:")
    for id_, reason in bad[:_LISTED]:
        print(f"  {id_}: {reason}")
    if len(bad) > _LISTED:
        print(f"  and {len(bad) - _LISTED} more")
    if not skip:
        listed = ", ".join(str(id_) for id_, _ in bad[:5]) + (", …" if len(bad) > 5 else "")
        raise InputError(
            f"{len(bad)} image(s) missing or unreadable, by id: {listed}; repair them, or skip them with "
            "data.skip_bad_images=true"
        )
