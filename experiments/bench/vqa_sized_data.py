"""Generated raw data of VQA's size: the official file format, as many questions, JPEGs like COCO's.

For measuring what a run of that size costs. The images are noise with the spectrum of photographs and the words are w0,
w1, …, so there is nothing to learn.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

from data.scenes.write import in_order, write_questions
from data.vqa_files import Question, SplitFiles
from vqa.io.files import naming_write_errors
from vqa.io.progress import progress

QUESTIONS = {"train": 248_349, "val": 121_512}  # of VQA v1
_CANVAS = 1024  # side in pixels of the noise that images are cut from
_SHARES = {"yes/no": 0.38, "number": 0.12, "other": 0.5}  # of the answer types
_AGREEMENT = {"yes/no": 0.88, "number": 0.72, "other": 0.55}  # annotators who give a question's main answer
_QUESTION_TYPES = {
    "yes/no": ("is the", "is this a", "are there", "does the", "can"),
    "number": ("how many", "what number is"),
    "other": ("what is the", "what color is the", "what", "where is the", "why"),
}


def write_coco_like(
    folder: Path, images: Mapping[str, int], questions: Mapping[str, int], processes: int = 2
) -> dict[str, SplitFiles]:
    """Write JPEGs of 640 x 480 (about 160 KB each, as COCO's) and the question and annotation files, officially named.

    Args:
        folder: where to.
        images: images of each split.
        questions: questions of each split, spread evenly over its images.
        processes: processes that make images; the files do not depend on it.

    Returns:
        The files of each split.
    """
    splits, first_image, first_question = {}, 1, 1
    for split, count in images.items():
        files = splits[split] = SplitFiles(
            folder / f"OpenEnded_mscoco_{split}2014_questions.json",
            folder / f"mscoco_{split}2014_annotations.json",
            str(folder / f"{split}2014" / f"COCO_{split}2014_{{image_id:012d}}.jpg"),
        )
        Path(files.images).parent.mkdir(parents=True, exist_ok=True)
        image_ids = range(first_image, first_image + count)
        numbered = [(image_id, files.image(image_id)) for image_id in image_ids]
        list(progress(in_order(_write_image, numbered, processes), count, "images"))  # writes them
        sampled = sample_questions(questions[split], image_ids, first_question)
        write_questions((files.questions, files.annotations), sampled, {})
        first_image, first_question = first_image + count, first_question + questions[split]
    return splits


def _write_image(numbered: tuple[int, Path]) -> None:
    number, file = numbered
    top, left = np.random.default_rng(number).integers([_CANVAS - 480, _CANVAS - 640])
    image = Image.fromarray(_noise()[top : top + 480, left : left + 640])
    with naming_write_errors(file):
        image.save(file, quality=90)


@cache
def _noise() -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photographs, uint8 [H, W, 3]."""
    frequency = np.hypot(np.fft.fftfreq(_CANVAS)[:, None], np.fft.rfftfreq(_CANVAS))
    frequency[0, 0] = np.inf
    white = np.fft.rfft2(np.random.default_rng(0).standard_normal((4, _CANVAS, _CANVAS)))
    noise = np.fft.irfft2(white * frequency**-1.1)
    grey, *colours = noise / noise.std((1, 2), keepdims=True)
    return np.clip(118 + 50 * grey[..., None] + 22 * np.stack(colours, -1), 0, 255).astype(np.uint8)


def sample_questions(count: int, image_ids: Sequence[int], first_id: int) -> list[Question]:
    """Sample questions whose words and answers are as frequent and as rare as in VQA, spread evenly over images.

    Three answers of a hundred are written as annotators sometimes do ("Yes."). The first id is the seed, too.
    """
    words = _by_frequency((f"w{rank}" for rank in range(16_000)), 1.0)
    answers = {
        "yes/no": _by_frequency(("yes", "no"), 1.0),
        "number": _by_frequency(map(str, range(400)), 1.6),
        "other": _by_frequency((f"w{rank}" for rank in range(60_000)), 1.1),
    }
    random, questions = Random(first_id), []
    for row, kind in enumerate(random.choices(list(_SHARES), _SHARES.values(), k=count)):
        question_type = random.choice(_QUESTION_TYPES[kind])
        text = " ".join([question_type.capitalize(), *random.choices(**words, k=random.randint(1, 3))])
        main, *others = random.choices(**answers[kind], k=11)
        given = [main if random.random() < _AGREEMENT[kind] else answer for answer in others]
        given = [f"{answer.capitalize()}." if random.random() < 0.03 else answer for answer in given]
        image_id = image_ids[row * len(image_ids) // count]
        questions.append(Question(first_id + row, image_id, f"{text}?", question_type, kind, tuple(given)))
    return questions


def _by_frequency(words: Iterable[str], exponent: float) -> dict[str, list[Any]]:
    """Words with Zipf's law in Mandelbrot's form, (rank + 2) ** -exponent, as `random.choices` takes them."""
    words = list(words)
    weights = ((rank + 2) ** -exponent for rank in range(len(words)))
    return {"population": words, "cum_weights": list(accumulate(weights))}
