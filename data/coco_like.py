"""Raw data as large as VQA's, made here: the official files with the official counts, and JPEGs like COCO's.

For measuring what a run of that size costs. The pictures are noise with the spectrum of photographs and the words mean
nothing, so there is nothing to be learnt.
"""

import json
import os
from collections import deque
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.coco_words import Asked, asked, most_common
from data.errors import InputError
from data.files import read_json, write_json, written_whole
from data.progress import progress
from data.vqa_files import SplitFiles
from data.world import in_order

IMAGES = {"train": 82_783, "val": 40_504}
QUESTIONS = {"v1": {"train": 248_349, "val": 121_512}, "v2": {"train": 443_757, "val": 214_354}}
_PREFIX = {"v1": "", "v2": "v2_"}
_DIGITS = {"v1": 1, "v2": 3}  # of a question's number on its image, the end of its id
_LARGEST_IMAGE_ID = 581_929
_CANVAS = 1024  # pixels square, of which pictures are cut
_LIKE_VERSION = 1  # raise it when the same arguments give other files


def write_coco_like(
    folder: Path,
    *,
    version: str = "v1",
    images: Mapping[str, int] = IMAGES,
    questions: Mapping[str, int] | None = None,
    distinct: int = 2_000,
    seed: int = 0,
    processes: int = 2,
) -> dict[str, SplitFiles]:
    """Writes JPEGs of 640 x 480 (about 160 KB each, as COCO's) and question and annotation files named as the official.

    Fewer images than COCO's are asked about more often each. Files do not depend on `processes`. A folder that holds
    these data is left as it is.

    Args:
        folder: where to; `coco_like.json`, written last, says what was made.
        version: v1 or v2, of the questions' files.
        images: how many of each split.
        questions: how many of each split; by default the version's.
        distinct: pictures that are files of their own; the others are symbolic links to these.
        seed: of everything.
        processes: that make pictures.

    Returns:
        The files of each split.

    Raises:
        InputError: the folder holds other data, or a split has fewer questions than images.
    """
    questions = QUESTIONS[version] if questions is None else questions
    made = {"made": _LIKE_VERSION, "version": version, "images": dict(images), "seed": seed}
    made |= {"questions": {split: questions[split] for split in images}, "distinct": distinct}
    splits = {split: _split_files(folder, version, split) for split in images}
    if (folder / "coco_like.json").exists():
        if read_json(folder / "coco_like.json") != made:
            raise InputError(f"{folder}: holds data of other counts or another seed; remove it or name another folder")
        return splits
    if few := [split for split, count in images.items() if questions[split] < count]:
        raise InputError(f"split {few[0]!r}: {images[few[0]]} images need as many questions, got {questions[few[0]]}")
    drawn = np.random.default_rng(seed).choice(_LARGEST_IMAGE_ID, sum(images.values()), replace=False) + 1
    ids = dict(zip(images, np.split(drawn, np.cumsum(list(images.values()))[:-1]), strict=True))
    _write_images(
        [splits[split].image(id_) for split in images for id_ in ids[split].tolist()], distinct, seed, processes
    )
    for number, split in enumerate(images):
        rng = np.random.default_rng([seed, 1, number])
        _write_questions(splits[split], split, version, np.sort(ids[split]), questions[split], rng)
    write_json(folder / "coco_like.json", made)
    return splits


def _split_files(folder: Path, version: str, split: str) -> SplitFiles:
    name = f"mscoco_{split}2014"
    return SplitFiles(
        folder / f"{_PREFIX[version]}OpenEnded_{name}_questions.json",
        folder / f"{_PREFIX[version]}{name}_annotations.json",
        str(folder / f"{split}2014" / f"COCO_{split}2014_{{image_id:012d}}.jpg"),
    )


def _write_images(files: list[Path], distinct: int, seed: int, processes: int) -> None:
    for folder in {file.parent for file in files}:
        folder.mkdir(parents=True, exist_ok=True)
    whole, links = files[:distinct], files[distinct:]
    made = in_order(partial(_write_picture, seed=seed), list(enumerate(whole)), processes)
    deque(progress(made, len(whole), "pictures"), maxlen=0)
    for place, link in enumerate(links):
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(whole[place % len(whole)], link.parent))


def _write_picture(numbered: tuple[int, Path], *, seed: int) -> None:
    """A piece of a canvas, mirrored or not, lighter or darker, with its colours in any order."""
    number, file = numbered
    rng = np.random.default_rng([seed, 2, number])
    canvas = _canvas(seed, int(rng.integers(2)))
    top, left = rng.integers(_CANVAS - 480), rng.integers(_CANVAS - 640)
    picture = canvas[top : top + 480, left : left + 640][:, :: rng.choice([-1, 1])][..., rng.permutation(3)]
    light = rng.uniform(0.7, 1.3)
    picture = np.clip(picture * np.float32(light), 0, 255).astype(np.uint8)
    Image.fromarray(picture).save(file, quality=90)


@lru_cache(maxsize=2)
def _canvas(seed: int, number: int) -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photographs, uint8 [H, W, 3]."""
    from scipy import fft

    rng = np.random.default_rng([seed, 3, number])
    frequency = np.hypot(fft.fftfreq(_CANVAS)[:, None], fft.rfftfreq(_CANVAS)[None, :])
    frequency[0, 0] = np.inf
    amplitude = (frequency**-1.1).astype(np.float32)

    def layer() -> np.ndarray:
        white = rng.standard_normal((_CANVAS, _CANVAS), np.float32)
        noise = fft.irfft2(fft.rfft2(white) * amplitude, s=white.shape)
        return noise / noise.std()

    grey = layer()
    colours = [0.9 * grey + 0.4 * layer() for _ in "RGB"]
    return np.clip(118 + 55 * np.stack(colours, -1), 0, 255).astype(np.uint8)


def _write_questions(
    files: SplitFiles, split: str, version: str, ids: np.ndarray, count: int, rng: np.random.Generator
) -> None:
    """Both files of a split, an entry at a time: as objects they would need gigabytes."""
    begin = {
        "info": {"description": "As many questions as VQA has, with no meaning", "url": "", "version": version},
        "data_type": "mscoco",
        "data_subtype": f"{split}2014",
        "license": {"url": "", "name": ""},
    }
    digits = max(_DIGITS[version], len(str(-(-count // len(ids)) - 1)))
    places = np.arange(count) * len(ids) // count
    numbers = np.arange(count) - np.searchsorted(places, places)
    heads = {"questions": {**begin, "task_type": "Open-Ended"}, "annotations": begin}
    with (
        written_whole(files.questions) as questions_aside,
        written_whole(files.annotations) as annotations_aside,
        questions_aside.open("w", encoding="utf-8") as questions,
        annotations_aside.open("w", encoding="utf-8") as annotations,
    ):
        for file, key in ((questions, "questions"), (annotations, "annotations")):
            file.write(json.dumps(heads[key])[:-1] + f', "{key}": [')
        about = zip(ids[places].tolist(), numbers.tolist(), asked(count, rng), strict=True)
        for row, (image_id, number, question) in enumerate(about):
            known = {"image_id": image_id, "question_id": image_id * 10**digits + number}
            between = ", " if row else ""
            questions.write(between + json.dumps({**known, "question": question.text}))
            annotations.write(between + json.dumps(_annotation(known, question)))
        for file in (questions, annotations):
            file.write("]}\n")


def _annotation(known: dict[str, int], question: Asked) -> dict[str, Any]:
    answers = [
        {"answer": answer, "answer_confidence": "yes" if place < 8 else "maybe", "answer_id": place + 1}
        for place, answer in enumerate(question.answers)
    ]
    types = {"question_type": question.question_type, "answer_type": question.answer_type}
    return {**known, **types, "multiple_choice_answer": most_common(question.answers), "answers": answers}
