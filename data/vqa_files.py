"""Reader of the official VQA v1 and v2 open-ended question and annotation files (visualqa.org)."""

import gc
import re
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple

from data.errors import InputError
from data.files import read_json_list

LONGEST = 10_000  # characters of a text; a batch is as wide as its longest question
MOST_ANSWERS = 100  # of one question; a table of questions is as wide as the most
# Two letters in a row of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which write no blanks between words.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2}"
)


class Question(NamedTuple):
    """One question about one image; types and answers are empty where the split has no annotations."""

    question_id: int
    image_id: int
    text: str
    question_type: str = ""
    answer_type: str = ""
    answers: tuple[str, ...] = ()  # ten in the official files, as given
    answer_ids: bool = True  # whether each answer has an `answer_id` of its own


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
    asked = read_asked(questions)
    return asked if annotations is None else with_annotations(asked, questions, annotations)


def read_asked(questions: Path) -> list[Question]:
    """The questions of a split without their annotations. Raises InputError as `read_questions`."""
    with _no_collection():
        entries = _entries(questions, "questions", {"image_id": int, "question": str})
        return [Question(entry["question_id"], entry["image_id"], entry["question"]) for entry in entries]


def with_annotations(asked: Sequence[Question], questions: Path, annotations: Path) -> list[Question]:
    """What `read_asked` read of the file `questions`, with the annotations. Raises InputError as `read_questions`."""
    fields = {"image_id": int, "question_type": str, "answer_type": str, "answers": list}
    with _no_collection():
        known = {question.question_id: question for question in asked}
        shared: dict[str, str] = {}
        annotated: dict[int, Question] = {}
        unknown: list[int] = []
        for entry in _entries(annotations, "annotations", fields):
            id_ = entry["question_id"]
            if id_ in known:
                annotated[id_] = _joined(known[id_], entry, annotations, shared)
            else:
                unknown.append(id_)
        for missing, where, present in (
            (known.keys() - annotated.keys(), annotations, questions),
            (unknown, questions, annotations),
        ):
            if missing:
                raise InputError(
                    f"{where}: no entry for {len(missing)} question(s) of {present.name}, the first is "
                    f"{min(missing)}; both files must be of the same split"
                )
        return [annotated[question.question_id] for question in asked]


def remarks(questions: Sequence[Question]) -> Iterator[str]:
    """What the user should know of questions that are used as they are, a line a kind."""
    if few := sum(0 < len(question.answers) < 4 for question in questions):
        yield (
            f"{few} question(s) have fewer than 4 answers: by the official metric a right answer to them scores less "
            "than 100 %. Where there is one true answer, repeat it ten times."
        )
    if unnumbered := sum(not question.answer_ids for question in questions):
        yield (
            f"{unnumbered} question(s) have answers whose answer_id is missing or repeated: the official tool drops "
            "equal entries and scores a right answer to them less than this program does, down to 0 %. Number each "
            "question's answers, answer_id 1 to 10."
        )
    if one_word := sum(_WITHOUT_BLANKS.search(question.text) is not None for question in questions):
        yield (
            f"{one_word} question(s) are in a script without blanks between words (Chinese, Japanese, Thai, Lao, Khmer "
            "or Burmese): all between two blanks or punctuation marks is one word. Put blanks between the words, here "
            "and in the questions you ask."
        )


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


def _joined(question: Question, annotation: dict[str, Any], file: Path, shared: dict[str, str]) -> Question:
    """`shared`: texts that were met before; the same few are given again and again."""
    if annotation["image_id"] != question.image_id:
        reason = f"image_id {annotation['image_id']}, but the question has {question.image_id}"
        raise InputError(f"{_annotation_of(question, file)}: {reason}")
    try:
        answers = [given["answer"] for given in annotation["answers"]]
        new = [answer for answer in answers if answer not in shared]
        numbers = {id_ for given in annotation["answers"] if type(id_ := given.get("answer_id")) is int}
    except (TypeError, KeyError):
        raise InputError(f"{_annotation_of(question, file)}: 'answers' must be a list of {{'answer': text}}") from None
    if not 0 < len(answers) <= MOST_ANSWERS:
        reason = f"'answers' must hold 1 to {MOST_ANSWERS} answers, it holds {len(answers)}"
        raise InputError(f"{_annotation_of(question, file)}: {reason}")
    for answer in new:
        if not isinstance(answer, str) or (wrong := unusable(answer)):
            reason = wrong if isinstance(answer, str) else "no text"
            reason = f"'answers' must hold texts, one is {reason}: {reprlib.repr(answer)}"
            raise InputError(f"{_annotation_of(question, file)}: {reason}")
        shared[answer] = answer
    return Question(
        question.question_id,
        question.image_id,
        question.text,
        shared.setdefault(annotation["question_type"], annotation["question_type"]),
        shared.setdefault(annotation["answer_type"], annotation["answer_type"]),
        tuple([shared[answer] for answer in answers]),
        len(numbers) == len(answers),
    )


def _annotation_of(question: Question, file: Path) -> str:
    return f"{file}: annotation of question {question.question_id}"


def _entries(file: Path, key: str, fields: dict[str, type]) -> Iterator[dict[str, Any]]:
    """The entries of an official file, each checked."""
    kinds = tuple({"question_id": int, **fields}.items())
    ids: set[int] = set()
    for place, entry in enumerate(read_json_list(file, key)):
        if not isinstance(entry, dict):
            raise InputError(f"{file}: {key}[{place}] must be an object, not {type(entry).__name__}")
        for field, kind in kinds:
            value = entry.get(field)
            if type(value) is not kind:  # not isinstance: True is an int in Python, but never an id
                raise InputError(f"{file}: {key}[{place}] needs '{field}' ({kind.__name__}), got {reprlib.repr(value)}")
            if (kind is str and unusable(value)) or (kind is int and not -(2**63) <= value < 2**63):
                reason = unusable(value) if kind is str else "not of 64 bits"
                raise InputError(f"{file}: {key}[{place}] has a {field} that is {reason}: {reprlib.repr(value)}")
        if entry["question_id"] in ids:
            raise InputError(f"{file}: question_id {entry['question_id']} occurs twice")
        ids.add(entry["question_id"])
        yield entry
    if not ids:
        raise InputError(f"{file}: the list '{key}' is empty")


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
