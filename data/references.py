"""Refer to an object of a scene: by its attributes, by its side of another object, by an attribute they share.

A description has as few words as single the object out, and "left of" means by a clear distance.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from data.scenes import Scene, SceneObject

CLEAR = 0.05  # of the image's side: of centres closer than that, none is left of or above the other
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis of the centre, sign
WORDS = {"size": "size", "colour": "color", "shape": "shape"}  # attributes of an object, and their names in questions


class Description(NamedTuple):
    """Attributes that single out an object; None is not named."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, item: SceneObject) -> bool:
        """Return whether an object has all attributes named."""
        return all(value is None or value == getattr(item, name) for name, value in zip(WORDS, self, strict=True))

    def __str__(self) -> str:
        return " ".join(value for value in (self.size, self.colour, self.shape or "object") if value)


def describe(item: SceneObject, among: Scene, without: Sequence[str] = ()) -> list[Description]:
    """Return the shortest descriptions that fit this object alone; none of them names the attributes `without`."""
    names = [name for name in WORDS if name not in without]
    found: dict[frozenset[str], Description] = {}
    for named in (frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count)):
        description = Description(**{name: getattr(item, name) for name in named})
        if not any(shorter <= named for shorter in found) and sum(map(description.fits, among)) == 1:
            found[named] = description
    return list(found.values())


def on_side(items: Scene, anchor: SceneObject, direction: str) -> list[SceneObject] | None:
    """Return the objects that lie in a direction from another; None if it is not clear of every object."""
    axis, sign = _DIRECTIONS[direction]
    gaps = [sign * (item.centre[axis] - anchor.centre[axis]) for item in items]
    if any(abs(gap) < CLEAR for item, gap in zip(items, gaps, strict=True) if item is not anchor):
        return None
    return [item for item, gap in zip(items, gaps, strict=True) if gap > 0]


def beside(items: Scene) -> Iterator[tuple[SceneObject, str, list[SceneObject]]]:
    """Yield each object with each direction and the objects there, where it is clear of all of them."""
    for anchor in items:
        for direction in _DIRECTIONS:
            side = on_side(items, anchor, direction)
            if side is not None:
                yield anchor, direction, side


def others_like(items: Scene, anchor: SceneObject, attribute: str) -> list[SceneObject]:
    """Return the other objects that share an attribute with one."""
    return [item for item in items if item is not anchor and getattr(item, attribute) == getattr(anchor, attribute)]
