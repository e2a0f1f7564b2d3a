"""The questions of one or more splits as arrays: what is stored in the h5 and what batches are made from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from tokenizers import Tokenizer

from data.vqa_files import Question
from vqa.text.answers import NO_ANSWER, normalise_answer
from vqa.text.tokenizer import encode


@dataclass(frozen=True)
class QuestionTable:
    """N questions; K answers at most are given to one, K = 0 for splits without annotations."""

    ids: np.ndarray  # int64 [N], official question ids
    images: np.ndarray  # int64 [N], rows of the images they ask about
    texts: list[str]
    tokens: np.ndarray  # int32 [sum of T], word ids of all questions, one after the other
    lengths: np.ndarray  # int32 [N]
    question_types: list[str]
    answer_types: list[str]
    given: np.ndarray  # int32 [N, K], rows of `spellings`, NO_ANSWER where fewer than K were given
    spellings: list[str]  # distinct answers as the annotators wrote them
    classes: np.ndarray  # int32 [len(spellings)], answer class of each, NO_ANSWER outside the vocabulary
    offsets: np.ndarray = field(init=False)  # int64 [N], where each question's words begin

    def __post_init__(self) -> None:
        object.__setattr__(self, "offsets", np.cumsum(self.lengths, dtype=np.int64) - self.lengths)

    def __len__(self) -> int:
        return len(self.ids)

    def words(self, row: int) -> np.ndarray:
        """Word ids of a question, int32 [T]."""
        return self.tokens[self.offsets[row] : self.offsets[row] + self.lengths[row]]

    def answers(self, row: int) -> list[str]:
        """The answers given to a question, as written."""
        return [self.spellings[place] for place in self.given[row] if place != NO_ANSWER]

    def labels(self) -> np.ndarray:
        """Class of each given answer, int32 [N, K]; NO_ANSWER outside the vocabulary."""
        return np.append(self.classes, np.int32(NO_ANSWER))[self.given]

    def select(self, rows: np.ndarray) -> "QuestionTable":
        """The table of some rows only, in their order."""
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
        )

    def encoded_with(self, tokenizer: Tokenizer) -> "QuestionTable":
        """The same questions in the words of another tokenizer."""
        tokens, lengths = encode(tokenizer, self.texts)
        return replace(self, tokens=tokens, lengths=lengths)


def question_table(
    questions: Sequence[Question], image_rows: Mapping[int, int], tokenizer: Tokenizer, vocabulary: Sequence[str]
) -> QuestionTable:
    """Puts questions into arrays.

    Args:
        questions: what `read_questions` gave.
        image_rows: row of each image id.
        tokenizer: of the training split.
        vocabulary: answer classes, in order.
    """
    tokens, lengths = encode(tokenizer, [question.text for question in questions])
    counts = np.array([len(question.answers) for question in questions], np.int64)
    listed = [answer for question in questions for answer in question.answers]
    places = {answer: place for place, answer in enumerate(dict.fromkeys(listed))}
    given = np.full((len(questions), counts.max(initial=0)), NO_ANSWER, np.int32)
    given[np.arange(given.shape[1]) < counts[:, None]] = np.fromiter(
        map(places.__getitem__, listed), np.int32, len(listed)
    )
    class_of = {normalise_answer(answer): place for place, answer in enumerate(vocabulary)}
    return QuestionTable(
        ids=np.array([question.question_id for question in questions], np.int64),
        images=np.array([image_rows[question.image_id] for question in questions], np.int64),
        texts=[question.text for question in questions],
        tokens=tokens,
        lengths=lengths,
        question_types=[question.question_type for question in questions],
        answer_types=[question.answer_type for question in questions],
        given=given,
        spellings=list(places),
        classes=np.array([class_of.get(normalise_answer(text), NO_ANSWER) for text in places], np.int32),
    )


def joined(tables: Sequence[QuestionTable]) -> QuestionTable:
    """The questions of several tables, one table after the other."""
    if len(tables) == 1:
        return tables[0]
    width = max(table.given.shape[1] for table in tables)
    given, first = [], 0
    for table in tables:
        shifted = np.where(table.given == NO_ANSWER, NO_ANSWER, table.given + np.int32(first))
        given.append(np.pad(shifted, ((0, 0), (0, width - shifted.shape[1])), constant_values=NO_ANSWER))
        first += len(table.spellings)

    def end_to_end(name: str) -> np.ndarray:
        return np.concatenate([getattr(table, name) for table in tables])

    def listed(name: str) -> list[str]:
        return [text for table in tables for text in getattr(table, name)]

    return QuestionTable(
        given=np.concatenate(given),
        **{name: end_to_end(name) for name in ("ids", "images", "tokens", "lengths", "classes")},
        **{name: listed(name) for name in ("texts", "question_types", "answer_types", "spellings")},
    )
