"""One policy for images that are missing or unreadable, in `preprocess` and in evaluation from raw files.

All of them are listed together. They end the command, or `data.skip_bad_images` has a stand-in take the place of each.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from vqa.io.errors import InputError
from vqa.io.images import IMAGENET_MEAN

_LISTED = 20  # bad images said one by one


def stand_in(size: int) -> np.ndarray:
    """An image of the mean colour, uint8 [S, S, 3]: what takes the place of a bad image of `size` S."""
    return np.full((size, size, 3), np.round(255 * np.array(IMAGENET_MEAN)), np.uint8)


def check_any_exists(files: Iterable[Path], split: str) -> None:
    """Refuses a split of which not one image exists: its pattern must be wrong. Raises InputError."""
    first = None
    for file in files:
        if file.exists():
            return
        first = first or file
    if first is not None:
        raise InputError(
            f"{first}: no such file, nor any other image of split {split!r}; see data.splits.{split}.images"
        )


def settle_bad_images(bad: Sequence[tuple[int, str]], skip: bool) -> None:
    """Lists bad images, each an id and what is wrong.

    Raises:
        InputError: there are some, and `skip` is False.
    """
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
            f"{len(bad)} image(s) missing or unreadable, by id: {listed}; mend them, or go on without them with "
            "data.skip_bad_images=true"
        )
