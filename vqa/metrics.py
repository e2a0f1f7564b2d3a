"""The official accuracy of the VQA challenge (Antol et al. 2015), overall, by answer type and by question type."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

from vqa.text.answers import NO_ANSWER, normalise_answer, strip_answer

__all__ = ["Scores", "accuracies", "by_kind", "normalise_answer", "question_accuracy", "summary"]


class Scores(TypedDict):
    """Mean accuracies in percent."""

    questions: int
    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]


def question_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, number of the *others* who gave the predicted answer / 3), 0.0 to 1.0.

    As in the official code, neither answers nor prediction are normalised if all annotators wrote the same.

    Raises:
        ValueError: there are no answers.
    """
    return accuracies([prediction], answers, np.arange(len(answers))[None])[0]


def accuracies(predictions: Sequence[str], spellings: Sequence[str], rows: np.ndarray) -> list[float]:
    """`question_accuracy` of N predictions; `rows` [N, K] index the given answers in `spellings`, or are NO_ANSWER.

    Raises:
        ValueError: a question has no answers.
    """
    given = rows != NO_ANSWER
    count = given.sum(1)
    if not count.all():
        raise ValueError("accuracy needs at least one given answer")
    plain, right = _matches(strip_answer, predictions, spellings, rows)
    alike = ((plain == plain[:, :1]) | ~given).all(1)
    if not alike.all():
        right[~alike] = _matches(normalise_answer, predictions, spellings, rows)[1][~alike]
    matches = (right & given).sum(1)
    # for an annotator who gave the predicted answer, one match fewer is among the others
    total = matches * np.minimum(1, (matches - 1) / 3) + (count - matches) * np.minimum(1, matches / 3)
    return (total / count).tolist()


def _matches(
    form: Callable[[str], str], predictions: Sequence[str], spellings: Sequence[str], rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A number for the form of each given answer, int64 [N, K], and whether the prediction has it, bool [N, K].

    Each distinct text is converted once.
    """
    numbers: dict[str, int] = {}
    of_text = {text: numbers.setdefault(form(text), len(numbers)) for text in {*spellings, *predictions}}
    given = np.array([of_text[text] for text in spellings], np.int64)[rows]
    return given, given == np.array([of_text[prediction] for prediction in predictions], np.int64)[:, None]


def summary(accuracies: Sequence[float], answer_types: Sequence[str], question_types: Sequence[str]) -> Scores:
    """The official summary of N accuracies (0 to 1), each with its question's types."""
    return {
        "questions": len(accuracies),
        "overall": _percent(accuracies),
        "per_answer_type": by_kind(answer_types, accuracies),
        "per_question_type": by_kind(question_types, accuracies),
    }


def by_kind(kinds: Sequence[str], accuracies: Sequence[float]) -> dict[str, float]:
    """The mean of the accuracies (0 to 1) of each kind of questions, in percent."""
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, accuracy in zip(kinds, accuracies, strict=True):
        groups[kind].append(accuracy)
    return {kind: _percent(group) for kind, group in sorted(groups.items())}


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 6)
