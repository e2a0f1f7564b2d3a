"""Write synthetic scenes as files: images, and questions in the VQA v1 or the GuessWhat?! format."""

import gzip
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

from data.scenes import games, large, photos, small
from data.scenes.asking import MAX_QUESTIONS, SceneQuestion
from data.scenes.draw import LOOKS, draw_scene
from data.vqa_files import Question
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, read_json, write_json, written_whole
from vqa.io.locks import held
from vqa.io.processes import WorkerContext, naming_worker_limits
from vqa.io.progress import progress

WORLD_VERSION = 2  # raise it when the same arguments give other files
WORLD = "world.json"  # in its folder
_BEGUN = f".{WORLD}.begun"  # there while it is written
PHOTOS = "photos"  # a world beside these, of mosaics of the labelled images of a source
GAMES = "games"  # and one of GuessWhat?! games about scenes, which are drawn twice as large as their crops
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
    """Write `SPLIT_questions.json`, `SPLIT_annotations.json` and `SPLIT/%012d.png` (by image id) for each split;
    of GAMES `guesswhat.SPLIT.jsonl.gz` (where `val` is called `valid`) instead of the first two.

    `world.json` is written last and holds the arguments; a folder that has it already is left as it is, and so are
    files that are not of scenes. The files do not depend on `processes`, scenes and questions depend neither on `size`
    nor on `look`. A look that is not plain and the checksum of a source are named in the files of questions, so that an
    h5 file of other images is refused.

    Args:
        folder: where to write.
        seed: of everything.
        images: number of images of each split.
        world: one of WORLDS, PHOTOS or GAMES.
        size: side of the images in pixels; of GAMES, of the crops of an object.
        look: one of LOOKS.
        questions_per_image: 1 to MAX_QUESTIONS.
        processes: that draw.
        source: of PHOTOS, a folder or zip file as `LabelledImages` reads; mosaics of the split `train` are made of its
            training images, those of the others of its held-out ones.

    Raises:
        InputError: the folder holds another world or files of the same names, `questions_per_image` is out of range,
            PHOTOS have no source or another look than plain, another world has a source, or an image of the source
            cannot be read.
    """
    if not 1 <= questions_per_image <= MAX_QUESTIONS:
        raise InputError(f"scenes.questions_per_image: must be 1 to {MAX_QUESTIONS}, not {questions_per_image}")
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
            f"data.photographs: must be a folder or zip file of images for scenes.world={PHOTOS}, else null"
        )
    if source is not None:
        if look != "plain":
            raise InputError(f"scenes.look: must be plain for the world {PHOTOS}, not {look}")
        made["source"] = photos.photographs(source).digest[:12]
    if _is_written(folder, made):
        return
    with held(folder / f".{WORLD}.lock", folder, wait=True):
        if not _is_written(folder, made):  # another process may have written it since
            _write(folder, made, source, processes)


def _is_written(folder: Path, made: Mapping[str, Any]) -> bool:
    """Whether the folder holds the world of these arguments. Raises InputError if it holds another one."""
    file = folder / WORLD
    if not file.exists():
        return False
    found = read_json(file)
    if not isinstance(found, dict):
        raise InputError(f"{file}: must be an object; remove the folder")
    if differing := [f"{key} {found.get(key)}, not {value}" for key, value in made.items() if found.get(key) != value]:
        raise InputError(f"{folder}: holds scenes made with {'; '.join(differing)}; remove it or name another")
    return True


def _check_free(folder: Path, made: Mapping[str, Any]) -> None:
    """Raise InputError if a file would be replaced that is not of scenes whose writing was interrupted."""
    for split in made["images"]:
        files = [_games_file(folder, split)] if made["world"] == GAMES else _question_files(folder, split)
        for taken in filter(Path.exists, (*files, *(folder / split).glob("*"))):
            raise InputError(
                f"{taken}: would be replaced by drawn scenes; `scenes=null` uses the files that are there, another "
                "data.folder leaves them"
            )


def _write(folder: Path, made: Mapping[str, Any], source: str | None, processes: int) -> None:
    begun = folder / _BEGUN
    if not begun.exists():
        _check_free(folder, made)
        begun.touch()
    first_id, drawn = 1, {key: made[key] for key in ("look", "source") if made.get(key, "plain") != "plain"}
    for split, count in sorted(made["images"].items()):
        (folder / split).mkdir(parents=True, exist_ok=True)
        asked = progress(
            in_order(partial(_write_image, made, source, folder, split, first_id), range(count), processes),
            count,
            f"{split} scenes",
        )
        if made["world"] == GAMES:
            _write_games(folder, split, (game | drawn for game in asked))
        else:
            _write_asked(folder, split, first_id, asked, drawn)
        first_id += count
    write_json(folder / WORLD, made)
    begun.unlink()


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
) -> Any:
    """Write one image of a split; return its questions or, of GAMES, its game. Each image has random streams of its
    own.
    """
    seeds = made["seed"], zlib.crc32(split.encode()), index  # hash() of a text differs from run to run
    rng, drawing = (np.random.default_rng([*seeds, stream]) for stream in range(2))
    file = folder / split / f"{first_id + index:012d}.png"
    if source is None:
        world, size = WORLDS.get(made["world"], games), made["size"]
        scene = world.sample_scene(rng)
        asked = world.ask(scene, rng, made["questions_per_image"])
        if world is games:
            size *= 2
            asked = games.official(scene, asked, first_id + index, file.name, size)
        pixels = draw_scene(scene, size, drawing, LOOKS[made["look"]])
    else:
        images = photos.photographs(source)
        mosaic = photos.sample_mosaic(rng, images, held_out=split != "train")
        pixels = photos.draw_mosaic(mosaic, images, made["size"], drawing)
        asked = photos.ask(mosaic, images, rng, made["questions_per_image"])
    with naming_write_errors(file):
        Image.fromarray(pixels).save(file, compress_level=0)  # noise hardly compresses
    return asked


def _write_asked(
    folder: Path, split: str, first_id: int, asked: Iterable[Sequence[SceneQuestion]], drawn: Mapping[str, str]
) -> None:
    """Write the two official files of a split of scenes; the ten answers to a question are equal."""
    questions = (
        Question(MAX_QUESTIONS * image_id + index, image_id, text, question_type, answer_type, (answer,) * 10)
        for image_id, of_image in enumerate(asked, start=first_id)
        for index, (question_type, answer_type, text, answer) in enumerate(of_image)
    )
    header = {
        "info": {"description": "Drawn scenes, VQA v1 open-ended format", "url": "", "version": "1.0", **drawn},
        "data_type": "scenes",
        "data_subtype": split,
        "license": {"url": "", "name": ""},
    }
    write_questions(_question_files(folder, split), questions, header)


def _question_files(folder: Path, split: str) -> tuple[Path, Path]:
    return folder / f"{split}_questions.json", folder / f"{split}_annotations.json"


def _games_file(folder: Path, split: str) -> Path:
    return folder / f"guesswhat.{'valid' if split == 'val' else split}.jsonl.gz"


def write_questions(files: tuple[Path, Path], questions: Iterable[Question], header: Mapping[str, Any]) -> None:
    """Write the official files of a split: questions and annotations, both behind `header`.

    One entry is written at a time: all of them as Python objects would take gigabytes for data of VQA's size.
    """
    with ExitStack() as stack:
        asked, annotated = (
            stack.enter_context(stack.enter_context(written_whole(file)).open("w", encoding="utf-8")) for file in files
        )
        asked.write(json.dumps({**header, "task_type": "Open-Ended", "questions": []}).removesuffix("]}"))
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


def _write_games(folder: Path, split: str, games_played: Iterable[dict[str, Any]]) -> None:
    """Write the official file of a split, a game a line."""
    text = "".join(f"{json.dumps(game)}\n" for game in games_played)
    with written_whole(_games_file(folder, split)) as aside:
        aside.write_bytes(gzip.compress(text.encode(), mtime=0))  # without the time: the same games, the same file


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
