"""VQA: the loss towards the answers that people gave, and the official accuracy."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from data.question_table import QuestionTable
from experiments.tasks.task import Task
from vqa.metrics import Scores, accuracies
from vqa.text.answers import NOT_GIVEN


class VQATask(Task):
    """Questions about images, each with up to ten given answers."""

    def loss(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """`answer_loss` of the kind that the settings name."""
        return answer_loss(logits, labels, self.settings.train.loss, reduction)

    @staticmethod
    def accuracies(predictions: Sequence[str], table: QuestionTable) -> list[float]:
        """`question_accuracy` of one prediction for each question of the table, in its order.

        Raises:
            ValueError: a question has no answers.
        """
        if len(predictions) != len(table):
            raise ValueError(f"{len(predictions)} predictions for {len(table)} questions")
        return accuracies(predictions, table.spellings, table.given)


def score(predictions: Sequence[str], table: QuestionTable) -> Scores:
    """The official summary of one prediction for each question of the table, in its order."""
    return VQATask.summary(VQATask.accuracies(predictions, table), table, [])


def answer_loss(logits: Tensor, labels: Tensor, kind: str, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits [B, A] with `answer_targets`: of the batch, or [B] with `reduction` none.

    With `bce` it is binary for each answer, and summed over the answers.
    """
    targets = answer_targets(labels, logits.shape[1], kind)
    if kind == "bce":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)
        return losses if reduction == "none" else losses.mean()
    # takes logits: its own softmax is the only one
    return F.cross_entropy(logits, targets, reduction=reduction)


def answer_targets(labels: Tensor, answers: int, kind: str) -> Tensor:
    """The distribution over answer classes that a model is trained towards, or the score of each of them.

    Args:
        labels: classes of the given answers [B, K]: NO_ANSWER outside the vocabulary, NOT_GIVEN as padding.
        answers: number of classes A.
        kind: `soft` (counts clipped at 3, then normalised; the authors' code), `hard` (all on the most common
            answer, the lowest class among equals) or `bce` (each class's official accuracy; Teney et al. 2018).

    Returns:
        float32 [B, A]; with `soft` and `hard` each row sums to 1 (to 0 if no given answer is in the vocabulary).
    """
    known = (labels >= 0).float()
    counts = torch.zeros(len(labels), answers, device=labels.device)
    counts.scatter_add_(1, labels.clamp(min=0), known)
    if kind == "hard":
        return F.one_hot(counts.argmax(1), answers).float() * (counts.amax(1, keepdim=True) > 0)
    if kind == "bce":
        given = (labels != NOT_GIVEN).sum(1, keepdim=True)
        # `vqa.metrics.accuracies`: for an annotator who gave the answer, one match fewer is among the others
        total = counts * ((counts - 1) / 3).clamp(max=1) + (given - counts) * (counts / 3).clamp(max=1)
        return total / given.clamp(min=1)
    counts.clamp_(max=3)
    return counts / counts.sum(1, keepdim=True).clamp(min=1)
