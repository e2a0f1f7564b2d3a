"""The embedded world's questions: on colour, shape, count and existence.

They leave little to guess without the picture (answers are spread for each question) and little to guess from shape or
colour alone (see `_existence`).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice, permutations
from typing import NamedTuple

import numpy as np

from data.scenes import COLOURS, SHAPES, Scene, place_object

MAX_QUESTIONS = 10  # an image: the ten counts can always be asked, and question id = image id * 10 + place
# Higher counts are rarer in the scenes, so they are preferred where they occur; chosen to spread the answers evenly.
_COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 20.0)
_ALIKE = (0.0, 0.12, 0.36, 0.34, 0.18)  # probability that 0, 1, ... 4 objects are made alike


class SceneQuestion(NamedTuple):
    """A question and its answer, in the terms of the VQA files."""

    question_type: str
    answer_type: str
    text: str
    answer: str


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene in which every kind of question can be asked, or (one in six) four objects alike in shape or in colour.

    Some objects are made alike on purpose: independent ones would make nearly every count 0 or 1.
    """
    alike = int(rng.choice(5, p=_ALIKE))
    while True:
        number = int(rng.integers(max(alike, 2), 5))
        shapes = [SHAPES[index] for index in rng.integers(len(SHAPES), size=number)]
        colours = [tuple(COLOURS)[index] for index in rng.integers(len(COLOURS), size=number)]
        values = shapes if rng.random() < 0.5 else colours
        values[:alike] = values[:1] * alike
        things = list(zip(shapes, colours, strict=True))
        if alike == 4 or (_colours(things) and _shapes(things) and _exchangeable(things)):
            break
    corners = [(cell % 2 / 2, cell // 2 / 2) for cell in rng.permutation(4).tolist()]
    return Scene(
        tuple(place_object(rng, *thing, corner, side=0.5) for thing, corner in zip(things, corners, strict=False))
    )


# What each kind of question can ask about (shape, colour) pairs, the things in a scene: subjects and their answers.
Things = list[tuple[str, str]]
Candidates = list[tuple[str, str, float]]  # subject, answer, and how much it is preferred to come first


def _colours(things: Things) -> Candidates:
    """Each shape that occurs once, and its colour."""
    number = Counter(shape for shape, _ in things)
    return [(shape, colour, 1.0) for shape, colour in things if number[shape] == 1]


def _shapes(things: Things) -> Candidates:
    """Each colour that occurs once, and its shape."""
    number = Counter(colour for _, colour in things)
    return [(f"{colour} object", shape, 1.0) for shape, colour in things if number[colour] == 1]


def _counts(things: Things) -> Candidates:
    """Each shape and each colour of the world, and how many things have it."""
    number = Counter(value for thing in things for value in thing)
    plurals = {shape: f"{shape}es" if shape.endswith("s") else f"{shape}s" for shape in SHAPES}
    plurals |= {colour: f"{colour} objects" for colour in COLOURS}
    counts = Counter(number[value] for value in plurals)
    return [
        (plural, str(number[value]), _COUNT_WEIGHTS[number[value]] / counts[number[value]])
        for value, plural in plurals.items()
    ]


def _existence(things: Things) -> Candidates:
    """Combinations that are there, and three kinds that are not: of a colour and a shape that both occur but not
    together (in pairs whose mixtures could be exchanged), of a missing colour, of a missing shape.

    The first kind cannot be told from colours alone or shapes alone; the other two make the question learnable step by
    step.
    """
    colours, shapes = {colour for _, colour in things}, {shape for shape, _ in things}
    mixed = {(shape, colour) for (shape, _), (_, colour) in _exchangeable(things)}
    other_colour = {(shape, colour) for shape in shapes for colour in COLOURS if colour not in colours}
    other_shape = {(shape, colour) for shape in SHAPES if shape not in shapes for colour in colours}
    absent = [kind for kind in (mixed, other_colour, other_shape) if kind]
    there = [(f"{colour} {shape}", "yes", len(absent) / len(set(things))) for shape, colour in sorted(set(things))]
    return there + [(f"{colour} {shape}", "no", 1 / len(kind)) for kind in absent for shape, colour in sorted(kind)]


def _exchangeable(things: Things) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """Pairs (both ways round) that differ in shape and colour, while neither mixture of the two occurs."""
    return [
        (a, b)
        for a, b in permutations(things, 2)
        if a[0] != b[0] and a[1] != b[1] and (a[0], b[1]) not in things and (b[0], a[1]) not in things
    ]


class _Kind(NamedTuple):
    question_type: str  # every wording begins with it, as in VQA
    answer_type: str
    wordings: tuple[str, ...]
    candidates: Callable[[Things], Candidates]


_KINDS = (
    _Kind("what color", "other", ("is the {}?", "does the {} have?"), _colours),
    _Kind("what shape", "other", ("is the {}?", "does the {} have?"), _shapes),
    _Kind("how many", "number", ("{} are there?", "{} can you see?"), _counts),
    _Kind("is there", "yes/no", ("a {}?", "any {}?"), _existence),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """`count` (at most MAX_QUESTIONS) different questions: rounds of one of each kind, in random order.

    A kind that has nothing (more) to ask about the scene leaves its turn to the others.
    """
    things = [(item.shape, item.colour) for item in scene.objects]
    queues = [_spread(kind.candidates(things), rng) for kind in _KINDS]
    questions: list[SceneQuestion] = []
    while len(questions) < count:
        for place in rng.permutation(len(_KINDS)):
            kind = _KINDS[place]
            for subject, answer in islice(queues[place], 1):
                wording = kind.wordings[rng.integers(len(kind.wordings))]
                text = f"{kind.question_type} {wording.format(subject)}"
                questions.append(SceneQuestion(kind.question_type, kind.answer_type, text, answer))
    return questions[:count]


def _spread(candidates: Candidates, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The candidates in random order; each comes first with a chance proportional to its weight."""
    order = np.argsort(rng.exponential(size=len(candidates)) / np.array([weight for *_, weight in candidates]))
    return (candidates[place][:2] for place in order)
