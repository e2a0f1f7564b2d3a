"""The model's inputs for a question about an image, or about an object in it; needs no torch."""

import difflib
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np
from PIL import Image

from vqa.io.errors import InputError
from vqa.settings.schema import Settings
from vqa.tasks.objects import Box, check_box, crop_region, spatial_features

MOST_LISTED = 20  # categories in a message


def inputs_of(
    settings: Settings, categories: Sequence[str], image: Image.Image, box: Any = None, category: str | None = None
) -> tuple[list[Image.Image], dict[str, np.ndarray]]:
    """The images of one question, in the order of its views, and the model's other arguments [1, …] by name.

    Args:
        settings: of the model.
        categories: the names of the categories of objects, in the order of their numbers.
        image: the whole image.
        box: of the object, (x, y, width, height) in pixels from the top left.
        category: of the object.

    Raises:
        InputError: the model needs a box or a category that is not given, it takes no objects, the box is malformed or
            not within the image, or the category is unknown.
    """
    needed, extras = settings.inputs, {}
    if settings.guesswhat is None:
        if box is not None or category is not None:
            superfluous = "category" if box is None else "box"
            raise InputError(f"{superfluous}: a model of the task vqa answers about the whole image; remove it")
        return [image], extras
    views = {"image": image}
    if box is not None or "crop" in needed or "spatial" in needed:
        box = _checked_box(box, image)
        views["crop"] = image.crop(crop_region(box, *image.size, settings.guesswhat.crop_factor))
        extras["spatial"] = spatial_features(box, *image.size)[None]
    if category is not None or "category" in needed:
        extras["category"] = np.array([_number_of(category, categories)])
    return [views[name] for name in settings.views], extras


def _checked_box(box: Any, image: Image.Image) -> Box:
    """The box as four numbers. Raises InputError if it is not a box within the image."""
    if box is None:
        raise InputError("box: this model needs the object's box: --box X,Y,W,H, in pixels from the top left")
    box = box.tolist() if isinstance(box, np.ndarray) else box
    if not isinstance(box, Sequence) or len(box) != 4 or not all(isinstance(one, Real) for one in box):
        raise InputError(f"box: must be four numbers (x, y, width, height), not {box!r:.60}")
    try:
        x, y, width, height = map(float, box)
        check_box((x, y, width, height), *image.size)
    except OverflowError:
        raise InputError("box: a number is too large") from None
    except ValueError as error:
        raise InputError(str(error)) from None
    return x, y, width, height


def _number_of(category: str | None, categories: Sequence[str]) -> int:
    if category in categories:
        return categories.index(category)
    near = difflib.get_close_matches(str(category).lower(), categories, 1)
    known = f"; did you mean {near[0]}?" if near and category else ""
    if not known and len(categories) <= MOST_LISTED:
        known = f"; one of {', '.join(categories)}"
    if category is None:
        raise InputError(f"category: this model needs the object's category: --category NAME{known}")
    raise InputError(
        f"category: unknown category {category!r:.60}{known or '; categories.json of the model lists them'}"
    )
