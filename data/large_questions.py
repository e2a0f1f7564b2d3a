"""The large synthetic scenes' questions: on colour, shape, size, count and existence, most about two or three objects.

What is asked of an object is not said of it, a relation to another is named only where it is needed to tell the object
from others, and each way of asking leaves little to guess: its answers are spread.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from data.large_world import SIZES
from data.references import WORDS, Description, Objects, beside, describe, others_like
from data.scene_questions import Candidates, Kind, SceneQuestion, existence, mixtures, plural
from data.scene_questions import ask as ask_in_rounds
from data.scenes import COLOURS, SHAPES, Scene

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
