"""The large synthetic scenes' questions: on colour, shape, size, count and existence, most about two or three objects.

A question does not name the attribute it asks for, and names a relation only where it is needed to single an object
out; the answers to each wording are spread, so that little can be guessed.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial

import numpy as np

from data.large_world import SIZES
from data.references import WORDS, Description, beside, describe, others_like
from data.scene_questions import Candidates, Kind, SceneQuestion, existence, mixtures, pair_kinds, plural
from data.scene_questions import ask as ask_in_rounds
from data.scenes import COLOURS, SHAPES, Scene

# Weights of counts that spread the answers evenly up to four: of a colour or shape, of these and a size, on one side of
# an object, and like an object.
_COUNT_WEIGHTS = (
    (1.0, 1.0, 1.2, 2.7, 11.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.4, 7.0, 25.0, 25.0, 25.0, 25.0, 25.0),
    (1.0, 1.0, 1.0, 1.5, 2.0, 2.0, 2.0, 2.0),
    (1.2, 1.3, 2.9, 12.0, 25.0, 25.0, 25.0, 25.0),
)


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
    kinds = pair_kinds([(item.shape, item.colour) for item in items], SHAPES, COLOURS)
    return _yes_or_no(*([_a(colour, shape) for shape, colour in kind] for kind in kinds))


def _triples(items: Scene) -> Candidates:
    """Is there an object of a size, a colour and a shape? An absent one differs from an object in one attribute, which
    another object has.
    """
    there = {Description(item.size, item.colour, item.shape) for item in items}
    changed = (
        {one._replace(**{name: getattr(item, name)}) for one in there for item in items} - there for name in WORDS
    )
    return _yes_or_no(*([_a(*one) for one in sorted(kind)] for kind in (there, *changed)))


def _pairs_beside(items: Scene) -> Candidates:
    """Is there an object of a colour and a shape beside another one? An absent one is elsewhere, or a mixture."""
    kinds: tuple[list[str], list[str], list[str]] = ([], [], [])  # there, elsewhere, mixtures
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


def _another_like(items: Scene) -> Candidates:
    """Is there another object that shares an attribute with one?"""
    candidates = []
    for shared, word in WORDS.items():
        there, absent = [], []
        for anchor in items:
            subjects = [f"another object of the same {word} as the {one}" for one in describe(anchor, items, [shared])]
            (there if others_like(items, anchor, shared) else absent).extend(subjects)
        candidates += _yes_or_no(there, absent)
    return candidates


def _yes_or_no(there: Sequence[str], *absent: Sequence[str]) -> Candidates:
    """As `existence`, with weights that sum to 1; return nothing where only one answer would be possible."""
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
    """Ask `count` (at most MAX_QUESTIONS) different questions; the counts of one attribute can always be asked."""
    return ask_in_rounds(_KINDS, scene, rng, count)
