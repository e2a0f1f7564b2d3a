"""The official accuracy of the VQA challenge (Antol et al. 2015), overall, by answer type and by question type."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypedDict

import numpy as np

from data.answers import normalise_answer, strip_answer
from data.table import NO_ANSWER, QuestionTable

__all__ = ["Scores", "normalise_answer", "question_accuracies", "question_accuracy", "score", "summary"]


class Scores(TypedDict):
    """Mean accuracies in percent."""

    questions: int
    overall: float
    per_answer_type: dict[str, float]
    per_question_type: dict[str, float]


def question_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Mean over the annotators of min(1, how many of the *others* gave the predicted answer / 3), 0.0 to 1.0.

    As in the official code nothing is normalised, the prediction included, where all annotators wrote the same.

    Raises:
        ValueError: there are no answers.
    """
    if not answers:
        raise ValueError("accuracy needs at least one given answer")
    prediction, answers = strip_answer(prediction), [strip_answer(answer) for answer in answers]
    if len(set(answers)) > 1:
        prediction, answers = normalise_answer(prediction), [normalise_answer(answer) for answer in answers]
    matches = answers.count(prediction)
    return float(_mean_over_annotators(np.array(matches), np.array(len(answers))))


def question_accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
    """Accuracy (0 to 1) of one prediction for each question of the table, in its order.

    `question_accuracy` of all at once: each different text is normalised once, and texts are compared as numbers.

    Raises:
        ValueError: a question has no answers.
    """
    if len(predictions) != len(table):
        raise ValueError(f"{len(predictions)} predictions for {len(table)} questions")
    given = table.given != NO_ANSWER
    counts = given.sum(1)
    if not counts.all():
        raise ValueError("accuracy needs at least one given answer")
    if not len(table):
        return []
    plain, right = _matches(strip_answer, predictions, table)
    alike = ((plain == plain[:, :1]) | ~given).all(1)
    if not alike.all():
        right[~alike] = _matches(normalise_answer, predictions, table)[1][~alike]
    matches = (right & given).sum(1)
    return _mean_over_annotators(matches, counts).tolist()


def _matches(form: Callable[[str], str], predictions: Sequence[str], table: QuestionTable) -> tuple[np.ndarray, ...]:
    """A number for the form of each given answer, int64 [N, K], and whether it is the prediction's, bool [N, K]."""
    numbers: dict[str, int] = {}
    of_text = {text: numbers.setdefault(form(text), len(numbers)) for text in {*table.spellings, *predictions}}
    given = np.array([of_text[text] for text in table.spellings])[table.given]
    return given, given == np.array([of_text[prediction] for prediction in predictions])[:, None]


def _mean_over_annotators(matches: np.ndarray, count: np.ndarray) -> np.ndarray:
    """An annotator who gave the predicted answer has one match fewer among the others."""
    right = matches * np.minimum(1, (matches - 1) / 3)
    return (right + (count - matches) * np.minimum(1, matches / 3)) / count


def score(predictions: Sequence[str], table: QuestionTable) -> Scores:
    """The official summary of one prediction for each question of the table, in its order."""
    return summary(question_accuracies(predictions, table), table)


def summary(accuracies: Sequence[float], table: QuestionTable) -> Scores:
    """The official summary of the accuracy (0 to 1) of each question of the table, in its order."""
    return {
        "questions": len(accuracies),
        "overall": _percent(accuracies),
        "per_answer_type": _by(table.answer_types, accuracies),
        "per_question_type": _by(table.question_types, accuracies),
    }


def _by(types: Sequence[str], accuracies: Sequence[float]) -> dict[str, float]:
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, accuracy in zip(types, accuracies, strict=True):
        groups[kind].append(accuracy)
    return {kind: _percent(group) for kind, group in sorted(groups.items())}


def _percent(accuracies: Sequence[float]) -> float:
    return round(100 * sum(accuracies) / len(accuracies), 6)
