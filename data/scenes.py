"""The embedded world: small drawn scenes and questions about them, written as VQA v1 files; nothing is downloaded.

Two to four objects stand in the cells of a 2 x 2 grid on a noisy background. Everything is drawn and asked from seeds:
the same arguments give the same files. The questions leave little to guess without the picture (answers are spread for
each question) and little to guess from shape or colour alone (see `_existence`).
"""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice, permutations
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.errors import InputError
from data.files import read_json, write_json
from data.progress import progress

WORLD_VERSION = 1  # raise it when the same arguments give other files
MAX_QUESTIONS = 10  # an image: the ten counts can always be asked, and question id = image id * 10 + place

# Far enough from 0 and 255 to be jittered.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (40, 165, 50),
    "blue": (40, 75, 225),
    "yellow": (235, 215, 45),
    "purple": (165, 50, 185),
    "cyan": (60, 215, 220),
}
# Signed distance to the outline, negative inside, at (x, y) from the centre; y points down, the object's radius is 1.
_OUTLINES: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "circle": lambda x, y: np.hypot(x, y) - 0.95,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(y - 0.75, 0.868 * abs(x) - 0.496 * (y + 1)),
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.32),
}
SHAPES: tuple[str, ...] = tuple(_OUTLINES)

_ALIKE = (0.0, 0.12, 0.36, 0.34, 0.18)  # probability that 0, 1, ... 4 objects are made alike
# Higher counts are rarer in the scenes, so they are preferred where they occur; chosen to spread the answers evenly.
_COUNT_WEIGHTS = (1.0, 1.0, 2.0, 4.0, 20.0)
_RADIUS = (0.13, 0.19)  # of the image's side
_COLOUR_JITTER = 20  # at most, for each of R, G, B
_BACKGROUND = (85.0, 145.0)  # an image's grey level
_NOISE, _NOISE_ON_OBJECTS = 60.0, 20.0  # from the least to the most, for each of R, G, B


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; lengths are fractions of the image's side, from its top left corner."""

    shape: str
    colour: str
    centre: tuple[float, float]  # x, y
    radius: float
    rgb: tuple[int, int, int]  # its colour as drawn, jittered


@dataclass(frozen=True)
class Scene:
    """Two to four objects, each inside its own cell of the 2 x 2 grid."""

    objects: tuple[SceneObject, ...]


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
    return Scene(tuple(_place(rng, *thing, corner, side=0.5) for thing, corner in zip(things, corners, strict=False)))


def _place(rng: np.random.Generator, shape: str, colour: str, corner: tuple[float, float], side: float) -> SceneObject:
    """An object anywhere inside the square of that side whose top left corner is `corner`."""
    radius = rng.uniform(*_RADIUS)
    x, y = (start + rng.uniform(radius, side - radius) for start in corner)
    red, green, blue = (COLOURS[colour] + rng.integers(-_COLOUR_JITTER, _COLOUR_JITTER + 1, size=3)).tolist()
    return SceneObject(shape, colour, (x, y), radius, (red, green, blue))


def draw_scene(scene: Scene, size: int, rng: np.random.Generator) -> np.ndarray:
    """The scene as uint8 [size, size, 3] (height, width, RGB); `rng` draws the background and the noise."""
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size  # [S], the pixels' centres
    noise = rng.random((3, size, size), dtype=np.float32) - 0.5
    image = rng.uniform(*_BACKGROUND) + _NOISE * noise  # [3, S, S]
    for item in scene.objects:
        x = (axis[None, :] - item.centre[0]) / item.radius
        y = (axis[:, None] - item.centre[1]) / item.radius
        distance = _OUTLINES[item.shape](x, y) * item.radius * size  # [S, S], in pixels
        coverage = np.clip(0.5 - distance, 0, 1)  # smooths the edge over one pixel
        image += coverage * (np.float32(item.rgb)[:, None, None] + _NOISE_ON_OBJECTS * noise - image)
    return np.clip(image, 0, 255).transpose(1, 2, 0).astype(np.uint8, order="C")


def single_objects(seed: int, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of one object anywhere, for learning to name its shape: uint8 [N, S, S, 3] and int64 [N].

    Labels are places in SHAPES, equally many of each as far as `count` divides; sizes, colours and background are those
    of the scenes.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(SHAPES))
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        item = _place(rng, SHAPES[label], rng.choice(tuple(COLOURS)).item(), corner=(0.0, 0.0), side=1.0)
        image[:] = draw_scene(Scene((item,)), size, rng)
    return images, labels


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


def write_world(
    folder: Path, *, seed: int, images: dict[str, int], size: int = 64, questions_per_image: int = 4, processes: int = 2
) -> None:
    """Writes scenes and questions in the VQA v1 format: for each split in `images`, that many pictures of size x size.

    Files: `SPLIT_questions.json`, `SPLIT_annotations.json`, `SPLIT/%012d.png` by image id, and `world.json`, written
    last, which says what was made. They do not depend on `processes`. A folder that holds this world is left as it is.

    Raises:
        InputError: the folder holds another world, or `questions_per_image` is not within 1 ... MAX_QUESTIONS.
    """
    if not 1 <= questions_per_image <= MAX_QUESTIONS:
        raise InputError(f"questions_per_image must be 1 to {MAX_QUESTIONS}, got {questions_per_image}")
    world = {
        "version": WORLD_VERSION,
        "seed": seed,
        "images": images,
        "size": size,
        "questions_per_image": questions_per_image,
    }
    if (folder / "world.json").exists():
        found = read_json(folder / "world.json")
        differing = [f"{key} {found.get(key)}, not {value}" for key, value in world.items() if found.get(key) != value]
        if differing:
            raise InputError(f"{folder} holds a world with {'; '.join(differing)}: remove it or name another folder")
        return
    first_id = 1
    for split, number in sorted(images.items()):
        seeds = (seed, zlib.crc32(split.encode()))  # Python's hash() of a text differs from run to run
        make = partial(
            _make_image, folder=folder / split, first_id=first_id, seeds=seeds, size=size, count=questions_per_image
        )
        (folder / split).mkdir(parents=True, exist_ok=True)
        asked = progress(_in_order(make, range(number), processes), number, f"{split} scenes")
        _write_split(folder, split, first_id, asked)
        first_id += number
    write_json(folder / "world.json", world)


def _in_order(make: Callable[[int], Any], indices: range, processes: int) -> Iterator[Any]:
    """`map`, in as many processes as asked for."""
    if processes == 1:
        yield from map(make, indices)
        return
    # Spawned, not forked: the caller may run threads (torch's), which a fork would leave locked.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        yield from pool.map(make, indices, chunksize=50)


def _make_image(
    index: int, *, folder: Path, first_id: int, seeds: tuple[int, int], size: int, count: int
) -> list[SceneQuestion]:
    """Writes one image of a split and returns its questions; each image has a random stream of its own."""
    rng = np.random.default_rng([*seeds, index])
    scene = sample_scene(rng)
    image = Image.fromarray(draw_scene(scene, size, rng))
    image.save(folder / f"{first_id + index:012d}.png", compress_level=0)  # noise hardly compresses: be quick
    return ask(scene, rng, count)


@cache
def _ten_answers(answer: str) -> list[dict[str, Any]]:
    return [{"answer": answer, "answer_confidence": "yes", "answer_id": number} for number in range(1, 11)]


def _write_split(folder: Path, split: str, first_id: int, asked: Iterable[list[SceneQuestion]]) -> None:
    """Writes the two official files of a split; ten answers a question, all the same."""
    header = {
        "info": {"description": "Drawn scenes, VQA v1 open-ended format", "url": "", "version": "1.0"},
        "data_type": "scenes",
        "data_subtype": split,
        "license": {"url": "", "name": ""},
    }
    questions, annotations = [], []
    for image_id, image_questions in enumerate(asked, start=first_id):
        for place, (question_type, answer_type, text, answer) in enumerate(image_questions):
            ids = {"image_id": image_id, "question_id": 10 * image_id + place}
            types = {"question_type": question_type, "answer_type": answer_type}
            answers = {"multiple_choice_answer": answer, "answers": _ten_answers(answer)}
            questions.append({**ids, "question": text})
            annotations.append({**ids, **types, **answers})
    content = {**header, "task_type": "Open-Ended", "questions": questions}
    write_json(folder / f"{split}_questions.json", content, indent=None)
    write_json(folder / f"{split}_annotations.json", {**header, "annotations": annotations}, indent=None)
