"""The larger synthetic scenes: what they show, how an object is described, and questions about up to three objects.

What is asked of an object is not said of it, a relation to another is named only where it is needed to tell the object
from others, and each way of asking leaves little to guess: its answers are spread.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import combinations
from typing import NamedTuple

import numpy as np

from data.scenes.asking import Candidates, Kind, SceneQuestion, existence, mixtures, plural
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import COLOURS, SHAPES, Scene, SceneObject, jittered

SIZES: dict[str, tuple[float, float]] = {"small": (0.048, 0.06), "large": (0.095, 0.12)}  # radii, of the image's side
_TILT = 0.35  # at most, to either side; a square stays a square and does not become a diamond
_REACH = 1.21  # of the radius: as far as a shape's corners go, the square's
_GAP = 0.01  # between objects
_TRIES = 100  # places tried for each object


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene whose objects take shapes and colours from a few of the world's, two or more.

    With all of them to take from, nearly every object would be the only one of its shape and of its colour.
    """
    number = int(rng.integers(3, 9))
    shapes, colours = _some(rng, SHAPES, number), _some(rng, tuple(COLOURS), number)
    sizes = [tuple(SIZES)[index] for index in rng.integers(len(SIZES), size=number)]
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    centres = place(rng, radii)
    return Scene(tuple(_made(rng, *thing) for thing in zip(shapes, colours, sizes, radii, centres, strict=True)))


def single_object(rng: np.random.Generator, shape: str) -> SceneObject:
    """An object of that shape, of any colour and size, anywhere in the image."""
    size = rng.choice(tuple(SIZES)).item()
    radius = rng.uniform(*SIZES[size])
    return _made(rng, shape, rng.choice(tuple(COLOURS)).item(), size, radius, _anywhere(rng, radius))


def place(rng: np.random.Generator, radii: Sequence[float], tries: int = _TRIES) -> list[tuple[float, float]]:
    """Centres (x, y) of up to nine objects of the world's radii that do not touch each other or the image's border.

    The largest is placed first, each where one of `tries` darts finds room; if none does, all go into cells of a 3 x 3
    grid, where any nine objects have room.
    """
    centres: dict[int, tuple[float, float]] = {}
    for index in sorted(range(len(radii)), key=lambda index: -radii[index]):
        darts = (_anywhere(rng, radii[index]) for _ in range(tries))
        free = (dart for dart in darts if all(apart(dart, radii[index], centres[k], radii[k]) for k in centres))
        found = next(free, None)
        if found is None:
            cells = rng.permutation(9)[: len(radii)].tolist()
            return [((cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3) for cell in cells]
        centres[index] = found
    return [centres[index] for index in range(len(radii))]


def apart(one: tuple[float, float], radius: float, other: tuple[float, float], other_radius: float) -> bool:
    """Whether objects of these centres and radii leave a gap between them, however they are tilted."""
    return np.hypot(one[0] - other[0], one[1] - other[1]) >= _REACH * (radius + other_radius) + _GAP


def _anywhere(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    border = _REACH * radius
    x, y = rng.uniform(border, 1 - border, size=2).tolist()
    return x, y


def _some(rng: np.random.Generator, values: Sequence[str], number: int) -> list[str]:
    """`number` values out of two or more of those there are."""
    kinds = rng.permutation(len(values))[: rng.integers(2, len(values) + 1)]
    return [values[index] for index in rng.choice(kinds, size=number).tolist()]


def _made(
    rng: np.random.Generator, shape: str, colour: str, size: str, radius: float, centre: tuple[float, float]
) -> SceneObject:
    return SceneObject(shape, colour, centre, radius, jittered(rng, colour), size, rng.uniform(-_TILT, _TILT))


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


# How much a count is preferred where it occurs, chosen to spread the answers evenly up to four. A row each for counts
# of a kind, of a kind and size, beside an object, and like one.
_COUNT_WEIGHTS = (
    (1.0, 1.0, 1.2, 2.7, 11.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.4, 7.0, 25.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0),
    (1.2, 1.3, 2.9, 12.0, 25.0, 25.0, 25.0, 25.0),
)


def _asked_for(attribute: str, items: Objects) -> Candidates:
    """An attribute of an object by itself, of one beside another, and of the only other one like another.

    Where a size is asked for none is said: "the ring left of the small ring" can only be large.
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
    """Each answer as likely as the others; nothing where fewer than `needed` of them can be given."""
    number = Counter(answers.values())
    if len(number) < needed:
        return []
    return [(subject, answer, 1 / len(number) / number[answer]) for subject, answer in answers.items()]


def _counts(items: Objects) -> Candidates:
    """How many there are of a colour or shape, how many of one size of these, how many beside an object, and how many
    others are like one.
    """
    kinds = [Description(colour=colour) for colour in COLOURS] + [Description(shape=shape) for shape in SHAPES]
    sized = [kind._replace(size=size) for size in SIZES for kind in kinds]
    of_kind, of_size = (
        {f"{plural(str(said))} are there": sum(map(said.fits, items)) for said in some} for some in (kinds, sized)
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


def _existence(items: Objects) -> Candidates:
    """Whether there is an object of a colour and a shape, of a size too, one beside another, another one like one."""
    return [*_pairs(items), *_triples(items), *_pairs_beside(items), *_another_like(items)]


def _pairs(items: Objects) -> Candidates:
    """A colour and a shape: what is not there is mixed, of a missing colour or of a missing shape."""
    pairs = [(item.shape, item.colour) for item in items]
    colours, shapes = {colour for _, colour in pairs}, {shape for shape, _ in pairs}
    kinds = (
        set(pairs),
        mixtures(pairs),
        {(shape, colour) for shape in shapes for colour in COLOURS if colour not in colours},
        {(shape, colour) for shape in SHAPES if shape not in shapes for colour in colours},
    )
    return _yes_or_no(*([_a(colour, shape) for shape, colour in sorted(kind)] for kind in kinds))


def _triples(items: Objects) -> Candidates:
    """A size, a colour and a shape: what is not there differs from what is in one of them, which another object has."""
    there = {Description(item.size, item.colour, item.shape) for item in items}
    changed = (
        {one._replace(**{name: getattr(item, name)}) for one in there for item in items} - there for name in WORDS
    )
    return _yes_or_no(*([_a(*said) for said in sorted(kind)] for kind in (there, *changed)))


def _pairs_beside(items: Objects) -> Candidates:
    """A colour and a shape beside an object: what is not there is elsewhere, or mixed of what is there."""
    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])  # there, elsewhere, mixed
    everywhere = {(item.shape, item.colour) for item in items}
    for anchor, direction, side in beside(items):
        pairs = [(item.shape, item.colour) for item in side]
        others = {(item.shape, item.colour) for item in items if item is not anchor}
        for kind, found in zip(kinds, (set(pairs), others - set(pairs), mixtures(pairs) - everywhere), strict=True):
            kind += [
                f"{_a(colour, shape)} {direction} the {one}"
                for shape, colour in sorted(found)
                for one in describe(anchor, items)
            ]
    return _yes_or_no(*kinds)


def _another_like(items: Objects) -> Candidates:
    """Another object that shares an attribute with one, for each attribute."""
    candidates = []
    for shared, word in WORDS.items():
        there, absent = [], []
        for anchor in items:
            subjects = [f"another object of the same {word} as the {one}" for one in describe(anchor, items, [shared])]
            (there if others_like(items, anchor, shared) else absent).extend(subjects)
        candidates += _yes_or_no(there, absent)
    return candidates


def _yes_or_no(there: Sequence[str], *absent: Sequence[str]) -> Candidates:
    """As `existence`, with weights that sum to 1; nothing where only one of the two could be answered."""
    if not there or not any(absent):
        return []
    candidates = existence(there, absent)
    total = sum(weight for *_, weight in candidates)
    return [(subject, answer, weight / total) for subject, answer, weight in candidates]


def _a(*words: str) -> str:
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))


_KINDS = (
    Kind("what color", "other", ("is the {}?",), partial(_asked_for, "colour")),
    Kind("what shape", "other", ("is the {}?",), partial(_asked_for, "shape")),
    Kind("what size", "other", ("is the {}?",), partial(_asked_for, "size")),
    Kind("how many", "number", ("{}?",), _counts),
    Kind("is there", "yes/no", ("{}?",), _existence),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """`count` (at most MAX_QUESTIONS) different questions; the counts of one attribute can always be asked."""
    return ask_in_rounds(_KINDS, scene.objects, rng, count)
