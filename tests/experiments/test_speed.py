"""Every fast path through a whole training: switched off or on alone, the losses stay what they were."""

import json
import shutil

import pytest
import torch

from experiments.process_group import this_process
from experiments.tasks.vqa import VQATask
from experiments.training.run_directory import RunDirectory
from experiments.training.train import prepare, train
from vqa.build import build_model
from vqa.cbn import Modulation
from vqa.kernels.frozen_conv import Convolution
from vqa.norms import ModulatedBatchNorm2d
from vqa.resnet import ModulatedResNet, StageMap
from vqa.settings.recipes import load_settings

# small steps: rounding must not grow
SLOW = ["speed.fused=false", "speed.share_images=false", "speed.channels_last=false", "data.cache_gib=0"]
STEPS = ["train.learning_rate=1e-4", "train.predictor_learning_rate=null", "cbn.stages=[3,4]"]


def losses(tiny, folder, words, name):
    run = train(load_settings(tiny, [f"name={name}", *STEPS, *words]), runs=folder).path
    return [json.loads(line)["train_loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def slow(tiny, tmp_path_factory):
    return losses(tiny, tmp_path_factory.mktemp("slow"), SLOW, "slow")


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([word for word in SLOW if word != left_out] for left_out in SLOW),
        ["speed.fused=eager"],
        [*SLOW, "speed.recompute=[3,4]"],
        [*SLOW, "train.accumulate=3"],
        [*SLOW[:1], *SLOW[3:], "train.accumulate=3"],
    ],
    ids=lambda words: " ".join(words) or "defaults",
)
def test_a_fast_path_trains_as_the_slow_one(tiny, tmp_path, slow, words):
    assert losses(tiny, tmp_path, words, "fast") == pytest.approx(slow, rel=1e-3)


def test_questions_together_are_trained_on_all_the_same(tiny, tmp_path):
    one, other = (losses(tiny, tmp_path, [f"train.together={count}"], f"by_{count}") for count in (1, 4))
    assert one != other


@pytest.mark.parametrize("on", [True, False])
def test_each_switch_reaches_what_it_switches(tiny, tmp_path, monkeypatch, on):
    word = str(on).lower()
    words = [f"speed.fused={word}", f"speed.channels_last={word}", f"speed.recompute={[3] if on else []}"]
    words += [
        f"speed.share_images={word}",
        f"speed.compile={word}",
        "cbn.stages=[4]",
        "data.cache_gib=0",
        f"name=switched_{word}",
    ]
    compiled = []
    monkeypatch.setattr(ModulatedResNet, "compile", lambda _self: compiled.append(1))
    settings = load_settings(tiny, words)
    trainer = prepare(VQATask(settings), RunDirectory(tmp_path / settings.name), this_process())
    resnet = trainer.model.resnet
    fused = {module.fused for module in resnet.modules() if isinstance(module, Convolution | ModulatedBatchNorm2d)}
    assert fused == {on}
    assert resnet.network.get_submodule("layer4.0.conv1").weight.is_contiguous(memory_format=torch.channels_last) == on
    assert trainer.images.prepare(torch.zeros(2, 64, 64, 3, dtype=torch.uint8)).is_contiguous() != on
    assert resnet.recompute == ({3} if on else set())
    assert trainer.training.share == trainer.validation.share == on
    trainer.run_epochs()
    assert bool(compiled) == on


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, which is missing here")
def test_the_compiled_resnet_has_no_graph_break_and_the_same_gradients(tiny):
    settings = load_settings(tiny, ["cbn.stages=[4]"])
    torch.manual_seed(0)
    net = build_model(settings, 20, 10, pretrained=False).resnet
    width = sum(layer.channels for layer in net.layers)
    deltas = [0.1 * torch.randn(2, width, requires_grad=True) for _ in "γβ"]
    map_ = StageMap(3, torch.randn(2, 64, 4, 4))
    net.compile(fullgraph=True)
    compiled, net._compiled_call_impl = net._compiled_call_impl, None
    expected = torch.autograd.grad(net(map_, Modulation(*deltas)).square().sum(), deltas)
    net._compiled_call_impl = compiled
    found = torch.autograd.grad(net(map_, Modulation(*deltas)).square().sum(), deltas)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
