"""Read the official VQA v1 and v2 open-ended question and annotation files (visualqa.org)."""

import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from vqa.io.errors import InputError
from vqa.io.files import read_text
from vqa.text.answers import normalise_answer, strip_answer
from vqa.text.tokenizer import unusable

MOST_ANSWERS = 100  # to one question: a question table is as wide as the greatest number
# Two consecutive letters of Thai, Lao, Burmese, Khmer, Japanese or Chinese, which have no blanks between words.
_WITHOUT_BLANKS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]{2}"
)

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # as an h5 file holds them


class Question(msgspec.Struct, frozen=True, gc=False):
    """One question about one image; types and answers are empty without annotations."""

    question_id: int
    image_id: int
    text: str
    question_type: str = ""
    answer_type: str = ""
    answers: tuple[str, ...] = ()  # ten in the official files, as given
    answer_ids: bool = True  # whether each answer has an `answer_id` of its own


# Entries of the official files; other fields are ignored.
class _Asked(msgspec.Struct, gc=False):
    question_id: Id
    image_id: Id
    question: str

    def __post_init__(self) -> None:
        check_texts([self.question])


class _Answer(msgspec.Struct, gc=False):
    answer: str
    answer_id: Any = None


class _Annotation(msgspec.Struct, gc=False):
    question_id: Id
    image_id: Id
    question_type: str
    answer_type: str
    answers: Annotated[tuple[_Answer, ...], msgspec.Meta(min_length=1, max_length=MOST_ANSWERS)]

    def __post_init__(self) -> None:
        check_texts({self.question_type, self.answer_type, *(given.answer for given in self.answers)})


class _QuestionFile(msgspec.Struct):
    entries: Annotated[list[_Asked], msgspec.Meta(min_length=1)] = msgspec.field(name="questions")


class _AnnotationFile(msgspec.Struct):
    entries: Annotated[list[_Annotation], msgspec.Meta(min_length=1)] = msgspec.field(name="annotations")


_File = TypeVar("_File", _QuestionFile, _AnnotationFile)


@dataclass(frozen=True)
class SplitFiles:
    """The raw files of a split; `images` is a pattern such as `train2014/COCO_train2014_{image_id:012d}.jpg`.

    Where a dataset names its images, it may hold `{file_name}` instead. `within` is the part of it below the folder of
    the data, which may move; all of it, if empty.
    """

    questions: Path
    annotations: Path | None
    images: str
    within: str = ""

    def image(self, image_id: int, file_name: str | None = None) -> Path:
        """Return the file of an image. Raises InputError if the pattern holds nothing that names the image."""
        _check_pattern(self.images, file_name is not None)
        return Path(self.images.format(image_id=image_id, file_name=file_name))


@cache
def _check_pattern(images: str, named: bool) -> None:
    """Allow only the number with a width of two digits: `str.format` knows attributes, items and any width."""
    without_escapes = re.sub(r"\{\{|\}\}", "", images)
    rest = re.sub(r"\{image_id(:0?\d{0,2}d?)?\}" + r"|\{file_name\}" * named, "", without_escapes)
    if rest == without_escapes or "{" in rest or "}" in rest:
        example = "{file_name}, or {image_id}" if named else "{image_id}"
        raise InputError(f"data.splits: images {images!r} must hold {example}, for example {{image_id:012d}}")


def read_questions(questions: Path, annotations: Path | None = None) -> list[Question]:
    """Read the questions of a split, in the order of the question file, with their annotations if there are any.

    Raises:
        InputError: a file is missing or malformed, an id occurs twice, or the two files do not hold the same ids.
    """
    asked = [Question(one.question_id, one.image_id, one.question) for one in _read(questions, _QuestionFile).entries]
    if annotations is None:
        return asked
    shared: dict[str, str] = {}  # equal texts are kept once
    known = {question.question_id for question in asked}
    given = {entry.question_id: entry for entry in _read(annotations, _AnnotationFile).entries}
    for missing, where, present in (
        (known - given.keys(), annotations, questions),
        (given.keys() - known, questions, annotations),
    ):
        if missing:
            raise InputError(
                f"{where}: no entry for {len(missing)} question(s) of {present.name}, the first is "
                f"{min(missing)}; both files must be of the same split"
            )
    return [_joined(question, given[question.question_id], annotations, shared) for question in asked]


def remarks(questions: Sequence[Question]) -> Iterator[str]:
    """Yield a line for each property of the questions that may surprise the user."""
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
    if others := _other_spellings(questions):
        yield (
            f"{others} question(s) have one answer throughout, in another spelling than most of its kind (as 'Yes' for "
            "'yes'): the official metric then compares the spelling, and a right answer to them scores 0 %. Spell "
            "equal answers alike."
        )
    if one_word := sum(_WITHOUT_BLANKS.search(question.text) is not None for question in questions):
        yield (
            f"{one_word} question(s) are in a script without blanks between words (Chinese, Japanese, Thai, Lao, Khmer "
            "or Burmese): all between two blanks or punctuation marks is one word. Put blanks between the words, here "
            "and in the questions you ask."
        )


def _other_spellings(questions: Sequence[Question]) -> int:
    """Count the questions whose answers all agree, in another than the most common spelling of their normal form."""
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        if len(agreed := {strip_answer(answer) for answer in question.answers}) == 1:
            spelling = agreed.pop()
            spellings[normalise_answer(spelling)][spelling] += 1
    return sum(counts.total() - max(counts.values()) for counts in spellings.values())


def _joined(question: Question, annotation: _Annotation, file: Path, shared: dict[str, str]) -> Question:
    if annotation.image_id != question.image_id:
        raise InputError(
            f"{file}: annotation of question {question.question_id}: image_id {annotation.image_id}, but the question "
            f"has {question.image_id}"
        )
    ids = {given.answer_id for given in annotation.answers if type(given.answer_id) in (int, str)}
    return msgspec.structs.replace(
        question,
        question_type=shared.setdefault(annotation.question_type, annotation.question_type),
        answer_type=shared.setdefault(annotation.answer_type, annotation.answer_type),
        answers=tuple([shared.setdefault(given.answer, given.answer) for given in annotation.answers]),
        answer_ids=len(ids) == len(annotation.answers),
    )


class _Key:
    """A key of a JSON object. No two are equal, so that a dict keeps repeated keys."""

    def __init__(self, _: type, text: str) -> None:
        self.text = text


def _read(file: Path, kind: type[_File]) -> _File:
    """Read and check an official file; each question_id occurs once."""
    text = read_text(file)
    listed = kind.__struct_encode_fields__[0]
    try:
        keys = [key.text for key in msgspec.json.decode(text, type=dict[_Key, msgspec.Raw], dec_hook=_Key)]
        if keys.count(listed) > 1:
            raise InputError(f"{file}: '{listed}' occurs twice")
        content = msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{file}: not an official VQA file: {error}") from None
    except msgspec.DecodeError as error:
        raise InputError(f"{file}: {_with_line(error, text)}") from None
    except RecursionError:
        raise InputError(f"{file}: nested too deeply") from None
    ids: set[int] = set()
    for entry in content.entries:
        if entry.question_id in ids:
            raise InputError(f"{file}: question_id {entry.question_id} occurs twice")
        ids.add(entry.question_id)
    return content


def _with_line(error: msgspec.DecodeError, text: str) -> str:
    reason, _, byte = str(error).removesuffix(")").partition(" (byte ")
    lines = text.encode()[: int(byte) if byte else None].decode(errors="ignore").split("\n")
    return f"line {len(lines)}, column {len(lines[-1]) + 1}: {reason}"


def check_texts(texts: Iterable[str]) -> None:
    """Raise ValueError if a text cannot be used."""
    for text in texts:
        if wrong := unusable(text):
            raise ValueError(f"holds a text that is {wrong}: {reprlib.repr(text)}")
