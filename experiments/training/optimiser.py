"""The optimiser and the learning rate of a run."""

import math

import torch
from torch import nn

from vqa.model import ConditionedModel
from vqa.settings.schema import TrainSettings

WARM_UP = 0.1  # share of the steps in which a one-cycle schedule rises


def trained_parameters(model: ConditionedModel) -> list[nn.Parameter]:
    """The parameters that training changes."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimiser(settings: TrainSettings, model: ConditionedModel) -> torch.optim.Optimizer:
    """The optimiser over what training changes; the MLPs that predict the deltas may have their own learning rate.

    Weight decay shrinks the weights themselves with AdamW and is a part of the gradient with Adam and Adamax, as in
    torch; biases, γ and β have none.
    """
    predicting = list(model.predictor.parameters()) if model.predictor else []
    own = set(predicting)
    others = [parameter for parameter in trained_parameters(model) if parameter not in own]
    rates = (settings.learning_rate, settings.predictor_learning_rate or settings.learning_rate)
    groups = []
    for group, rate in zip((others, predicting), rates, strict=True):
        parts = [(group, settings.weight_decay)]
        if settings.weight_decay:
            matrices, vectors = ([one for one in group if (one.dim() > 1) is many] for many in (True, False))
            parts = [(matrices, settings.weight_decay), (vectors, 0.0)]
        groups += [{"params": part, "lr": rate, "weight_decay": decay} for part, decay in parts if part]
    if settings.optimiser == "adamax":
        return torch.optim.Adamax(groups)
    fused = others[0].device.type in ("cpu", "cuda")  # one pass over parameters and moments instead of ten
    return (torch.optim.AdamW if settings.optimiser == "adamw" else torch.optim.Adam)(groups, fused=fused)


def build_schedule(
    settings: TrainSettings, optimiser: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the `steps` of a whole run: constant, or multiplied by `rate_factor`."""
    if settings.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(settings, step, steps))


def rate_factor(settings: TrainSettings, step: int, steps: int) -> float:
    """Share of the largest learning rate at a step (from 0): a linear rise, then a cosine to 0, or constant steps.

    `one_cycle` (Smith and Topin 2018) is `cosine` (Loshchilov and Hutter 2017) with its own warm-up.
    """
    warm = math.ceil((WARM_UP if settings.schedule == "one_cycle" else settings.warm_up) * steps)
    if step < warm:
        return (step + 1) / warm
    if settings.schedule == "steps":
        return settings.decay_by ** sum(step >= share * steps for share in settings.decay_at)
    return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2
