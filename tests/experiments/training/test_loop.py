"""The training loop: its loss is that of the model's logits, and nothing not finite reaches the weights."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F

from data.batches import Batch
from experiments.evaluate import split_data
from experiments.process_group import Processes
from experiments.tasks.vqa import answer_loss
from experiments.training.loop import answer_logits, predict_classes, train_steps
from experiments.training.nonfinite import NotFiniteError
from tests.conftest import ROOT
from vqa.model import Output
from vqa.preprocessing import Preprocessing
from vqa.saved_model import load_model
from vqa.settings.recipes import load_saved, load_settings


class Fixed(nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([logits]))

    def forward(self, _images, tokens, _lengths, **_places):
        return Output(self.logits.expand(len(tokens), -1), torch.ones(len(tokens), 1, 1, 1), None)


def steps(model, answers, accumulate=1, clip=5.0, skip=0):
    rows = torch.arange(len(answers))
    labels = torch.tensor(answers)[:, None].expand(-1, 10)
    images = torch.zeros(len(answers), 4, 4, 3, dtype=torch.uint8)
    batch = Batch(images, rows, rows[:, None], torch.ones_like(rows), labels, rows, {})
    words = [f"train.clip={clip}", f"train.accumulate={accumulate}", f"train.skip_not_finite={skip}"]
    settings = load_settings(ROOT / "config" / "demo.yaml", words)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimiser, 1.0)

    def loss_of(batch, reduction):
        logits = answer_logits(model, batch, Preprocessing(4).normalise, "float32")
        return answer_loss(logits, batch.labels, "hard", reduction)

    return list(train_steps(model, [batch], loss_of, settings.train, optimiser, schedule))


def test_the_loss_is_the_cross_entropy_of_the_logits():
    logits = [8.0, 0.0, -3.0]
    expected = F.cross_entropy(torch.tensor([logits] * 2), torch.tensor([0, 1]))
    assert steps(Fixed(logits), [0, 1]) == [pytest.approx(expected.item())]
    assert steps(Fixed(logits), [0])[0] < 0.01  # a second softmax could not fall below 0.5


def test_a_gradient_is_clipped_to_the_norm_that_the_settings_name():
    model = Fixed([8.0, 0.0, -3.0])
    before = model.logits.detach().clone()
    steps(model, [1], clip=0.25)
    assert (model.logits - before).norm().item() == pytest.approx(0.1 * 0.25, rel=1e-4)  # the learning rate is 0.1


def test_parts_of_a_batch_add_up_to_it():
    one, other = Fixed([1.0, 0.0, -1.0]), Fixed([1.0, 0.0, -1.0])
    answers = [0, 1, 2, 2, 1]
    assert steps(one, answers) == [pytest.approx(steps(other, answers, accumulate=3)[0])]
    torch.testing.assert_close(one.logits, other.logits)


def test_processes_exchange_gradients_once_a_step_however_many_parts_it_has(tmp_path):
    exchanged = []

    def count(_state, bucket):
        exchanged.append(bucket.buffer().clone())
        return allreduce_hook(None, bucket)

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        logits = [1.0, 0.0, -1.0]
        for parts in (1, 3):
            wrapped, plain = nn.parallel.DistributedDataParallel(Fixed(logits)), Fixed(logits)
            wrapped.register_comm_hook(None, count)
            losses = steps(wrapped, [0, 1, 2, 2, 1], parts)
            assert losses == [pytest.approx(loss) for loss in steps(plain, [0, 1, 2, 2, 1])]
            torch.testing.assert_close(wrapped.module.logits, plain.logits)
    finally:
        dist.destroy_process_group()
    one, whole = exchanged
    torch.testing.assert_close(one, whole)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(bad):
    model = Fixed([bad, 0.0, 0.0])
    before = model.logits.detach().clone()
    with pytest.raises(NotFiniteError) as caught:
        steps(model, [1, 2])
    assert caught.value.rows == [0, 1]
    assert torch.equal(model.logits.nan_to_num(7.0), before.nan_to_num(7.0))


def test_a_loss_that_is_not_finite_is_not_skipped_where_the_gradient_is():
    """Other processes have the same gradient, and would take the step."""
    with pytest.raises(NotFiniteError, match="the loss is inf"):
        steps(Fixed([3e38, -3e38, 0.0]), [1], skip=1)


def test_steps_are_taken_with_dropout_after_a_validation_too():
    model, modes = Fixed([1.0, 0.0]).eval(), []
    model.register_forward_hook(lambda module, *_: modes.append(module.training))
    steps(model, [0, 1])
    assert modes == [True]


def test_answers_are_predicted_without_dropout_whatever_the_mode_of_the_model(trained):
    saved = load_model(trained / "model", torch.device("cpu"))
    settings = load_saved(trained / "model" / "config.yaml", ["workers=0"])
    modes = []

    def see(images):
        modes.append(saved.model.fusion.training)
        return saved.preprocessing.normalise(images)

    saved.model.train()
    predict_classes(saved.model, split_data(saved, settings, "val"), settings, Processes(), prepare_images=see, what="")
    assert set(modes) == {False}


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc on this machine")
def test_what_is_kept_of_answered_batches_holds_no_file_of_a_worker_open(trained):
    saved = load_model(trained / "model", torch.device("cpu"))
    settings = load_saved(trained / "model" / "config.yaml", ["train.batch_size=1", "workers=1"])
    data = split_data(saved, settings, "train")
    opened = []

    def see(images):
        opened.append(len(list(Path("/proc/self/fd").iterdir())))
        return saved.preprocessing.normalise(images)

    classes = predict_classes(saved.model, data, settings, Processes(), prepare_images=see, what="")
    assert len(opened) == len(data) == len(classes) >= 40
    assert opened[-1] < opened[3] + 20
