"""The losses: soft and hard targets, and binary cross-entropy with official accuracies."""

import pytest
import torch
from torch import nn

from experiments.tasks.vqa import answer_loss, answer_targets
from vqa.metrics import question_accuracy
from vqa.text.answers import NO_ANSWER, NOT_GIVEN


def test_soft_targets_clip_counts_at_three():
    labels = torch.tensor([[0] * 8 + [1] * 2, [2] * 10, [0] + [NO_ANSWER] * 9, [NO_ANSWER] * 10])
    targets = answer_targets(labels, 4, "soft")
    torch.testing.assert_close(targets, torch.tensor([[0.6, 0.4, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0.0]]))


@pytest.mark.parametrize(
    "given", [["a"] * 10, ["a"] * 4 + ["b"] * 3 + ["c"] * 2 + ["other"], ["a", "b", "b"], ["other", "a"], ["a"]]
)
def test_bce_sums_over_answers_with_the_official_accuracy_of_each_as_its_target(given):
    answers = ["a", "b", "c", "d"]
    labels = [answers.index(answer) if answer in answers else NO_ANSWER for answer in given]
    labels = torch.tensor([labels + [NOT_GIVEN] * (10 - len(given))] * 2)
    targets = torch.tensor([[question_accuracy(answer, given) for answer in answers]] * 2)
    torch.testing.assert_close(answer_targets(labels, 4, "bce"), targets)
    logits = torch.tensor([[3.0, -2.0, 0.5, 0.0], [0.0, 1.0, -90.0, 90.0]])
    summed = nn.BCEWithLogitsLoss(reduction="sum")
    expected = torch.stack([summed(logits[row], targets[row]) for row in range(2)])
    torch.testing.assert_close(answer_loss(logits, labels, "bce", "none"), expected)
    torch.testing.assert_close(answer_loss(logits, labels, "bce"), expected.mean())


def test_hard_targets_are_the_most_common_answer():
    labels = torch.tensor([[0] * 4 + [1] * 6, [NO_ANSWER] * 9 + [3], [NO_ANSWER] * 10, [2] * 5 + [1] * 5])
    assert answer_targets(labels, 4, "hard").tolist() == [[0, 1, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]
