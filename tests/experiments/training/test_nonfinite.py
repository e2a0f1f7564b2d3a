"""Values that are not finite: located in the network, by question; skipped where a setting allows it."""

import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from experiments import evaluate
from experiments.training.checkpoint import load_checkpoint
from experiments.training.nonfinite import first_place
from experiments.training.train import train
from experiments.training.trainer import Trainer
from tests.runs import lines
from vqa.backbone import build_resnet
from vqa.cbn import ConditionalBatchNorm2d, ConditionalInstanceNorm2d
from vqa.io.errors import InputError
from vqa.io.processes import Interrupted
from vqa.question import QuestionEncoder
from vqa.settings.recipes import load_settings
from vqa.text.tokenizer import UNKNOWN_ID

pytestmark = pytest.mark.usefixtures("listening")


def spoil(monkeypatch, at):
    """The question encoder returns NaN for the second question of a batch, in the calls of training `at` (from 0)."""
    forward, calls = QuestionEncoder.forward, []

    def spoilt(self, tokens, lengths):
        embedding = forward(self, tokens, lengths)
        if self.training and torch.is_grad_enabled():
            calls.append(len(calls))
        if calls and calls[-1] in at and self.training:
            embedding = embedding.clone()
            embedding[1] = torch.nan
        return embedding

    monkeypatch.setattr(QuestionEncoder, "forward", spoilt)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_module_and_question(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, at=[1])
    with pytest.raises(InputError) as caught:
        train(load_settings(tiny, ["name=wild"]), runs=tmp_path)
    said = str(caught.value)
    assert "wild: epoch 1, step 2: the loss is nan; first not finite: the output of question (quest" in said
    assert re.search(r"\(questions \d+\);", said)  # the one whose own loss it is
    assert "train.skip_not_finite skips such steps; the last checkpoint is kept" in said


def test_weights_that_are_not_finite_are_named(tiny, tmp_path):
    wild = ["name=wild", "train.learning_rate=1e30", "train.clip=1e30", "train.epochs=2", "cbn.stages=[]"]
    with pytest.raises(InputError, match=r"the loss is (nan|inf); first not finite: the (output|weights) "):
        train(load_settings(tiny, wild), runs=tmp_path)


@pytest.mark.parametrize("statistics", ["population", "batch"])
def test_a_bad_step_is_skipped_where_it_may_be(tiny, tmp_path, monkeypatch, capsys, statistics):
    words = ["train.skip_not_finite=1", f"backbone.statistics={statistics}", "train.schedule=constant"]
    with monkeypatch.context() as patched:
        spoil(patched, at=[1])
        run = train(load_settings(tiny, ["name=one", *words]), runs=tmp_path).path
    told = capsys.readouterr().out
    assert "step 2: the loss is nan" in told
    assert "this step is skipped" in told
    (line,) = lines(run)
    assert (line["steps"], line["steps_left_out"]) == (3, 1)
    assert np.isfinite(line["train_loss"])
    weights = load_file(run / "model" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_signal_in_a_step_that_is_skipped_ends_the_run_after_it(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, at=[1, 2])
    skip = Trainer._skip

    def signalled(self, error):
        os.kill(os.getpid(), signal.SIGTERM)
        skip(self, error)

    monkeypatch.setattr(Trainer, "_skip", signalled)
    words = ["name=wild", "train.skip_not_finite=9", "train.schedule=constant"]
    with pytest.raises(Interrupted):
        train(load_settings(tiny, words), runs=tmp_path)
    progress = load_checkpoint(tmp_path / "wild/checkpoints/last.pt")["progress"]
    assert (progress["epoch"], progress["step"], progress["skipped"]) == (1, 2, 1)
    monkeypatch.setattr(Trainer, "_skip", skip)
    for epochs in (1, 2):  # in the epoch with the skipped steps, and after it
        run = train(load_settings(tiny, [*words, f"train.epochs={epochs}"]), resume=True, runs=tmp_path).path
    assert [(line["steps"], line["steps_left_out"]) for line in lines(run)] == [(3, 2), (3, 0)]


def test_one_bad_step_too_many_stops(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, at=[0, 1])
    with pytest.raises(InputError, match="step 2: the loss is nan"):
        train(load_settings(tiny, ["name=wild", "train.skip_not_finite=1"]), runs=tmp_path)


def test_a_run_that_stopped_resumes_without_the_bad_step(tiny, tmp_path, monkeypatch):
    words = ["name=stopped", "train.checkpoint_every=1", "train.schedule=constant"]
    with monkeypatch.context() as patched:
        spoil(patched, at=[1])
        with pytest.raises(InputError, match="step 2: the loss is nan"):
            train(load_settings(tiny, words), runs=tmp_path)
        spoil(patched, at=[1])
        settings = load_settings(tiny, [*words, "train.skip_not_finite=1"])
        run = train(settings, resume=True, runs=tmp_path).path
    (line,) = lines(run)
    assert (line["steps"], line["steps_left_out"]) == (3, 1)


def test_an_epoch_of_bad_steps_stops(tiny, tmp_path, monkeypatch):
    spoil(monkeypatch, at=[0, 1, 2])
    with pytest.raises(InputError, match="no step of epoch 1 was finite"):
        train(load_settings(tiny, ["name=wild", "train.skip_not_finite=9"]), runs=tmp_path)


def test_the_first_place_is_the_innermost_and_earliest():
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2))
    x = torch.tensor([[1.0, torch.inf]])
    assert first_place(net, lambda: net(x)) == "the output of 0.0"
    assert first_place(net, lambda: net(torch.ones(1, 2))) is None
    net[1].bias.data[0] = torch.nan
    assert first_place(net, lambda: net(x)) == "the weights 1.bias"
    assert not any(module._forward_hooks for module in net.modules())


def test_a_model_of_damaged_weights_answers_nothing(refused, trained, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(trained / "model", copy)
    state = load_file(copy / "model.safetensors")
    state["fusion.question.weight"][0, 0] = torch.nan
    save_file(state, copy / "model.safetensors", {"training": '{"trained_on": ["train"]}'})
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    said = refused("ask", "--run", copy, "--image", tmp_path / "black.png", "--question", "what color is it?")
    assert "not finite; its weights are damaged" in said
    said = refused("eval", "--run", copy, "--out", tmp_path / "out")
    assert "not finite for 16 question(s) (questions " in said
    assert not list((tmp_path / "out").iterdir())


def test_scores_that_are_not_finite_are_no_answers(refused, trained, tmp_path, monkeypatch):
    forward = QuestionEncoder.forward

    def overflowing(self, tokens, lengths):
        embedding = forward(self, tokens, lengths)
        embedding[1] = torch.inf
        return embedding

    monkeypatch.setattr(QuestionEncoder, "forward", overflowing)
    said = refused("eval", "--run", trained, "--out", tmp_path / "out")
    assert re.search(r"scores of the answers are not finite for 1 question\(s\) \(questions \d+\)", said)
    assert not (tmp_path / "out" / "metrics_val.json").exists()


@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_mean", "bn1.running_var"])
def test_a_backbone_of_damaged_weights_is_refused(tmp_path, name):
    state = build_resnet("resnet10").state_dict()
    state[name].flatten()[0] = -1.0 if name.endswith("var") else torch.nan
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=f"damaged weights: {name}"):
        build_resnet("resnet10", tmp_path / "bad.safetensors")


@pytest.mark.parametrize("kind", [ConditionalBatchNorm2d, ConditionalInstanceNorm2d])
def test_a_constant_map_and_zero_variance_stay_finite(kind):
    torch.manual_seed(0)
    norm = kind(3, 4, 5).train()
    if hasattr(norm, "running_var") and norm.running_var is not None:
        norm.running_var.zero_()
    x, condition = torch.full((2, 3, 4, 4), 7.0, requires_grad=True), torch.randn(2, 4, requires_grad=True)
    for mode in (True, False):
        y = norm.train(mode)(x, condition)
        gradients = torch.autograd.grad(y.square().sum(), [x, condition, *norm.parameters()], allow_unused=True)
        assert all(value.isfinite().all() for value in (y, *gradients) if value is not None)


def test_a_constant_image_has_answers(done, trained, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "black.png")
    ended = done("ask", "--run", trained, "--image", tmp_path / "black.png", "--question", "what color is it?")
    assert "nan" not in ended.out


def test_unknown_words_and_answers_are_reported(done, trained, tmp_path, monkeypatch):
    split_data = evaluate.split_data

    def strange(*arguments):
        data = split_data(*arguments)
        table = data.table
        words = np.full_like(table.tokens, UNKNOWN_ID)
        words[: table.lengths[0]] = table.words(0)
        # the classes stay: an h5 file's are those of its own vocabulary, not of the model's
        data.table = replace(table, tokens=words, spellings=[f"none {text}" for text in table.spellings])
        return data

    monkeypatch.setattr(evaluate, "split_data", strange)
    ended = done("eval", "--run", trained, "--out", tmp_path / "out")
    assert "all words of 23 of 24 questions are unknown to the model" in ended.out
    assert "none of the given answers is among the model's" in ended.out
