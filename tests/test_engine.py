"""The training loop: its loss is that of the model's logits, and nothing not finite reaches the weights."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.images import Preprocessing
from data.loading import Batch
from vqa.engine import train_steps
from vqa.model import Output
from vqa.not_finite import NotFiniteError


class Fixed(nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))

    def forward(self, _images, tokens, _lengths, **_places):
        return Output(self.logits.expand(len(tokens), -1), torch.ones(len(tokens), 1, 1, 1), None)


def steps(model, answers, accumulate=1):
    rows = torch.arange(len(answers))
    labels = torch.tensor(answers)[:, None].expand(-1, 10)
    images = torch.zeros(len(answers), 4, 4, 3, dtype=torch.uint8)
    batch = Batch(images, rows, rows[:, None], torch.ones_like(rows), labels, rows)
    losses = []
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    train_steps(
        model,
        [batch],
        see=Preprocessing(4).normalise,
        loss="hard",
        precision="float32",
        optimiser=optimiser,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0),
        clip=5.0,
        accumulate=accumulate,
        device=torch.device("cpu"),
        after_step=losses.append,
    )
    return losses


def test_the_loss_is_the_cross_entropy_of_the_logits():
    logits = [8.0, 0.0, -3.0]
    expected = F.cross_entropy(torch.tensor([logits] * 2), torch.tensor([0, 1]))
    assert steps(Fixed(logits), [0, 1]) == [pytest.approx(expected.item())]
    assert steps(Fixed(logits), [0])[0] < 0.01  # a second softmax could not fall below 0.5


def test_parts_of_a_batch_add_up_to_it():
    one, other = Fixed([1.0, 0.0, -1.0]), Fixed([1.0, 0.0, -1.0])
    answers = [0, 1, 2, 2, 1]
    assert steps(one, answers) == [pytest.approx(steps(other, answers, accumulate=3)[0])]
    torch.testing.assert_close(one.logits, other.logits)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model = Fixed([bad, 0.0, 0.0])
    before = model.logits.detach().clone()
    with pytest.raises(NotFiniteError) as caught:
        steps(model, [1, 2])
    assert caught.value.rows == [0, 1]
    assert torch.equal(model.logits.nan_to_num(7.0), before.nan_to_num(7.0))
