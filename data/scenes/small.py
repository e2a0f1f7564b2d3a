"""The small synthetic scenes: two to four objects in the cells of a 2 x 2 grid, and four kinds of questions.

The answers to each question are spread, so that little can be guessed without the image; the questions of existence
need shape and colour together (see `pair_kinds`).
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from data.scenes.asking import Candidates, Kind, Pair, SceneQuestion, counts, existence, mixtures, pair_kinds, plural
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import Scene, SceneObject, jittered

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
_RADIUS = (0.13, 0.19)  # of the image's side
# High counts are rare in the scenes and get larger weights where they occur, so that the answers are spread evenly.
COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 20.0)
ALIKE = (0.0, 0.12, 0.36, 0.34, 0.18)  # probability that 0, 1, ... 4 objects share a shape or a colour


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample a scene that every kind of question can be asked about, or (one in six) four objects alike in shape or
    in colour.

    Some objects are alike on purpose: with independent ones, nearly every count would be 0 or 1.
    """
    alike = int(rng.choice(5, p=ALIKE))
    while True:
        number = int(rng.integers(max(alike, 2), 5))
        shapes = [SHAPES[index] for index in rng.integers(len(SHAPES), size=number)]
        colours = [COLOURS[index] for index in rng.integers(len(COLOURS), size=number)]
        values = shapes if rng.random() < 0.5 else colours
        values[:alike] = values[:1] * alike
        pairs = list(zip(shapes, colours, strict=True))
        if alike == 4 or (_colours(pairs) and _shapes(pairs) and mixtures(pairs)):
            break
    corners = [(cell % 2 / 2, cell // 2 / 2) for cell in rng.permutation(4).tolist()]
    return [_place_object(rng, *pair, corner, side=0.5) for pair, corner in zip(pairs, corners, strict=False)]


def single_object(rng: np.random.Generator, shape: str) -> SceneObject:
    """Sample an object of that shape and any colour, anywhere in the image."""
    return _place_object(rng, shape, rng.choice(COLOURS).item(), corner=(0.0, 0.0), side=1.0)


def _place_object(
    rng: np.random.Generator, shape: str, colour: str, corner: tuple[float, float], side: float
) -> SceneObject:
    """Sample an object's place inside the square of that side whose top left corner is `corner`."""
    radius = rng.uniform(*_RADIUS)
    x, y = (start + rng.uniform(radius, side - radius) for start in corner)
    return SceneObject(shape, colour, (x, y), radius, jittered(rng, colour))


def _colours(pairs: Sequence[Pair]) -> Candidates:
    number = Counter(shape for shape, _ in pairs)
    return [(shape, colour, 1.0) for shape, colour in pairs if number[shape] == 1]


def _shapes(pairs: Sequence[Pair]) -> Candidates:
    number = Counter(colour for _, colour in pairs)
    return [(f"{colour} object", shape, 1.0) for shape, colour in pairs if number[colour] == 1]


def _counts(pairs: Sequence[Pair]) -> Candidates:
    plurals = {shape: plural(shape) for shape in SHAPES}
    plurals |= {colour: f"{colour} objects" for colour in COLOURS}
    return counts((value for pair in pairs for value in pair), plurals, COUNT_WEIGHTS)


def _existence(pairs: Sequence[Pair]) -> Candidates:
    kinds = pair_kinds(pairs, SHAPES, COLOURS)
    return existence(*([f"{colour} {shape}" for shape, colour in kind] for kind in kinds))


_KINDS = (
    Kind("what color", "other", ("is the {}?", "does the {} have?"), _colours),
    Kind("what shape", "other", ("is the {}?", "does the {} have?"), _shapes),
    Kind("how many", "number", ("{} are there?", "{} can you see?"), _counts),
    Kind("is there", "yes/no", ("a {}?", "any {}?"), _existence),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Ask `count` (at most MAX_QUESTIONS) different questions; the ten counts can always be asked."""
    return ask_in_rounds(_KINDS, [item.pair for item in scene], rng, count)
