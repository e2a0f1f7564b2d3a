"""The questions of one or more splits as arrays, as the h5 file stores them and batches use them."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from tokenizers import Tokenizer

from data.vqa_files import Question
from vqa.text.answers import NO_ANSWER, NOT_GIVEN, normalise_answer, strip_answer
from vqa.text.tokenizer import encode

ARRAYS = ("ids", "images", "tokens", "lengths", "given", "classes")  # of a table
TEXTS = ("texts", "question_types", "answer_types", "spellings")  # its lists of texts


@dataclass(frozen=True)
class QuestionTable:
    """N questions with at most K answers each; K = 0 for splits without annotations."""

    ids: np.ndarray  # int64 [N], official question ids
    images: np.ndarray  # int64 [N], row of each question's image, or [N, V] where a question has several
    texts: list[str]
    tokens: np.ndarray  # int32 [sum of lengths], word ids of all questions, concatenated
    lengths: np.ndarray  # int32 [N]
    question_types: list[str]
    answer_types: list[str]
    given: np.ndarray  # int32 [N, K], indices into `spellings`, padded with NO_ANSWER
    spellings: list[str]  # the distinct answers as annotators wrote them
    classes: np.ndarray  # int32 [len(spellings)], class of each, NO_ANSWER outside the vocabulary
    extras: dict[str, np.ndarray] = field(default_factory=dict)  # [N, …] each: what else a task's model takes, by name

    @cached_property
    def offsets(self) -> np.ndarray:
        """Index in `tokens` of each question's first word, int64 [N]."""
        return np.cumsum(self.lengths, dtype=np.int64) - self.lengths

    def __len__(self) -> int:
        return len(self.ids)

    def words(self, row: int) -> np.ndarray:
        """Return the word ids of a question, int32 [T]."""
        return self.tokens[self.offsets[row] : self.offsets[row] + self.lengths[row]]

    def answers(self, row: int) -> list[str]:
        """Return the answers given to a question, as written."""
        return [self.spellings[place] for place in self.given[row] if place != NO_ANSWER]

    def labels(self) -> np.ndarray:
        """Return the class of each given answer, int32 [N, K]; NO_ANSWER outside the vocabulary, NOT_GIVEN pads."""
        return np.append(self.classes, np.int32(NOT_GIVEN))[self.given]

    def select(self, rows: np.ndarray) -> "QuestionTable":
        """Return the table of some rows, in their order."""
        lengths = self.lengths[rows]
        begins = self.offsets[rows] - (np.cumsum(lengths, dtype=np.int64) - lengths)
        return replace(
            self,
            ids=self.ids[rows],
            images=self.images[rows],
            texts=[self.texts[row] for row in rows],
            tokens=self.tokens[np.arange(lengths.sum()) + np.repeat(begins, lengths)],
            lengths=lengths,
            question_types=[self.question_types[row] for row in rows],
            answer_types=[self.answer_types[row] for row in rows],
            given=self.given[rows],
            extras={name: values[rows] for name, values in self.extras.items()},
        )

    def encoded_with(self, tokenizer: Tokenizer) -> "QuestionTable":
        """Return the same questions, encoded with another tokenizer."""
        tokens, lengths = encode(tokenizer, self.texts)
        return replace(self, tokens=tokens, lengths=lengths)


def question_table(
    questions: Sequence[Question], images: np.ndarray, tokenizer: Tokenizer, vocabulary: Sequence[str]
) -> QuestionTable:
    """Make the table of questions; `images` are the rows of their images, `vocabulary` the answers by class."""
    tokens, lengths = encode(tokenizer, [question.text for question in questions])
    counts = np.array([len(question.answers) for question in questions], np.int64)
    listed = [answer for question in questions for answer in question.answers]
    spellings = {answer: index for index, answer in enumerate(dict.fromkeys(listed))}
    given = np.full((len(questions), counts.max(initial=0)), NO_ANSWER, np.int32)
    given[np.arange(given.shape[1]) < counts[:, None]] = [spellings[answer] for answer in listed]
    class_of = {normalise_answer(answer): class_ for class_, answer in enumerate(vocabulary)}
    # an empty answer has none: once normalised it is the same text as an article, such as "the", which may be a class
    normalised = [normalise_answer(text) if strip_answer(text) else None for text in spellings]
    return QuestionTable(
        ids=np.array([question.question_id for question in questions], np.int64),
        images=images,
        texts=[question.text for question in questions],
        tokens=tokens,
        lengths=lengths,
        question_types=[question.question_type for question in questions],
        answer_types=[question.answer_type for question in questions],
        given=given,
        spellings=list(spellings),
        classes=np.array([class_of.get(text, NO_ANSWER) for text in normalised], np.int32),
    )


def joined(tables: Sequence[QuestionTable]) -> QuestionTable:
    """Concatenate tables of questions."""
    width = max(table.given.shape[1] for table in tables)
    given, first = [], 0
    for table in tables:
        shifted = np.where(table.given == NO_ANSWER, NO_ANSWER, table.given + np.int32(first))
        given.append(np.pad(shifted, ((0, 0), (0, width - shifted.shape[1])), constant_values=NO_ANSWER))
        first += len(table.spellings)
    arrays = [name for name in ARRAYS if name != "given"]
    return QuestionTable(
        given=np.concatenate(given),
        extras={name: np.concatenate([table.extras[name] for table in tables]) for name in tables[0].extras},
        **{name: np.concatenate([getattr(table, name) for table in tables]) for name in arrays},
        **{name: [text for table in tables for text in getattr(table, name)] for name in TEXTS},
    )
