"""Reader of the official VQA v1 and v2 open-ended question and annotation files (visualqa.org)."""

import gc
import re
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any

from data.errors import InputError
from data.files import read_json

_OF_AN_ANSWER = {"answer", "answer_confidence", "answer_id"}  # what is stored of an answer in the official files
LONGEST = 10_000  # characters of a text; a batch is as wide as its longest question
MOST_ANSWERS = 100  # of one question; a table of questions is as wide as the most


@dataclass(frozen=True, slots=True)
class Question:
    """One question about one image; types and answers are empty where the split has no annotations."""

    question_id: int
    image_id: int
    text: str
    question_type: str = ""
    answer_type: str = ""
    answers: tuple[str, ...] = ()  # ten in the official files, as given


@dataclass(frozen=True)
class SplitFiles:
    """The raw files of a split; `images` is a pattern such as `train2014/COCO_train2014_{image_id:012d}.jpg`."""

    questions: Path
    annotations: Path | None
    images: str

    def image(self, image_id: int) -> Path:
        """The file of an image. Raises InputError if the pattern is no pattern of `image_id`."""
        _check_pattern(self.images)
        return Path(self.images.format(image_id=image_id))


@cache
def _check_pattern(images: str) -> None:
    """Refuses all that `str.format` knows beyond the number itself: attributes, items, widths of a million digits."""
    try:
        asked = [part[1:] for part in Formatter().parse(images) if part[1] is not None]
    except ValueError:  # a lone brace
        asked = []
    if not asked or not all(
        name == "image_id" and not conversion and re.fullmatch(r"0?\d{0,2}d?", form) for name, form, conversion in asked
    ):
        raise InputError(f"data.splits: images {images!r} must hold {{image_id}}, for example {{image_id:012d}}")


def read_questions(questions: Path, annotations: Path | None) -> list[Question]:
    """All questions of a split, in the order of the question file, joined with their annotations.

    Raises:
        InputError: a file is missing or malformed, an id occurs twice, or the two files do not hold the same ids.
    """
    with _no_collection():
        return _read_questions(questions, annotations)


def _read_questions(questions: Path, annotations: Path | None) -> list[Question]:
    asked = _by_id(questions, "questions", {"image_id": int, "question": str})
    if annotations is None:
        return [Question(id_, entry["image_id"], entry["question"]) for id_, entry in asked.items()]
    fields = {"image_id": int, "question_type": str, "answer_type": str, "answers": list}
    annotated = _by_id(annotations, "annotations", fields, _sharing_answers())
    for missing, where, present in (
        (asked.keys() - annotated.keys(), annotations, questions),
        (annotated.keys() - asked.keys(), questions, annotations),
    ):
        if missing:
            raise InputError(
                f"{where}: no entry for {len(missing)} question(s) of {present.name}, the first is "
                f"{min(missing)}; both files must be of the same split"
            )
    known: set[str] = set()
    return [_joined(id_, entry, annotated[id_], annotations, known) for id_, entry in asked.items()]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Millions of objects without a cycle among them: looking for cycles would take longer than reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sharing_answers() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Keeps of a given answer its text alone, once for each different text: ten a question would fill gigabytes."""
    shared: dict[str, dict[str, Any]] = {}

    def kept(entry: dict[str, Any]) -> dict[str, Any]:
        answer = entry.get("answer")
        if not isinstance(answer, str) or not entry.keys() <= _OF_AN_ANSWER:
            return entry
        return shared.setdefault(answer, {"answer": answer})

    return kept


def _joined(
    question_id: int, entry: dict[str, Any], annotation: dict[str, Any], file: Path, known: set[str]
) -> Question:
    """`known`: answers that were checked before; the same few are given again and again."""
    where = f"{file}: annotation of question {question_id}"
    if annotation["image_id"] != entry["image_id"]:
        raise InputError(f"{where}: image_id {annotation['image_id']}, but the question has {entry['image_id']}")
    try:
        answers = tuple([given["answer"] for given in annotation["answers"]])
        new = () if known.issuperset(answers) else set(answers) - known
    except (TypeError, KeyError):
        raise InputError(f"{where}: 'answers' must be a list of {{'answer': text}}") from None
    if not 0 < len(answers) <= MOST_ANSWERS:
        raise InputError(f"{where}: 'answers' must hold 1 to {MOST_ANSWERS} answers, it holds {len(answers)}")
    for answer in new:
        if not isinstance(answer, str) or (wrong := unusable(answer)):
            reason = wrong if isinstance(answer, str) else "no text"
            raise InputError(f"{where}: 'answers' must hold texts, one is {reason}: {reprlib.repr(answer)}")
        known.add(answer)
    return Question(
        question_id,
        entry["image_id"],
        entry["question"],
        annotation["question_type"],
        annotation["answer_type"],
        answers,
    )


def _by_id(
    file: Path, key: str, fields: dict[str, type], object_hook: Callable[[dict], Any] | None = None
) -> dict[int, dict[str, Any]]:
    content = read_json(file, object_hook)
    if not isinstance(content, dict) or not isinstance(content.get(key), list):
        raise InputError(f"{file}: not an official VQA file: it must be an object with a list '{key}'")
    if not content[key]:
        raise InputError(f"{file}: the list '{key}' is empty")
    kinds = tuple({"question_id": int, **fields}.items())
    entries: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise InputError(f"{file}: {key}[{place}] must be an object, not {type(entry).__name__}")
        for field, kind in kinds:
            value = entry.get(field)
            if type(value) is not kind:  # not isinstance: True is an int in Python, but never an id
                raise InputError(f"{file}: {key}[{place}] needs '{field}' ({kind.__name__}), got {reprlib.repr(value)}")
            if (kind is str and unusable(value)) or (kind is int and not -(2**63) <= value < 2**63):
                reason = unusable(value) if kind is str else "not of 64 bits"
                raise InputError(f"{file}: {key}[{place}] has a {field} that is {reason}: {reprlib.repr(value)}")
        if entry["question_id"] in entries:
            raise InputError(f"{file}: question_id {entry['question_id']} occurs twice")
        entries[entry["question_id"]] = entry
    return entries


def unusable(text: str) -> str:
    """Why a question, an answer or a type cannot be used; empty if it can."""
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    if text.isprintable():
        return ""
    if "\0" in text:
        return "with a null character, which an h5 file cannot hold"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not UTF-8 text (it holds half a surrogate pair)"
    return ""
