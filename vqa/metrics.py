"""The official accuracy of the VQA challenge (Antol et al. 2015), overall, by answer type and by question type."""

from collections import defaultdict
from collections.abc import Sequence
from typing import TypedDict

from data.answers import normalise_answer, strip_answer
from data.table import QuestionTable

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
    # an annotator who gave the predicted answer has one match fewer among the others
    return (matches * min(1, (matches - 1) / 3) + (len(answers) - matches) * min(1, matches / 3)) / len(answers)


def question_accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
    """Accuracy (0 to 1) of one prediction for each question of the table, in its order."""
    return [question_accuracy(prediction, table.answers(row)) for row, prediction in enumerate(predictions)]


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
