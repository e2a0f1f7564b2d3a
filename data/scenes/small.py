"""The small synthetic scenes: two to four objects in the cells of a 2 x 2 grid; questions on four kinds of things.

The questions leave little to guess without the image (answers are spread for each question) and little to guess from
shape or colour alone (see `_existence`).
"""

from collections import Counter

import numpy as np

from data.scenes.asking import Candidates, Kind, SceneQuestion, existence, mixtures, plural
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import Scene, SceneObject, jittered

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
_RADIUS = (0.13, 0.19)  # of the image's side
# Higher counts are rarer in the scenes, so they are preferred where they occur; chosen to spread the answers evenly.
_COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 20.0)
_ALIKE = (0.0, 0.12, 0.36, 0.34, 0.18)  # probability that 0, 1, ... 4 objects are made alike

Things = list[tuple[str, str]]  # the shape and the colour of each object of a scene


def sample_scene(rng: np.random.Generator) -> Scene:
    """A scene in which every kind of question can be asked, or (one in six) four objects alike in shape or in colour.

    Some objects are made alike on purpose: independent ones would make nearly every count 0 or 1.
    """
    alike = int(rng.choice(5, p=_ALIKE))
    while True:
        number = int(rng.integers(max(alike, 2), 5))
        shapes = [SHAPES[index] for index in rng.integers(len(SHAPES), size=number)]
        colours = [COLOURS[index] for index in rng.integers(len(COLOURS), size=number)]
        values = shapes if rng.random() < 0.5 else colours
        values[:alike] = values[:1] * alike
        things = list(zip(shapes, colours, strict=True))
        if alike == 4 or (_colours(things) and _shapes(things) and mixtures(things)):
            break
    corners = [(cell % 2 / 2, cell // 2 / 2) for cell in rng.permutation(4).tolist()]
    return Scene(
        tuple(_place_object(rng, *thing, corner, side=0.5) for thing, corner in zip(things, corners, strict=False))
    )


def single_object(rng: np.random.Generator, shape: str) -> SceneObject:
    """An object of that shape and any colour, anywhere in the image."""
    return _place_object(rng, shape, rng.choice(COLOURS).item(), corner=(0.0, 0.0), side=1.0)


def _place_object(
    rng: np.random.Generator, shape: str, colour: str, corner: tuple[float, float], side: float
) -> SceneObject:
    """An object anywhere inside the square of that side whose top left corner is `corner`."""
    radius = rng.uniform(*_RADIUS)
    x, y = (start + rng.uniform(radius, side - radius) for start in corner)
    return SceneObject(shape, colour, (x, y), radius, jittered(rng, colour))


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
    plurals = {shape: plural(shape) for shape in SHAPES}
    plurals |= {colour: f"{colour} objects" for colour in COLOURS}
    counts = Counter(number[value] for value in plurals)
    return [
        (subject, str(number[value]), _COUNT_WEIGHTS[number[value]] / counts[number[value]])
        for value, subject in plurals.items()
    ]


def _existence(things: Things) -> Candidates:
    """Combinations that are there, and three kinds that are not: of a colour and a shape that both occur but not
    together, of a missing colour, of a missing shape.

    The first kind cannot be told from colours alone or shapes alone; the other two make the question learnable step by
    step.
    """
    colours, shapes = {colour for _, colour in things}, {shape for shape, _ in things}
    other_colour = {(shape, colour) for shape in shapes for colour in COLOURS if colour not in colours}
    other_shape = {(shape, colour) for shape in SHAPES if shape not in shapes for colour in colours}
    there, *absent = (
        [f"{colour} {shape}" for shape, colour in sorted(kind)]
        for kind in (set(things), mixtures(things), other_colour, other_shape)
    )
    return existence(there, absent)


_KINDS = (
    Kind("what color", "other", ("is the {}?", "does the {} have?"), _colours),
    Kind("what shape", "other", ("is the {}?", "does the {} have?"), _shapes),
    Kind("how many", "number", ("{} are there?", "{} can you see?"), _counts),
    Kind("is there", "yes/no", ("a {}?", "any {}?"), _existence),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """`count` (at most MAX_QUESTIONS) different questions; the ten counts can always be asked."""
    return ask_in_rounds(_KINDS, [(item.shape, item.colour) for item in scene.objects], rng, count)
