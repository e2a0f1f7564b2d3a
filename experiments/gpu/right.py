"""The steps of `main.py gpu-check` that check correctness on the device. Each yields rows of a table.

A step compares with float64 on the CPU, or with the same computed in another way, and raises AssertionError where the
difference is more than rounding.
"""

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches import Batch
from experiments import ROOT
from experiments.bench.loading import prepared_scenes
from experiments.bench.setup import Rows, Setup
from experiments.evaluate import evaluate
from experiments.features.networks import networks_of, open_runs, stage_features
from experiments.process_group import averaging_gradients
from experiments.recalibrate import recalibrate
from experiments.training.loop import answer_logits
from experiments.training.train import train
from vqa.build import build_model
from vqa.kernels.modulate import modulate
from vqa.norms import Modulation
from vqa.predictor import DeltaMLPs
from vqa.preprocessing import Preprocessing
from vqa.resnet import ModulatedResNet
from vqa.saved_model import load_model
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

CONFIG = ROOT / "config"
# of a network in float32: rounding moves single sums to the other side of a ReLU, where the gradient jumps
BOUNDS = {"map": 1e-3, "Δγ": 1e-2, "Δβ": 1e-2}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64; infinite where something is not finite, as `max` passes NaN over."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = (found - expected).norm() / expected.norm().clamp(min=1e-12)
    return error.nan_to_num(nan=math.inf, posinf=math.inf).item()


def check_error(name: str, error: float, bound: float) -> str:
    """Format an error; raise AssertionError unless it is within the bound."""
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.2e} is not below {bound:.0e}")
    return f"{error:.1e}"


def modulate_rows(setup: Setup) -> Rows:
    """`modulate` forward and backward: types, layouts, odd sizes, with and without a residual and a ReLU."""
    shapes = setup.pick(
        [(2, 5, 3, 7), (1, 33, 4, 4)], [(2, 5, 3, 7), (3, 64, 56, 56), (4, 160, 13, 29), (8, 2048, 7, 7)]
    )
    layouts = (torch.contiguous_format, torch.channels_last)
    cases = list(product(shapes, layouts, (False, True), (False, True)))
    # sums over positions are kept in float32, maps are rounded to their type
    for kind, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
        found = [_errors_of_modulate(setup.device, kind, *case) for case in cases]
        worst = {name: max(errors.get(name, 0.0) for errors in found) for name in found[-1]}  # it has a residual
        errors = {name: check_error(f"{kind}, {name}", error, bound) for name, error in worst.items()}
        yield {"type": str(kind).removeprefix("torch."), "cases": len(cases), **errors}


def _errors_of_modulate(
    device: torch.device,
    kind: torch.dtype,
    shape: tuple[int, ...],
    layout: torch.memory_format,
    residual: bool,
    relu: bool,
) -> dict[str, float]:
    parts = {"x": torch.randn(shape).to(kind), "scale": torch.randn(shape[:2]), "shift": torch.randn(shape[:2])}
    if residual:
        parts["residual"] = torch.randn(shape).to(kind)
    exact = [part.double().requires_grad_() for part in parts.values()]
    y = modulate(*exact, relu=relu, fused=False)
    # no gradient for elements near 0: rounding may move their sum to the other side of the ReLU
    weights = torch.randn(shape).to(kind) * (y.detach().abs() > 0.05 if relu else 1)
    expected = [y, *torch.autograd.grad(y, exact, weights.double())]

    def there(part: Tensor) -> Tensor:
        return part.to(device).contiguous(memory_format=layout) if part.ndim == 4 else part.to(device)

    inputs = [there(part).requires_grad_() for part in parts.values()]
    y = modulate(*inputs, relu=relu)
    found = [y, *torch.autograd.grad(y, inputs, there(weights))]
    return dict(zip(("y", *parts), map(relative_error, found, expected), strict=True))


def deltas_rows(setup: Setup) -> Rows:
    """The deltas of all norms in one batched product and in one product per norm, against float64."""
    network, size, hidden = setup.pick(("resnet10", 32, 16), ("resnet50", 1024, 512))
    layers = ModulatedResNet(network).layers
    mlps = DeltaMLPs(size, [layer.name for layer in layers], [layer.channels for layer in layers], hidden)
    condition = torch.randn(8, size)
    exact = mlps.double()(condition.double())
    mlps.float().to(setup.device)
    inside = torch.relu(nn.functional.linear(condition.to(setup.device), mlps.hidden_weight, mlps.hidden_bias))
    for name, way in (("one product", mlps._in_one_product), ("a product a norm", mlps._one_by_one)):
        error = check_error(name, relative_error(way(inside) + mlps.bias, exact), 1e-4)
        yield {"way": name, "norms": len(layers), "error": error}


def network_rows(setup: Setup) -> Rows:
    """The whole network with deltas, fused and composed, against float64: its map and the gradients of the deltas."""
    name, size = setup.pick(("resnet10", 64), ("resnet50", 224))
    net, inputs = _net_and_inputs(name, size)
    for norm in net.batch_norms():  # as after a training, not mean 0 and variance 1
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.uniform_(-0.5, 0.5)
    composed = ModulatedResNet(name, fused=False)
    composed.load_state_dict(net.state_dict())
    exact = _map_and_gradients(composed.double(), inputs, torch.device("cpu"))
    for way, network in (("fused", net), ("composed", composed.float())):
        found = _map_and_gradients(network, inputs, setup.device)
        yield {"way": way, **_errors_of_network(way, found, exact)}


def compile_rows(setup: Setup) -> Rows:
    """The compiled network against the uncompiled one, forward and backward."""
    name, size = setup.pick(("resnet10", 64), ("resnet18", 128))
    net, inputs = _net_and_inputs(name, size)
    start = time.monotonic()
    expected = _map_and_gradients(net, inputs, setup.device)
    net.compile(backend=setup.pick("eager", "inductor"))
    errors = _errors_of_network("compiled", _map_and_gradients(net, inputs, setup.device), expected)
    yield {"network": name, **errors, "seconds": round(time.monotonic() - start, 1)}


def _net_and_inputs(name: str, size: int) -> tuple[ModulatedResNet, list[Tensor]]:
    """A network, and random images, Δγ and Δβ."""
    net = ModulatedResNet(name)
    width = sum(layer.channels for layer in net.layers)
    return net, [torch.randn(2, 3, size, size), *(0.1 * torch.randn(2, width) for _ in "γβ")]


def _map_and_gradients(net: ModulatedResNet, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The stage-4 map and gradients of Δγ and Δβ, computed on the device in the network's type."""
    kind = next(net.parameters()).dtype
    net.to(device, memory_format=torch.channels_last)
    images, *deltas = (part.to(device, kind) for part in inputs)
    for part in deltas:
        part.requires_grad_()
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = net(images.contiguous(memory_format=torch.channels_last), Modulation(*deltas))
        return [y, *torch.autograd.grad(y, deltas, y.detach())]


def _errors_of_network(way: str, found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, str]:
    errors = zip(BOUNDS.items(), map(relative_error, found, exact), strict=True)
    return {part: check_error(f"{way}, {part}", error, bound) for (part, bound), error in errors}


def _small_settings(setup: Setup, *words: str, recipe: str = "demo.yaml") -> Settings:
    """Settings of a small MODERN in bfloat16 on synthetic scenes in this step's folder."""
    batch, images, val, side = setup.pick((8, 4, 6, 32), (64, 400, 100, 64))
    size = (f"train.batch_size={batch}", f"scenes.images={{train: {images}, val: {val}}}", f"data.image_size={side}")
    kept = ("precision=bfloat16", f"data.processes={setup.pick(1, 2)}")
    return prepared_scenes(setup, *size, *kept, *words, recipe=CONFIG / recipe)


def commands_rows(setup: Setup) -> Rows:
    """Train each task in bfloat16, then `eval`, `ask`, `inspect` and `recalibrate` the saved model and compute the
    features of each stage; on the CPU in float32 `eval` must find nearly the same answers.
    """
    yield _commands_row(setup._replace(folder=setup.folder / "vqa"), "demo.yaml", "what color is the circle?")
    games, test = setup._replace(folder=setup.folder / "guesswhat"), "scenes.images={test: 2}"
    yield _commands_row(games, "guesswhat/games.yaml", "is it red?", test, box=(8.0, 8.0, 40.0, 40.0))


def _commands_row(setup: Setup, recipe: str, question: str, *words: str, **about: Any) -> dict[str, Any]:
    """The row of a recipe; `about` is the box of the object that its question is about."""
    settings, on_cpu = _small_settings(setup, *words, recipe=recipe), setup.folder / "on_cpu"
    run = train(settings, runs=setup.folder / "runs").path
    scores = evaluate(run, "val")
    evaluate(run, "val", on_cpu, ["device=cpu", "precision=float32", "workers=0"])
    found, expected = (json.loads((folder / "results_val.json").read_text()) for folder in (run, on_cpu))
    agree = sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)
    if agree < 0.9:
        raise AssertionError(f"only {agree:.2f} of the answers are those of the CPU")
    image, saved = next((setup.folder / "scenes" / "val").glob("*.png")), load_model(run, setup.device)
    about |= {"category": saved.categories[0]} if about else {}
    here, there = (loaded.ask(image, question, 1, **about)[0]["probability"] for loaded in (saved, load_model(run)))
    layers = saved.inspect(image, question, **about)["layers"]
    networks = networks_of(open_runs([run], "val", [f"device={setup.device}"]))
    return {
        "recipe": recipe,
        "val_overall": scores["overall"],
        "answers_as_on_cpu": round(agree, 3),
        "ask_difference": check_error("ask", abs(here - there), 1e-2),
        "layers_inspected": len(layers),
        "maps_of_features": sum(len(stage_features(network)) for network in networks),
        "questions_recalibrated_on": recalibrate(run, setup.folder / "recalibrated", "train", [], batches=2),
    }


def resume_rows(setup: Setup) -> Rows:
    """End a bfloat16 training by SIGTERM in its second epoch and resume it: its loss is that of an undisturbed one."""
    words = ("train.checkpoint_every=1", "train.epochs=3")
    train(_small_settings(setup, "name=whole", *words), runs=setup.folder / "runs")
    recipe, settings = setup.folder / "resumed.yaml", _small_settings(setup, "name=resumed", *words)
    settings.save(recipe)
    command = [sys.executable, str(ROOT / "main.py"), "train", "--config", str(recipe), "--resume"]
    with subprocess.Popen(command, cwd=setup.folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if line.startswith("epoch 1/"):
                process.send_signal(signal.SIGTERM)
    if process.returncode not in (143, -signal.SIGTERM):
        raise AssertionError(f"ended with {process.returncode}, not by the signal")
    interrupted = _last_metrics(setup, "resumed")["epoch"]
    train(settings, resume=True, runs=setup.folder / "runs")
    loss, resumed = (_last_metrics(setup, name)["train_loss"] for name in ("whole", "resumed"))
    # a GPU adds up in another order each time
    difference = check_error("training loss", abs(loss - resumed) / loss, 0 if setup.device.type == "cpu" else 0.05)
    yield {"ended_in_epoch": interrupted + 1, "loss": loss, "loss_resumed": resumed, "difference": difference}


def _last_metrics(setup: Setup, name: str) -> dict[str, Any]:
    return json.loads((setup.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])


def nccl_rows(setup: Setup) -> Rows:
    """A process group of one: the wrapped model's gradients are those of the bare one, with batch statistics that are
    exchanged; objects are exchanged by a group on the host.
    """
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{setup.folder}/rendezvous", rank=0, world_size=1)
    try:
        model, batch = random_model(load_settings(CONFIG / "demo.yaml", ["backbone.weights=none"]), 4, setup.device)
        model.resnet.set_statistics("batch")
        model.train()
        wrapped = averaging_gradients(model)
        bare, averaged = (_gradient_norm(one, batch) for one in (model, wrapped))
        exchanged = [None]
        dist.all_gather_object(exchanged, backend, group=dist.new_group(backend="gloo"))
        del wrapped  # before the group: a wrapper that outlives it can abort at exit
    finally:
        dist.destroy_process_group()
    yield {"backend": exchanged[0], "error": check_error("gradients", abs(bare - averaged) / bare, 1e-4)}


def _gradient_norm(model: nn.Module, batch: Batch) -> float:
    model.zero_grad(set_to_none=True)
    prepare_images = Preprocessing(batch.images.shape[1]).normalise
    answer_logits(model, batch, prepare_images, "float32").square().sum().backward()
    return nn.utils.get_total_norm([part.grad for part in model.parameters() if part.grad is not None]).item()


def random_model(settings: Settings, batch: int, device: torch.device) -> tuple[nn.Module, Batch]:
    """A recipe's model and a batch of random questions on as many random images."""
    vocabulary, words, answers, size = 14_000, 8, settings.data.answers, settings.data.image_size
    torch.manual_seed(0)
    model = build_model(settings, vocabulary, answers, pretrained=False).to(device)
    made = Batch(
        images=torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8),
        places=torch.arange(batch),
        tokens=torch.randint(2, vocabulary, (batch, words)),
        lengths=torch.full((batch,), words),
        labels=torch.randint(0, answers, (batch, 10)),
        rows=torch.arange(batch),
        extras={},
    )
    return model, made.to(device)
