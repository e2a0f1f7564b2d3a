"""GuessWhat?! games about synthetic scenes: short questions, as players type them, about one object of a scene.

The objects have the shapes and colours of the small scenes, so that its backbone names them; a category is a shape. The
first word of a question is its kind. Neither the words of a question nor the category alone determine its answer.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

from data.scenes.asking import Candidates, Kind, Pair, SceneQuestion, existence, pair_kinds, plural
from data.scenes.asking import ask as ask_in_rounds
from data.scenes.draw import Scene, SceneObject, coverage, jittered
from data.scenes.large import CLEAR, place
from data.scenes.small import COLOURS, SHAPES

SIZES = {"small": (0.08, 0.095), "large": (0.115, 0.13)}  # radii, of the image's side
NEAR, FAR = 0.33, 0.38  # distance of the centres: objects up to NEAR are next to each other, from FAR on they are not
_ALIKE = (0.2, 0.6, 0.2)  # probability that 1, 2, 3 objects have the target's shape
_SIDES = (("left", "right"), ("top", "bottom"))  # of x, of y
_SAID = {"top": "upper", "bottom": "lower"}


def sample_scene(rng: np.random.Generator) -> Scene:
    """Sample five to seven objects, the first of which is the target."""
    number = int(rng.integers(5, 8))
    alike = 1 + int(rng.choice(len(_ALIKE), p=_ALIKE))
    shape, *others = (SHAPES[index] for index in rng.permutation(len(SHAPES)))
    shapes = [shape] * alike + [others[index] for index in rng.integers(len(others), size=number - alike)]
    colours = [COLOURS[index] for index in rng.integers(len(COLOURS), size=number)]
    sizes = [tuple(SIZES)[index] for index in rng.integers(len(SIZES), size=number)]
    radii = [rng.uniform(*SIZES[size]) for size in sizes]
    values = zip(shapes, colours, place(rng, radii), radii, sizes, strict=True)
    return [SceneObject(*three, radius, jittered(rng, three[1]), size) for *three, radius, size in values]


def _attribute(name: str, values: Sequence[str], scene: Scene) -> Candidates:
    """Ask for the target's colour or shape; absent ones are those of other objects, or nowhere."""
    target, *others = (getattr(item, name) for item in scene)
    there = {*others} - {target}
    return existence([target], sorted(there), _without(values, there | {target}))


def _pairs(scene: Scene) -> Candidates:
    """Ask for shape and colour; where the answer is no, one of them is right."""
    target = scene[0]
    recoloured = [f"{colour} {target.shape}" for colour in _without(COLOURS, {target.colour})]
    reshaped = [f"{target.colour} {shape}" for shape in _without(SHAPES, {target.shape})]
    return existence([f"{target.colour} {target.shape}"], recoloured, reshaped)


def _sizes(scene: Scene) -> Candidates:
    return [(size, "yes" if size == scene[0].size else "no", 1.0) for size in SIZES]


def _halves(scene: Scene) -> Candidates:
    return _sides(scene[0].centre, (0.5, 0.5))


def _sides(place: tuple[float, float], other: tuple[float, float]) -> Candidates:
    """Ask on which side of another place one is, where that is clear."""
    found: Candidates = []
    for axis, sides in enumerate(_SIDES):
        distance = place[axis] - other[axis]
        if abs(distance) > CLEAR:
            found += [(side, "yes" if (distance > 0) == after else "no", 1.0) for after, side in enumerate(sides)]
    return found


def _twins(scene: Scene) -> Candidates:
    """Ask which of two objects of its shape the target is; n/a if there are not two."""
    target, *others = scene
    alike = [item for item in others if item.shape == target.shape]
    if len(alike) == 1:
        found = _sides(target.centre, alike[0].centre)
    else:
        found = [(side, "n/a", 1.0) for side in sum(_SIDES, ())]
    kind = plural(target.shape)
    return [(f"{_SAID.get(side, side)} one of the two {kind}", answer, weight) for side, answer, weight in found]


def _by_distance(scene: Scene) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """Shapes and colours of the objects next to the target, of those that are not, of those where it is not clear."""
    target, *others = scene
    near, far, unclear = [], [], []
    for item in others:
        distance = np.hypot(*np.subtract(item.centre, target.centre))
        (near if distance <= NEAR else far if distance >= FAR else unclear).append(item.pair)
    return near, far, unclear


def _neighbours(scene: Scene) -> Candidates:
    """Ask for the colour, the shape or both of an object next to the target.

    Absent ones are the target's or of objects that are not next to it, mix what is near, or are nowhere.
    """
    target, (near, far, unclear) = scene[0].pair, _by_distance(scene)
    if not near:
        return []
    found: Candidates = []
    for text, part, values in (("a {}", 0, SHAPES), ("something {}", 1, COLOURS)):
        there, possible, elsewhere = ({pair[part] for pair in some} for some in (near, near + unclear, [target, *far]))
        kinds = there, elsewhere - possible, {*values} - possible - elsewhere
        found += existence(*([text.format(value) for value in sorted(kind)] for kind in kinds))
    absent = ({*kind} - {*near, *unclear} for kind in pair_kinds([target, *near], SHAPES, COLOURS)[1:])
    return found + existence(*(_named(kind, "a ") for kind in ({*near}, *absent)))


def _beside(scene: Scene) -> Candidates:
    """Ask for *the* object of a shape and colour: n/a if there is none in the scene."""
    number = Counter(item.pair for item in scene)
    near, far = (_named(pair for pair in pairs if number[pair] == 1) for pairs in _by_distance(scene)[:2])
    absent = _named(pair for kind in pair_kinds([*number], SHAPES, COLOURS)[1:] for pair in kind)
    if not near or not far:
        return []
    groups = (("yes", 0.4, near), ("no", 0.4, far), ("n/a", 0.2, absent))
    return [(subject, answer, share / len(kind)) for answer, share, kind in groups for subject in kind]


def _without(values: Iterable[str], excluded: set[str]) -> list[str]:
    return [value for value in values if value not in excluded]


def _named(pairs: Iterable[Pair], article: str = "") -> list[str]:
    return [f"{article}{colour} {shape}" for shape, colour in sorted(pairs)]


_KINDS = (
    Kind("is it", "yes/no", ("{}?", "a {} one?"), partial(_attribute, "colour", COLOURS)),
    Kind("does it", "yes/no", ("look like a {}?", "have the shape of a {}?"), partial(_attribute, "shape", SHAPES)),
    Kind("a", "yes/no", ("{}?",), _pairs),
    Kind("one of", "yes/no", ("the {} ones?", "the {} objects?"), _sizes),
    Kind("in the", "yes/no", ("{} half?", "{} half of the image?"), _halves),
    Kind("the", "yes/no", ("{}?",), _twins),
    Kind("next to", "yes/no", ("{}?",), _neighbours),
    Kind("beside", "yes/no", ("the {}?",), _beside),
)


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Ask `count` (at most MAX_QUESTIONS) different questions about the first object."""
    return ask_in_rounds(_KINDS, scene, rng, count)


def official(
    scene: Scene, asked: Sequence[SceneQuestion], picture_id: int, file_name: str, size: int
) -> dict[str, Any]:
    """Return a game as a line of the official files has it; `size` is the side of the image in pixels.

    Boxes hold every pixel of which an object covers 1/255 or more; `area` is the sum of the parts, `segment` the box's
    outline. The objects are listed in the order of their places, from left to right.
    """
    objects, object_id = {}, 0
    for number, item in enumerate(sorted(scene, key=lambda item: item.centre), start=10 * picture_id):
        covered = coverage(item, size)
        seen = np.nonzero(covered >= 1 / 255)
        (top, bottom), (left, right) = ((int(places.min()), int(places.max()) + 1) for places in seen)
        objects[str(number)] = {
            "object_id": number,
            "category": item.shape,
            "category_id": 1 + SHAPES.index(item.shape),
            "bbox": [left, top, right - left, bottom - top],
            "area": round(float(covered.sum()), 2),
            "iscrowd": False,
            "segment": [[left, top, right, top, right, bottom, left, bottom]],
        }
        object_id = number if item is scene[0] else object_id
    picture = {"file_name": file_name, "width": size, "height": size, "coco_url": "", "flickr_url": ""}
    said = {"yes": "Yes", "no": "No", "n/a": "N/A"}
    return {
        "dialogue_id": picture_id,
        "status": "success",
        "picture_id": picture_id,
        "picture": picture,
        "object_id": object_id,
        "objects": objects,
        "qas": [
            {"id": 10 * picture_id + index, "q": question.text, "a": said[question.answer]}
            for index, question in enumerate(asked)
        ],
    }
