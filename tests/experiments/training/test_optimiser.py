"""Optimisers and schedules are those of torch, with another learning rate for the predicting MLPs."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, MultiStepLR, SequentialLR

from experiments.training.optimiser import build_optimiser, build_schedule, rate_factor, trained_parameters
from vqa.build import build_model
from vqa.settings.recipes import load_settings


def test_the_predicting_mlps_can_have_a_learning_rate_of_their_own(tiny):
    settings = load_settings(tiny, ["train.learning_rate=0.5", "train.predictor_learning_rate=0.25"])
    model = build_model(settings, 20, 10, pretrained=False)
    optimiser = build_optimiser(settings.train, model)
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    names = {id(p): name for name, p in model.named_parameters()}
    assert {rates[key] for key in rates if names[key].startswith("predictor.")} == {0.25}
    assert {rates[key] for key in rates if not names[key].startswith("predictor.")} == {0.5}
    assert rates.keys() == {id(p) for p in trained_parameters(model)}


@pytest.mark.parametrize(
    ("name", "reference"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("adamax", torch.optim.Adamax)]
)
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_optimisers_are_torchs_and_decay_no_biases_and_norms(tiny, name, reference, decay):
    words = [f"train.optimiser={name}", f"train.weight_decay={decay}", "backbone.train=batchnorm"]
    settings = load_settings(tiny, [*words, "train.learning_rate=0.5", "train.predictor_learning_rate=0.25"])
    model = build_model(settings, 20, 10, pretrained=False)
    copy = build_model(settings, 20, 10, pretrained=False)
    copy.load_state_dict(model.state_dict())
    predicting = {id(parameter) for parameter in copy.predictor.parameters()}
    groups = [
        {"params": [parameter], "lr": 0.25 if id(parameter) in predicting else 0.5, "weight_decay": decay * (rank > 1)}
        for parameter in trained_parameters(copy)
        for rank in [parameter.dim()]
    ]
    optimisers = build_optimiser(settings.train, model), reference(groups)
    for step in range(3):
        for optimiser, of in zip(optimisers, (model, copy), strict=True):
            torch.manual_seed(step)
            for parameter in trained_parameters(of):
                parameter.grad = torch.randn(parameter.shape)
            optimiser.step()
    ours, theirs = model.state_dict(), copy.state_dict()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, msg=key)


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 11, 1000])
def test_one_cycle_rises_then_falls_to_zero(tiny, steps):
    settings = load_settings(tiny, ["train.schedule=one_cycle"]).train
    factors = [rate_factor(settings, step, steps) for step in range(steps)]
    assert max(factors) == 1.0
    peak = factors.index(1.0)
    assert peak == math.ceil(0.1 * steps) - 1  # after a tenth of the steps
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert 0 <= rate_factor(settings, steps, steps) < 1e-9 or steps == 1


@pytest.mark.parametrize("warm_up", [0.0, 0.25])
@pytest.mark.parametrize("name", ["cosine", "steps"])
def test_schedules_are_torchs(tiny, name, warm_up):
    words = [f"train.schedule={name}", f"train.warm_up={warm_up}"]
    words += ["train.decay_at=[0.5, 0.8]", "train.decay_by=0.2"] if name == "steps" else []
    steps, warm = 20, int(20 * warm_up)
    ours, theirs = (torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3) for _ in range(2))
    schedule = build_schedule(load_settings(tiny, words).train, ours, steps)
    if name == "cosine":
        reference = CosineAnnealingLR(theirs, steps - warm)
    else:
        reference = MultiStepLR(theirs, [10 - warm, 16 - warm], gamma=0.2)
    if warm:
        rise = LinearLR(theirs, start_factor=1 / warm, total_iters=warm - 1)
        reference = SequentialLR(theirs, [rise, reference], [warm])
    for step in range(steps):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"]), step
        for optimiser, following in ((ours, schedule), (theirs, reference)):
            optimiser.step()
            following.step()
