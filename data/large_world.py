"""The large synthetic scenes: three to eight tilted objects, small and large, anywhere in the image."""

from collections.abc import Sequence

import numpy as np

from data.scenes import COLOURS, SHAPES, Scene, SceneObject, jittered

SIZES: dict[str, tuple[float, float]] = {"small": (0.048, 0.06), "large": (0.095, 0.12)}  # radii, of the image's side
_TILT = 0.35  # radians at most, to either side: a tilted square is not yet a diamond
_REACH = 1.21  # of the radius: how far the farthest corner of a shape, the square's, is from its centre
_GAP = 0.01  # the least between two objects
_TRIES = 100  # places tried for each object


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene whose objects share a few shapes and colours, two or more of each.

    If they took them from all, nearly every object would be the only one of its shape and of its colour.
    """
    number = int(rng.integers(3, 9))
    shapes, colours = _few_of(rng, SHAPES, number), _few_of(rng, tuple(COLOURS), number)
    sizes = [tuple(SIZES)[index] for index in rng.integers(len(SIZES), size=number)]
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    centres = place(rng, radii)
    return [_object(rng, *values) for values in zip(shapes, colours, sizes, radii, centres, strict=True)]


def single_object(rng: np.random.Generator, shape: str) -> SceneObject:
    """Sample an object of that shape and any colour and size, anywhere in the image."""
    size = rng.choice(tuple(SIZES)).item()
    radius = rng.uniform(*SIZES[size])
    return _object(rng, shape, rng.choice(tuple(COLOURS)).item(), size, radius, _anywhere(rng, radius))


def place(rng: np.random.Generator, radii: Sequence[float], tries: int = _TRIES) -> list[tuple[float, float]]:
    """Sample the centres (x, y) of up to nine objects that touch neither each other nor the image's border.

    The largest object is placed first, each at the first of `tries` random places that is free; if none is, all objects
    go into the cells of a 3 x 3 grid, which are large enough for any of them.
    """
    centres: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(radii)), key=lambda index: -radii[index]):
        places = (_anywhere(rng, radii[index]) for _ in range(tries))
        free = (place for place in places if all(apart(place, radii[index], centres[k], radii[k]) for k in centres))
        found = next(free, None)
        if found is None:
            cells = rng.permutation(9)[: len(radii)].tolist()
            return [((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3) for cell in cells]
        centres[index] = found
    return [centres[index] for index in range(len(radii))]


def apart(one: tuple[float, float], radius: float, other: tuple[float, float], other_radius: float) -> bool:
    """Return whether objects of these centres and radii leave a gap between them at any tilt."""
    return np.hypot(one[0] - other[0], one[1] - other[1]) >= _REACH * (radius + other_radius) + _GAP


def _anywhere(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    border = _REACH * radius
    x, y = rng.uniform(border, 1 - border, size=2).tolist()
    return x, y


def _few_of(rng: np.random.Generator, values: Sequence[str], number: int) -> list[str]:
    """Draw `number` times from a random subset of two or more of the values."""
    kinds = rng.permutation(len(values))[: rng.integers(2, len(values) + 1)]
    return [values[index] for index in rng.choice(kinds, size=number).tolist()]


def _object(
    rng: np.random.Generator, shape: str, colour: str, size: str, radius: float, centre: tuple[float, float]
) -> SceneObject:
    return SceneObject(shape, colour, centre, radius, jittered(rng, colour), size, rng.uniform(-_TILT, _TILT))
