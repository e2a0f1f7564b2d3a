"""Settings to a model, to the parameters it trains, and to a device: the one place where this is decided."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from data.errors import InputError
from vqa.attention import ATTENTIONS
from vqa.cbn import CategoricalPredictor, ModulationPredictor
from vqa.distributed import Processes
from vqa.model import Fusion, VQAModel
from vqa.question import KINDS, QuestionEncoder
from vqa.resnet import ConditionedNorm, ModulatedResNet
from vqa.settings import Settings, TrainSettings

WARM_UP = 0.1  # share of the steps in which a one-cycle schedule rises


def build_model(settings: Settings, vocabulary_size: int, answers: int, *, pretrained: bool) -> VQAModel:
    """The model of a recipe, with only the parameters it names trainable.

    Args:
        settings: the recipe.
        vocabulary_size: number of known words V, padding and unknown included.
        answers: number of answer classes A.
        pretrained: load the backbone's weights; False where all weights are loaded afterwards.

    Raises:
        InputError: the backbone or its weights cannot be had as named, or conditioned stages predict nothing.
    """
    weights = settings.backbone.weights if pretrained and settings.backbone.weights != "none" else None
    cbn, asked, attention, answer = settings.cbn, settings.question, settings.attention, settings.answer
    try:
        resnet = ModulatedResNet(
            settings.backbone.name,
            weights,
            cbn.stages,
            stem=cbn.stem,
            shortcuts=cbn.shortcuts,
            statistics=settings.backbone.statistics,
            normaliser=cbn.normaliser,
            fused=settings.speed.fused,
            recompute=settings.speed.recompute,
        )
    except ValueError as error:
        raise InputError(f"backbone: {error}") from None
    predictor = _build_predictor(settings, resnet.layers)
    question = None
    if "question" in settings.inputs:
        question = QuestionEncoder(
            vocabulary_size,
            asked.embedding_size,
            asked.hidden_size,
            encoder=asked.encoder,
            layers=asked.layers,
            fixed_size=asked.glove_size if asked.glove else 0,
        )
    model = VQAModel(
        question,
        resnet,
        predictor,
        ATTENTIONS[attention.kind](resnet.channels, asked.hidden_size, attention.units, attention.glimpses),
        Fusion(
            asked.hidden_size,
            resnet.channels * attention.glimpses,
            answer.fusion_size,
            answer.hidden_size,
            answers,
            dropout=answer.dropout,
        ),
        condition=cbn.condition,
        normalise=attention.normalise,
        scale=attention.scale,
        sees_image="image" in settings.inputs,
    )
    model.to(memory_format=torch.channels_last if settings.speed.channels_last else torch.contiguous_format)
    for parameter in resnet.trainable(settings.backbone.train):
        parameter.requires_grad_(True)
    return model


def _build_predictor(
    settings: Settings, layers: Sequence[ConditionedNorm]
) -> ModulationPredictor | CategoricalPredictor | None:
    cbn = settings.cbn
    if not layers:
        return None
    if cbn.normaliser == "instance" and settings.data.image_size <= 32 and any(layer.stage == 4 for layer in layers):
        raise InputError("cbn.normaliser: stage 4 has one position at 32 px, which instance norm cannot normalise")
    if set(settings.inputs) != {"image", "question"}:
        raise InputError(f"inputs: a model of {settings.inputs[0]}s alone has nothing to condition; set cbn.stages=[]")
    if not (cbn.gamma or cbn.beta):
        raise InputError("cbn: gamma and beta are both false; set cbn.stages=[] to condition nothing")
    names, channels = [layer.name for layer in layers], [layer.channels for layer in layers]
    if cbn.condition == "kind":
        return CategoricalPredictor(KINDS + 1, channels, gamma=cbn.gamma, beta=cbn.beta)
    size = settings.question.hidden_size
    return ModulationPredictor(size, names, channels, cbn.hidden_size, gamma=cbn.gamma, beta=cbn.beta)


def trained_parameters(model: VQAModel) -> list[nn.Parameter]:
    """The parameters that training changes, and only these."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def build_optimiser(settings: TrainSettings, model: VQAModel) -> torch.optim.Optimizer:
    """Adam over what training changes; the MLPs that predict the deltas may have a learning rate of their own."""
    predicting = list(model.predictor.parameters()) if model.predictor else []
    others = [parameter for parameter in trained_parameters(model) if all(parameter is not one for one in predicting)]
    groups = [
        {"params": others, "lr": settings.learning_rate},
        {"params": predicting, "lr": settings.predictor_learning_rate or settings.learning_rate},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for group in groups for parameter in group["params"])
    # one pass over parameters and moments instead of ten
    return torch.optim.Adam([group for group in groups if group["params"]], fused=fused)


def build_schedule(
    settings: TrainSettings, optimiser: torch.optim.Optimizer, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate over the `steps` of a whole run."""
    if settings.schedule == "constant":
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)
    return torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: one_cycle(step, steps))


def one_cycle(step: int, steps: int) -> float:
    """Share of the largest learning rate at a step (from 0): rises linearly in the first tenth, then falls to 0 as a
    cosine (Smith and Topin 2018).
    """
    warm = math.ceil(WARM_UP * steps)
    if step < warm:
        return (step + 1) / warm
    return (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1))) / 2


def choose_device(name: str, processes: Processes | None = None) -> torch.device:
    """The device of a `device` setting; `auto` and `cuda` take this process's GPU (`auto` only if there is one).

    Raises:
        InputError: the device is not there.
    """
    processes = processes or Processes()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and processes.world_size > 1:
        raise InputError(
            f"device: {name} cannot serve {processes.world_size} processes; device=cuda gives each its own"
        )
    if name == "cuda":
        name = f"cuda:{processes.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device {name!r}; use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not there ({torch.cuda.device_count()} GPUs found); try device=cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device: mps is not there; try device=cpu")
    return device
