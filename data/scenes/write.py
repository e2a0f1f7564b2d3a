"""Synthetic scenes as files: images and questions in the VQA v1 format; nothing is downloaded."""

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.scenes import large, small
from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import LOOKS, Scene, SceneObject, draw_scene
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json
from vqa.io.processes import WorkerContext, naming_worker_limits
from vqa.io.progress import progress

WORLD_VERSION = 2  # raise it when the same arguments give other files


def write_world(
    folder: Path,
    *,
    seed: int,
    images: dict[str, int],
    world: str = "small",
    size: int = 64,
    look: str = "plain",
    questions_per_image: int = 4,
    processes: int = 2,
) -> None:
    """Writes scenes and questions in the VQA v1 format: for each split in `images`, that many images of size x size.

    Files: `SPLIT_questions.json`, `SPLIT_annotations.json`, `SPLIT/%012d.png` by image id, and `world.json`, written
    last, which says what was made. They do not depend on `processes`; scenes and questions do not depend on `size` and
    `look`. A folder that holds this world is left as it is.

    Args:
        folder: where to.
        seed: of everything.
        images: how many of each split.
        world: one of WORLDS.
        size: the images' side in pixels.
        look: how they are taken, one of LOOKS.
        questions_per_image: 1 to MAX_QUESTIONS.
        processes: that draw.

    Raises:
        InputError: the folder holds another world, or `questions_per_image` is not within 1 ... MAX_QUESTIONS.
    """
    if not 1 <= questions_per_image <= MAX_QUESTIONS:
        raise InputError(f"questions_per_image must be 1 to {MAX_QUESTIONS}, got {questions_per_image}")
    made = {
        "version": WORLD_VERSION,
        "world": world,
        "seed": seed,
        "images": images,
        "size": size,
        "look": look,
        "questions_per_image": questions_per_image,
    }
    if (folder / "world.json").exists():
        found = read_json(folder / "world.json")
        if not isinstance(found, dict):
            raise InputError(f"{folder / 'world.json'}: does not say what world this is; remove the folder")
        differing = [f"{key} {found.get(key)}, not {value}" for key, value in made.items() if found.get(key) != value]
        if differing:
            raise InputError(f"{folder} holds a world with {'; '.join(differing)}: remove it or name another folder")
        return
    first_id = 1
    for split, number in sorted(images.items()):
        seeds = (seed, zlib.crc32(split.encode()))  # Python's hash() of a text differs from run to run
        make = partial(
            _make_image,
            folder=folder / split,
            first_id=first_id,
            seeds=seeds,
            world=world,
            size=size,
            look=look,
            count=questions_per_image,
        )
        (folder / split).mkdir(parents=True, exist_ok=True)
        asked = progress(in_order(make, range(number), processes), number, f"{split} scenes")
        _write_split(folder, split, first_id, asked)
        first_id += number
    write_json(folder / "world.json", made)


def in_order(make: Callable[[Any], Any], items: Sequence[Any], processes: int) -> Iterator[Any]:
    """`map`, in as many processes as asked for."""
    if processes == 1:
        yield from map(make, items)
        return
    workers = WorkerContext()
    with naming_worker_limits("data.processes=1"):
        pool = ProcessPoolExecutor(processes, mp_context=workers)
    with pool:
        try:
            with naming_worker_limits("data.processes=1"):
                made = pool.map(make, items, chunksize=50)
            yield from made
        finally:
            workers.kill()  # what is not done by now is not wanted, and a stopped process would be waited for


def _make_image(
    index: int, *, folder: Path, first_id: int, seeds: tuple[int, int], world: str, size: int, look: str, count: int
) -> list[SceneQuestion]:
    """Writes one image of a split and returns its questions; each image has random streams of its own."""
    rng, drawing = (np.random.default_rng([*seeds, index, stream]) for stream in range(2))
    scene = WORLDS[world].sample_scene(rng)
    image = Image.fromarray(draw_scene(scene, size, drawing, LOOKS[look]))
    image.save(folder / f"{first_id + index:012d}.png", compress_level=0)  # noise hardly compresses: be quick
    return WORLDS[world].ask(scene, rng, count)


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


class World(NamedTuple):
    """How scenes are sampled and asked about; all randomness is of the generator."""

    shapes: tuple[str, ...]
    sample_scene: Callable[[np.random.Generator], Scene]
    single_object: Callable[[np.random.Generator, str], SceneObject]  # of a shape, anywhere in the image
    ask: Callable[[Scene, np.random.Generator, int], list[SceneQuestion]]  # so many different questions


WORLDS: dict[str, World] = {
    "small": World(small.SHAPES, small.sample_scene, small.single_object, small.ask),
    "large": World(large.SHAPES, large.sample_scene, large.single_object, large.ask),
}


def draw_single_objects(world: World, seed: int, images: np.ndarray) -> np.ndarray:
    """Draws one object into each of `images`, uint8 [N, S, S, 3], for learning to name its shape.

    Returns:
        The shapes as places in `world.shapes`, int64 [N]; equally many of each as far as N divides. Sizes, colours and
        background are those of the world's scenes.
    """
    count, size = images.shape[:2]
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(world.shapes))
    for image, label in zip(images, progress(labels, count, "single objects"), strict=True):
        item = world.single_object(rng, world.shapes[label])
        image[:] = draw_scene(Scene((item,)), size, rng)
    return labels
