"""The large synthetic scenes: three to eight tilted objects of two sizes, and questions about up to three objects.

An object is described in as few words as single it out; "left of" means by a clear distance. A question does not name
the attribute it asks for, and names a relation only where it is needed to single an object out; the answers to each
wording are spread, so that little can be guessed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np

from data.scenes.asking import Candidates, Kind, SceneQuestion, existence, mixtures, pair_kinds, plural, with_article
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import COLOURS, SHAPES, Scene, SceneObject, jittered

SIZES: dict[str, tuple[float, float]] = {"small": (0.048, 0.06), "large": (0.095, 0.12)}  # radii, of the image's side
_TILT = 0.35  # radians at most, to either side: a tilted square is not yet a diamond
_REACH = 1.21  # of the radius: how far the farthest corner of a shape, the square's, is from its centre
_GAP = 0.01  # the least between two objects
_TRIES = 100  # places tried for each object
CLEAR = 0.05  # of the image's side: of centres closer than that, none is left of or above the other
_DIRECTIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis of the centre, sign
WORDS = {"size": "size", "colour": "color", "shape": "shape"}  # attributes of an object, and their names in questions
# Weights of counts that spread the answers evenly up to four: of a colour or shape, of these and a size, on one side of
# an object, and like an object.
_COUNT_WEIGHTS = (
    (1.0, 1.0, 1.2, 2.7, 11.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.4, 7.0, 25.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0),
    (1.2, 1.3, 2.9, 12.0, 25.0, 25.0, 25.0, 25.0),
)


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


def place(rng: np.random.Generator, radii: Sequence[float]) -> list[tuple[float, float]]:
    """Sample the centres (x, y) of up to nine objects that touch neither each other nor the image's border.

    The largest object is placed first, each at the first of _TRIES random places that is free; if none is, all objects
    go into the cells of a 3 x 3 grid, which are large enough for any of them.
    """
    centres: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(radii)), key=lambda index: -radii[index]):
        places = (_anywhere(rng, radii[index]) for _ in range(_TRIES))
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


class Description(NamedTuple):
    """Attributes that single out an object; None is not named."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None

    def fits(self, item: SceneObject) -> bool:
        """Return whether an object has all attributes named."""
        return (
            self.size in (None, item.size) and self.colour in (None, item.colour) and self.shape in (None, item.shape)
        )

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


def _asked_for(attribute: str, items: Scene) -> Candidates:
    """Ask for an attribute of one object: described alone, beside another one, or as the only other one like another.

    A question for a size names none: "the ring left of the small ring" can only be large.
    """
    alone = {str(one): getattr(item, attribute) for item in items for one in describe(item, items, [attribute])}
    near = {
        f"{one} {direction} the {other}": getattr(item, attribute)
        for anchor, direction, side in beside(items)
        for item in side
        for one in describe(item, side, [attribute])
        if sum(map(one.fits, items)) > 1
        for other in describe(anchor, items, ["size"] if attribute == "size" else [])
    }
    like = {
        f"other object of the same {WORDS[shared]} as the {one}": getattr(others[0], attribute)
        for shared in WORDS
        if shared != attribute
        for anchor in items
        if len(others := others_like(items, anchor, shared)) == 1
        for one in describe(anchor, items, [shared, attribute])
    }
    needed = len(SIZES) if attribute == "size" else 1
    return [candidate for answers in (alone, near, like) for candidate in _even(answers, needed)]


def _even(answers: dict[str, str], needed: int) -> Candidates:
    """Make all answers equally likely; return nothing where there are fewer than `needed` of them."""
    number = Counter(answers.values())
    if len(number) < needed:
        return []
    return [(subject, answer, 1 / len(number) / number[answer]) for subject, answer in answers.items()]


def _counts(items: Scene) -> Candidates:
    """Count the objects of a colour or shape, of these and a size, on one side of an object, and like an object."""
    kinds = [Description(colour=colour) for colour in COLOURS] + [Description(shape=shape) for shape in SHAPES]
    sized = [kind._replace(size=size) for size in SIZES for kind in kinds]
    of_kind, of_size = (
        {f"{plural(str(one))} are there": sum(map(one.fits, items)) for one in some} for some in (kinds, sized)
    )
    near = {
        f"objects are {direction} the {one}": len(side)
        for anchor, direction, side in beside(items)
        for one in describe(anchor, items)
    }
    like = {
        f"other objects are the same {WORDS[shared]} as the {one}": len(others_like(items, anchor, shared))
        for shared in ("colour", "shape")
        for anchor in items
        for one in describe(anchor, items, [shared])
    }
    candidates = []
    for weights, numbers in zip(_COUNT_WEIGHTS, (of_kind, of_size, near, like), strict=True):
        alike = Counter(numbers.values())
        candidates += [(subject, str(number), weights[number] / alike[number]) for subject, number in numbers.items()]
    return candidates


def _existence(items: Scene) -> Candidates:
    return [*_pairs(items), *_triples(items), *_pairs_beside(items), *_another_like(items)]


def _pairs(items: Scene) -> Candidates:
    """Is there an object of a colour and a shape?"""
    kinds = pair_kinds([item.pair for item in items], SHAPES, COLOURS)
    return existence(*([with_article(colour, shape) for shape, colour in kind] for kind in kinds))


def _triples(items: Scene) -> Candidates:
    """Is there an object of a size, a colour and a shape? An absent one differs from an object in one attribute, which
    another object has.
    """
    there = {Description(item.size, item.colour, item.shape) for item in items}
    changed = (
        {one._replace(**{name: getattr(item, name)}) for one in there for item in items} - there for name in WORDS
    )
    return existence(*([with_article(*one) for one in sorted(kind)] for kind in (there, *changed)))


def _pairs_beside(items: Scene) -> Candidates:
    """Is there an object of a colour and a shape beside another one? An absent one is elsewhere, or a mixture."""
    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])  # there, elsewhere, mixtures
    everywhere = {item.pair for item in items}
    for anchor, direction, side in beside(items):
        pairs = [item.pair for item in side]
        others = {item.pair for item in items if item is not anchor}
        ones = describe(anchor, items)
        for kind, found in zip(kinds, (set(pairs), others - set(pairs), mixtures(pairs) - everywhere), strict=True):
            kind += [
                f"{with_article(colour, shape)} {direction} the {one}"
                for shape, colour in sorted(found)
                for one in ones
            ]
    return existence(*kinds)


def _another_like(items: Scene) -> Candidates:
    """Is there another object that shares an attribute with one?"""
    candidates = []
    for shared, word in WORDS.items():
        there, absent = [], []
        for anchor in items:
            subjects = [f"another object of the same {word} as the {one}" for one in describe(anchor, items, [shared])]
            (there if others_like(items, anchor, shared) else absent).extend(subjects)
        candidates += existence(there, absent)
    return candidates


_KINDS = (
    Kind("what color", "other", ("is the {}?",), partial(_asked_for, "colour")),
    Kind("what shape", "other", ("is the {}?",), partial(_asked_for, "shape")),
    Kind("what size", "other", ("is the {}?",), partial(_asked_for, "size")),
    Kind("how many", "number", ("{}?",), _counts),
    Kind("is there", "yes/no", ("{}?",), _existence),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Ask `count` (at most MAX_QUESTIONS) different questions; the counts of one attribute can always be asked."""
    return ask_in_rounds(_KINDS, scene, rng, count)
