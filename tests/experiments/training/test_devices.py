"""A training step stays on its device: no tensor is made on another one, and no value is read from it.

torch's `meta` device, which every machine has, stands in for a GPU: it refuses operations on its tensors and on a CPU's
together, and refuses to read a value (`.item()`, a mask), for which a GPU would have to finish its work first.
"""

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from data.batches import Batch, NoImages
from experiments.tasks.vqa import answer_loss
from experiments.training.loop import answer_logits
from experiments.training.optimiser import build_optimiser
from experiments.training.stage_cache import NetworkInput
from tests.conftest import ROOT
from vqa.build import build_model
from vqa.preprocessing import Preprocessing
from vqa.settings.recipes import load_settings

META = torch.device("meta")
SMALL = (
    *("backbone.name=resnet10", "backbone.weights=none", "data.image_size=64", "cbn.hidden_size=4"),
    *("question.embedding_size=8", "question.hidden_size=12", "answer.hidden_size=8", "answer.dropout=0.5"),
)
CHOICES = [
    *(f"cbn.condition={condition}" for condition in ("question", "kind", "image", "constant", "mean_question")),
    *("cbn.condition=shuffled", "cbn.normaliser=adaptive", "cbn.normaliser=group", "cbn.stages=[3,4]"),
    *("cbn.stem=true cbn.shortcuts=true", "inputs=[image] cbn.stages=[]", "inputs=[question] cbn.stages=[]"),
    *("question.encoder=gru", "question.encoder=bag_of_words", "attention.kind=mlb", "train.loss=hard"),
    *("train.loss=bce", "speed.recompute=[2]", "speed.fused=false", "speed.channels_last=false"),
    *("backbone.train=stage4", "backbone.statistics=batch", "question.glove=vectors.txt question.glove_size=5"),
]


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """The stand-in has none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def model_of(recipe, *words):
    """A model on the stand-in, and its settings."""
    settings = load_settings(ROOT / "config" / recipe, [*SMALL, *words])
    return build_model(settings, 20, 3, pretrained=False, categories=5).to(META).train(), settings


def batch(views=(), images=3, stage=None):
    """Four questions about three images; or about maps of a stage of them."""
    shape = (images, 64, 64, 3) if stage is None else (images, 8, 8, 32)
    extras = {"spatial": torch.rand(4, 8), "category": torch.ones(4, dtype=torch.int64)} if views else {}
    return Batch(
        images=torch.ones(shape, dtype=torch.uint8 if stage is None else torch.float16),
        places=torch.ones(4, *views, dtype=torch.int64),
        tokens=torch.ones(4, 5, dtype=torch.int64),
        lengths=torch.full((4,), 5),
        labels=torch.ones(4, 10, dtype=torch.int64),
        rows=torch.arange(4),
        extras=extras,
    ).to(META)


def step(model, settings, made, stage=None):
    """A step as the trainer takes it; every trained parameter has its gradient there."""
    source = NetworkInput(NoImages(), Preprocessing(64), settings.speed.channels_last, stage)
    logits = answer_logits(model, made, source.prepare, settings.precision)
    if settings.task == "vqa":
        loss = answer_loss(logits, made.labels, settings.train.loss)
    else:
        loss = F.cross_entropy(logits, made.labels[:, 0])
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.grad.device for parameter in trained} == {META}
    nn.utils.clip_grad_norm_(trained, settings.train.clip)
    build_optimiser(settings.train, model).step()


@pytest.mark.parametrize("choice", CHOICES)
def test_a_step_stays_on_its_device(choice):
    step(*model_of("demo.yaml", *choice.split()), batch())


def test_a_step_from_stored_maps_stays_on_its_device():
    step(*model_of("demo.yaml", "cbn.stages=[3,4]"), batch(stage=2), stage=2)


@pytest.mark.parametrize("condition", ["question", "image"])
@pytest.mark.parametrize("inputs", ["crop", "crop, image, spatial, category", "spatial, category"])
def test_a_step_of_the_oracle_stays_on_its_device(inputs, condition):
    words = [f"inputs=[{inputs}, question]", f"cbn.condition={condition}"]
    views = inputs.count("crop") + inputs.count("image")
    model = model_of("guesswhat/games.yaml", *words, *([] if views else ["cbn.stages=[]"]))
    step(*model, batch(views=(max(views, 1),)))


def test_answering_stays_on_the_device_modulated_and_not():
    model, _ = model_of("demo.yaml")
    images, tokens, lengths = torch.ones(4, 3, 64, 64, device=META), *batch()[2:4]
    with torch.inference_mode():
        for modulate in (True, False):
            assert model.eval()(images, tokens, lengths, modulate=modulate).attention.device == META


def test_statistics_are_estimated_on_the_device():
    model, _ = model_of("demo.yaml", "cbn.condition=image")
    images = torch.ones(4, 3, 64, 64, device=META)
    with torch.inference_mode(), model.resnet.estimating_statistics():
        model.resnet(images)
    model.set_image_statistics([images, images])


def test_processes_exchange_batch_statistics_without_reading_a_value(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda _: None)
    step(*model_of("demo.yaml", "backbone.statistics=batch"), batch())
