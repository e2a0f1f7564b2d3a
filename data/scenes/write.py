"""Write synthetic scenes as files: images, and questions in the VQA v1 format."""

import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from data.scenes import large, photos, small
from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import LOOKS, draw_scene
from data.vqa_files import Question
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json, written_whole
from vqa.io.processes import WorkerContext, naming_worker_limits
from vqa.io.progress import progress

WORLD_VERSION = 2  # increase it when the same arguments make other files
PHOTOS = "photos"  # a further world: mosaics of the labelled images of a source
# Each has SHAPES, sample_scene, single_object and ask; all randomness comes from the generator that they are given.
WORLDS: dict[str, ModuleType] = {"small": small, "large": large}


def write_world(
    folder: Path,
    *,
    seed: int,
    images: Mapping[str, int],
    world: str = "small",
    size: int = 64,
    look: str = "plain",
    questions_per_image: int = 4,
    processes: int = 2,
    source: str | None = None,
) -> None:
    """Write `SPLIT_questions.json`, `SPLIT_annotations.json` and `SPLIT/%012d.png` (by image id) for each split.

    `world.json` is written last and holds the arguments; a folder that has it already is left as it is. The files do
    not depend on `processes`, scenes and questions depend neither on `size` nor on `look`.

    Args:
        folder: where to write.
        seed: of everything.
        images: number of images of each split.
        world: one of WORLDS, or PHOTOS.
        size: side of the images in pixels.
        look: one of LOOKS.
        questions_per_image: 1 to MAX_QUESTIONS.
        processes: that draw.
        source: of PHOTOS, a folder or zip file as `LabelledImages` reads; mosaics of the split `train` are made of its
            training images, those of the others of its held-out ones.

    Raises:
        InputError: the folder holds another world, `questions_per_image` is out of range, PHOTOS have no source or
            another look than plain, another world has a source, or an image of the source cannot be read.
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
    if (world == PHOTOS) != (source is not None):
        raise InputError(
            f"data.photographs: the world {PHOTOS} needs a folder or zip file of images, and no other does"
        )
    if source is not None:
        if look != "plain":
            raise InputError(f"scenes.look: must be plain for the world {PHOTOS}, not {look}")
        made["source"] = photos.photographs(source).digest[:12]
    file = folder / "world.json"
    if file.exists():
        found = read_json(file)
        if not isinstance(found, dict):
            raise InputError(f"{file}: must be an object; remove the folder")
        differing = [f"{key} {found.get(key)}, not {value}" for key, value in made.items() if found.get(key) != value]
        if differing:
            raise InputError(f"{folder} holds a world with {'; '.join(differing)}: remove it or name another folder")
        return
    first_id = 1
    for split, count in sorted(images.items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        asked = progress(
            in_order(partial(_write_image, made, source, folder, split, first_id), range(count), processes),
            count,
            f"{split} scenes",
        )
        questions = (
            Question(MAX_QUESTIONS * image_id + index, image_id, text, question_type, answer_type, (answer,) * 10)
            for image_id, of_image in enumerate(asked, start=first_id)
            for index, (question_type, answer_type, text, answer) in enumerate(of_image)
        )
        header = {
            "info": {"description": "Drawn scenes, VQA v1 open-ended format", "url": "", "version": "1.0"},
            "data_type": "scenes",
            "data_subtype": split,
            "license": {"url": "", "name": ""},
        }
        files = folder / f"{split}_questions.json", folder / f"{split}_annotations.json"
        write_questions(files, questions, header, {"task_type": "Open-Ended"})
        first_id += count
    write_json(file, made)


def in_order(make: Callable[[Any], Any], items: Sequence[Any], processes: int) -> Iterator[Any]:
    """Yield what `make` returns for each item, computed in `processes` processes."""
    if processes == 1:
        yield from map(make, items)
        return
    workers = WorkerContext()
    try:
        with naming_worker_limits("data.processes=1"):
            pool = ProcessPoolExecutor(processes, mp_context=workers)
            results = pool.map(make, items, chunksize=50)
        yield from results
    finally:
        workers.kill()  # the rest is not needed, and a stopped process would be waited for


def _write_image(
    made: Mapping[str, Any], source: str | None, folder: Path, split: str, first_id: int, index: int
) -> list[SceneQuestion]:
    """Write one image of a split and return its questions; each image has its own random streams."""
    seeds = made["seed"], zlib.crc32(split.encode()), index  # hash() of a text differs from run to run
    rng, drawing = (np.random.default_rng([*seeds, stream]) for stream in range(2))
    if source is None:
        world = WORLDS[made["world"]]
        scene = world.sample_scene(rng)
        pixels = draw_scene(scene, made["size"], drawing, LOOKS[made["look"]])
        asked = world.ask(scene, rng, made["questions_per_image"])
    else:
        images = photos.photographs(source)
        mosaic = photos.sample_mosaic(rng, images, held_out=split != "train")
        pixels = photos.draw_mosaic(mosaic, images, made["size"], drawing)
        asked = photos.ask(mosaic, images, rng, made["questions_per_image"])
    file = folder / split / f"{first_id + index:012d}.png"
    Image.fromarray(pixels).save(file, compress_level=0)  # noise hardly compresses
    return asked


def write_questions(
    files: tuple[Path, Path], questions: Iterable[Question], header: Mapping[str, Any], task: Mapping[str, str]
) -> None:
    """Write the official files of a split: questions and annotations, both behind `header`, `task` only in the first.

    One entry is written at a time: all of them as Python objects would take gigabytes for data of VQA's size.
    """
    with ExitStack() as stack:
        asked, annotated = (
            stack.enter_context(stack.enter_context(written_whole(file)).open("w", encoding="utf-8")) for file in files
        )
        asked.write(json.dumps({**header, **task, "questions": []}).removesuffix("]}"))
        annotated.write(json.dumps({**header, "annotations": []}).removesuffix("]}"))
        for row, question in enumerate(questions):
            entry = {"image_id": question.image_id, "question_id": question.question_id}
            types = {"question_type": question.question_type, "answer_type": question.answer_type}
            most_common = Counter(question.answers).most_common(1)[0][0]
            given = enumerate(question.answers, 1)
            answers = [{"answer": text, "answer_confidence": "yes", "answer_id": number} for number, text in given]
            types |= {"multiple_choice_answer": most_common, "answers": answers}
            for file, more in ((asked, {"question": question.text}), (annotated, types)):
                file.write((", " if row else "") + json.dumps(entry | more, ensure_ascii=False))
        asked.write("]}\n")
        annotated.write("]}\n")


def draw_single_objects(world: ModuleType, seed: int, images: np.ndarray) -> np.ndarray:
    """Draw one object of the world into each of `images`, uint8 [N, S, S, 3], to learn to name its shape from.

    Returns:
        indices of the shapes in `world.SHAPES`, int64 [N], equally many of each as far as N divides.
    """
    count, size = images.shape[:2]
    rng = np.random.default_rng([seed, zlib.crc32(b"single objects")])
    labels = rng.permutation(np.arange(count) % len(world.SHAPES))
    for image, label in zip(images, progress(labels, count, "single objects"), strict=True):
        image[:] = draw_scene([world.single_object(rng, world.SHAPES[label])], size, rng)
    return labels
