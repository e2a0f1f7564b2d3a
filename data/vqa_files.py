"""Reader of the official VQA v1 and v2 open-ended question and annotation files (visualqa.org)."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import InputError
from data.files import read_json

_OF_AN_ANSWER = {"answer", "answer_confidence", "answer_id"}  # what is stored of an answer in the official files


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
        try:
            path = Path(self.images.format(image_id=image_id))
        except (KeyError, IndexError, ValueError, AttributeError, TypeError):
            path = None
        if path is None or self.images.format(image_id=1) == self.images.format(image_id=2):
            raise InputError(
                f"data.splits: images {self.images!r} must hold {{image_id}}, for example {{image_id:012d}}"
            )
        return path


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
    return [_joined(id_, entry, annotated[id_], annotations) for id_, entry in asked.items()]


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


def _joined(question_id: int, entry: dict[str, Any], annotation: dict[str, Any], file: Path) -> Question:
    where = f"{file}: annotation of question {question_id}"
    if annotation["image_id"] != entry["image_id"]:
        raise InputError(f"{where}: image_id {annotation['image_id']}, but the question has {entry['image_id']}")
    try:
        answers = tuple(given["answer"] for given in annotation["answers"])
    except (TypeError, KeyError):
        raise InputError(f"{where}: 'answers' must be a list of {{'answer': text}}") from None
    texts = all(isinstance(answer, str) for answer in answers)
    if not answers or not texts or not all(map(_storable, set(answers))):
        raise InputError(f"{where}: 'answers' must hold at least one answer, each a text without null characters")
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
    entries: dict[int, dict[str, Any]] = {}
    for place, entry in enumerate(content[key]):
        if not isinstance(entry, dict):
            raise InputError(f"{file}: {key}[{place}] must be an object, not {type(entry).__name__}")
        for field, kind in {"question_id": int, **fields}.items():
            # bool is an int in Python, but never an id
            if not isinstance(entry.get(field), kind) or isinstance(entry[field], bool):
                raise InputError(
                    f"{file}: {key}[{place}] needs '{field}' ({kind.__name__}), got {entry.get(field)!r:.60}"
                )
            if not _storable(entry[field]):
                raise InputError(f"{file}: {key}[{place}] has a {field} that cannot be stored: {entry[field]!r:.60}")
        if entry["question_id"] in entries:
            raise InputError(f"{file}: question_id {entry['question_id']} occurs twice")
        entries[entry["question_id"]] = entry
    return entries


def _storable(value: Any) -> bool:
    """Whether an h5 file can hold a value: integers of 64 bits, texts without null characters and lone surrogates."""
    if isinstance(value, int):
        return -(2**63) <= value < 2**63
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
            return False
        return "\0" not in value
    return True
