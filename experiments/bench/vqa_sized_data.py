"""Raw data as large as VQA's, made here: files in the official form, as many questions, JPEGs like COCO's.

For measuring what a run of that size costs. The images are noise with the spectrum of photographs and the words are w0,
w1, …, so there is nothing to be learnt.
"""

import json
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from data.scenes.write import in_order
from data.vqa_files import SplitFiles
from vqa.io.progress import progress

QUESTIONS = {"train": 248_349, "val": 121_512}  # of VQA v1
WORDS = 16_000
_CANVAS = 1024  # pixels square, of which images are cut


class _Kind(NamedTuple):
    """The questions of one answer type."""

    share: float
    agreement: float  # annotators who give a question's own answer
    answers: int
    exponent: float  # of Zipf's law for the answers
    beginnings: tuple[str, ...]  # official question types


_KINDS = {
    "yes/no": _Kind(0.38, 0.88, 2, 1.0, ("is the", "is this a", "are there", "does the", "can")),
    "number": _Kind(0.12, 0.72, 400, 1.6, ("how many", "what number is")),
    "other": _Kind(0.5, 0.55, 60_000, 1.1, ("what is the", "what color is the", "what", "where is the", "why")),
}


class Asked(NamedTuple):
    """One question as people asked and answered it."""

    text: str
    question_type: str
    answer_type: str
    answers: list[str]  # ten, as written


def write_coco_like(
    folder: Path, images: Mapping[str, int], questions: Mapping[str, int], processes: int = 2
) -> dict[str, SplitFiles]:
    """Writes JPEGs of 640 x 480 (about 160 KB each, as COCO's) and question and annotation files named as the official.

    Args:
        folder: where to.
        images: how many of each split.
        questions: how many of each split, in turn about all its images.
        processes: that make images; the files do not depend on it.

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
        numbered = [(number, files.image(number)) for number in range(first_image, first_image + count)]
        deque(progress(in_order(_write_image, numbered, processes), count, "images"), maxlen=0)
        ids = [
            {"image_id": first_image + row * count // questions[split], "question_id": first_question + row}
            for row in range(questions[split])
        ]
        made = list(asked(len(ids), np.random.default_rng(first_question)))
        _write(files.questions, "questions", (id_ | {"question": q.text} for id_, q in zip(ids, made, strict=True)))
        _write(files.annotations, "annotations", (id_ | _annotation(q) for id_, q in zip(ids, made, strict=True)))
        first_image, first_question = first_image + count, first_question + len(ids)
    return splits


def _write_image(numbered: tuple[int, Path]) -> None:
    number, file = numbered
    top, left = np.random.default_rng(number).integers([_CANVAS - 480, _CANVAS - 640])
    Image.fromarray(_canvas()[top : top + 480, left : left + 640]).save(file, quality=90)


@cache
def _canvas() -> np.ndarray:
    """Noise whose amplitude falls with the frequency as in photographs, uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(_CANVAS)[:, None], np.fft.rfftfreq(_CANVAS))
    frequency[0, 0] = np.inf
    # one layer for all colours, and one for each
    white = np.fft.rfft2(rng.standard_normal((4, _CANVAS, _CANVAS)))
    noise = np.fft.irfft2(white * frequency**-1.1)
    grey, *colours = noise / noise.std((1, 2), keepdims=True)
    return np.clip(118 + 50 * grey[..., None] + 22 * np.stack(colours, -1), 0, 255).astype(np.uint8)


def _write(file: Path, key: str, entries: Iterable[dict[str, Any]]) -> None:
    """Writes an entry at a time: as objects all of them would need gigabytes."""
    with file.open("w", encoding="utf-8") as opened:
        opened.write(f'{{"{key}": [')
        opened.writelines((", " if row else "") + json.dumps(entry) for row, entry in enumerate(entries))
        opened.write("]}\n")


def _annotation(question: Asked) -> dict[str, Any]:
    answers = [
        {"answer": answer, "answer_confidence": "yes", "answer_id": number}
        for number, answer in enumerate(question.answers, 1)
    ]
    types = {"question_type": question.question_type, "answer_type": question.answer_type}
    return types | {"multiple_choice_answer": Counter(question.answers).most_common(1)[0][0], "answers": answers}


def asked(count: int, rng: np.random.Generator) -> Iterator[Asked]:
    """So many questions: a few words are in most of them and thousands in one or two (Zipf's law), and so with answers.

    Three answers of a hundred are written as annotators sometimes do ("Yes.").
    """
    kinds = rng.choice(list(_KINDS), count, p=[kind.share for kind in _KINDS.values()])
    words = _by_rank(WORDS, 1.0, (count, 3), rng)
    lengths = rng.integers(1, 4, count)
    beginnings = rng.integers(1 << 30, size=count)
    own, given = np.empty((count, 1), np.int64), np.empty((count, 10), np.int64)
    agrees = rng.random((count, 10))
    for name, kind in _KINDS.items():
        rows = kinds == name
        own[rows], given[rows] = (_by_rank(kind.answers, kind.exponent, (rows.sum(), n), rng) for n in (1, 10))
        given[rows] = np.where(agrees[rows] < kind.agreement, own[rows], given[rows])
    odd = rng.random((count, 10)) < 0.03
    for row, kind in enumerate(kinds.tolist()):
        beginning = _KINDS[kind].beginnings[beginnings[row] % len(_KINDS[kind].beginnings)]
        text = " ".join([beginning.capitalize(), *(f"w{word}" for word in words[row, : lengths[row]])])
        yield Asked(
            f"{text}?", beginning, kind, [_written(kind, *one) for one in zip(given[row], odd[row], strict=True)]
        )


def _by_rank(size: int, exponent: float, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Ranks drawn by Zipf's law as Mandelbrot wrote it: in proportion to (rank + 2) ** -exponent."""
    weights = np.cumsum((np.arange(size) + 2.0) ** -exponent)
    return np.searchsorted(weights, rng.random(shape) * weights[-1])


def _written(kind: str, rank: int, odd: bool) -> str:
    plain = {"yes/no": ("yes", "no")[rank % 2], "number": str(rank), "other": f"w{rank}"}[kind]
    return f"{plain.capitalize()}." if odd else plain
