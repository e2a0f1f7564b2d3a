"""How an object of a scene is referred to: by what it is and has, beside another one, as like another one.

An object is described by as few words as pick it out, and an object left of another is so by a clear distance.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import NamedTuple

from data.scenes import SceneObject

CLEAR = 0.05  # of the image's side: centres closer than that are not said to be left of or above one another
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis of the centre, sign
WORDS = {"size": "size", "colour": "color", "shape": "shape"}  # attributes of an object, as they are asked for

Objects = Sequence[SceneObject]


class Description(NamedTuple):
    """What is said of an object; None is not said."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, item: SceneObject) -> bool:
        """Whether all of it is true of an object."""
        return all(value is None or value == getattr(item, name) for name, value in zip(WORDS, self, strict=True))

    def __str__(self) -> str:
        return " ".join(value for value in (self.size, self.colour, self.shape or "object") if value)


def describe(item: SceneObject, among: Objects, without: Sequence[str] = ()) -> list[Description]:
    """The shortest descriptions that fit this object alone; none of them says the attributes `without`."""
    names = [name for name in WORDS if name not in without]
    found: dict[frozenset[str], Description] = {}
    for said in (frozenset(some) for count in range(len(names) + 1) for some in combinations(names, count)):
        description = Description(**{name: getattr(item, name) for name in said})
        if not any(shorter <= said for shorter in found) and sum(map(description.fits, among)) == 1:
            found[said] = description
    return list(found.values())


def on_side(items: Objects, anchor: SceneObject, direction: str) -> list[SceneObject] | None:
    """The objects that lie in a direction from another; None if that is not clear of every object."""
    axis, sign = _DIRECTIONS[direction]
    gaps = [sign * (item.centre[axis] - anchor.centre[axis]) for item in items]
    if any(abs(gap) < CLEAR for item, gap in zip(items, gaps, strict=True) if item is not anchor):
        return None
    return [item for item, gap in zip(items, gaps, strict=True) if gap > 0]


def beside(items: Objects) -> Iterator[tuple[SceneObject, str, list[SceneObject]]]:
    """Each object with each direction and the objects there, where that is clear."""
    for anchor in items:
        for direction in _DIRECTIONS:
            side = on_side(items, anchor, direction)
            if side is not None:
                yield anchor, direction, side


def others_like(items: Objects, anchor: SceneObject, attribute: str) -> list[SceneObject]:
    """The other objects that share an attribute with one."""
    return [item for item in items if item is not anchor and getattr(item, attribute) == getattr(anchor, attribute)]
