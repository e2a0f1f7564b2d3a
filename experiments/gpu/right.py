"""The steps of `main.py gpu-check` that say whether all is right on the device. Each gives rows for a table.

A step compares with float64 on the CPU, or with the same computed in another way, and raises AssertionError where they
differ by more than rounding.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from data.batches import Batch
from experiments import ROOT
from experiments.training.trainer import train
from vqa.build import build_model
from vqa.cbn import ModulationPredictor
from vqa.kernels.modulate import modulate
from vqa.norms import Modulation
from vqa.resnet import ModulatedResNet
from vqa.saved_model import load_bundle
from vqa.settings.recipes import load_settings
from vqa.settings.schema import Settings

CONFIG = ROOT / "config"
MAIN = CONFIG.parent / "main.py"
Rows = list[dict[str, Any]]


class Check(NamedTuple):
    """What a step is given."""

    device: torch.device
    tiny: bool  # small sizes: whether it runs, on a CPU in minutes
    folder: Path  # for data and runs of its own

    def pick(self, small: Any, real: Any) -> Any:
        """The first where a CPU only shows that it runs, else the second."""
        return small if self.tiny else real


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in float64; NaN where something is not finite."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def assert_close(name: str, error: float, bound: float) -> float:
    """The error, which must be below the bound."""
    if not error <= bound:
        raise AssertionError(f"{name}: relative error {error:.2e} is not below {bound:.0e}")
    return error


def modulate_rows(check: Check) -> Rows:
    """`modulate` forward and backward against float64 on the CPU: types, layouts, odd sizes, with and without a
    residual and a ReLU; random inputs.
    """
    shapes = check.pick(
        [(2, 5, 3, 7), (1, 33, 4, 4)], [(2, 5, 3, 7), (3, 64, 56, 56), (4, 160, 13, 29), (8, 2048, 7, 7)]
    )
    kinds = (torch.float32, torch.bfloat16, torch.float16)
    cases = itertools.product((torch.contiguous_format, torch.channels_last), (False, True), (False, True))
    cases, rows = list(cases), []
    for kind in kinds:
        worst: dict[str, float] = {}
        for shape, (layout, residual, relu) in itertools.product(shapes, cases):
            errors = _errors_of_modulate(shape, kind, layout, residual, relu, check.device)
            worst |= {name: max(worst.get(name, 0.0), error) for name, error in errors.items()}
        # sums over positions are kept in float32, maps are rounded to their type
        bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[kind]
        for name, error in worst.items():
            assert_close(f"{kind}, {name}", error, bound)
        named = {name: f"{error:.1e}" for name, error in worst.items()}
        rows.append({"type": str(kind).removeprefix("torch."), "cases": len(shapes) * len(cases), **named})
    return rows


def _errors_of_modulate(
    shape: tuple[int, ...], kind: torch.dtype, layout: torch.memory_format, residual: bool, relu: bool, device: Any
) -> dict[str, float]:
    names = ["x", "scale", "shift", "residual"][: 4 if residual else 3]
    parts = [torch.randn(shape if name in ("x", "residual") else shape[:2]) for name in names]
    parts[0], weights = parts[0].to(kind), torch.randn(shape).to(kind)
    if residual:
        parts[3] = parts[3].to(kind)
    here = [part.to(device) for part in parts]
    here = [part.contiguous(memory_format=layout) if part.ndim == 4 else part for part in here]
    here = [part.requires_grad_() for part in here]
    there = [part.double().requires_grad_() for part in parts]
    y = modulate(*here, relu=relu)
    exact = modulate(*there, relu=relu, fused=False)
    # where the rounded sum is on the other side of 0, the gradient may pass or not: such elements get none
    settled = exact.detach().abs() > 0.05 if relu else torch.ones(shape, dtype=torch.bool)
    weights = weights * settled
    found = torch.autograd.grad(y, here, weights.to(device).contiguous(memory_format=layout))
    expected = torch.autograd.grad(exact, there, weights.double())
    pairs = zip(["y", *names], [y, *found], [exact, *expected], strict=True)
    return {name: relative_error(one, other) for name, one, other in pairs}


def deltas_rows(check: Check) -> Rows:
    """The deltas of all norms in one batched product, against one product a norm in float64 on the CPU."""
    network, size, hidden = check.pick(("resnet10", 32, 16), ("resnet50", 1024, 512))
    layers = ModulatedResNet(network).layers
    predictor = ModulationPredictor(
        size, [layer.name for layer in layers], [layer.channels for layer in layers], hidden, gamma=True, beta=True
    )
    condition = torch.randn(8, size)
    mlps = predictor.double().gamma
    exact = mlps(condition.double())
    predictor.float().to(check.device)
    inside = torch.relu(nn.functional.linear(condition.to(check.device), mlps.hidden_weight, mlps.hidden_bias))
    rows = []
    for name, way in (("one product", mlps._in_one_product), ("a product a norm", mlps._one_by_one)):
        error = assert_close(name, relative_error(way(inside) + mlps.bias, exact), 1e-4)
        rows.append({"way": name, "norms": len(layers), "error": f"{error:.1e}"})
    return rows


def network_rows(check: Check) -> Rows:
    """The whole network: without deltas torchvision's own on the same device; with deltas against float64 on the CPU,
    fused and composed, with the gradients of the deltas.
    """
    name, size = check.pick(("resnet10", 64), ("resnet50", 224))
    net = ModulatedResNet(name).double()
    images, width = torch.randn(2, 3, size, size), sum(layer.channels for layer in net.layers)
    modulation = [0.1 * torch.randn(2, width) for _ in "γβ"]
    for norm in net.batch_norms():  # as after a training, not mean 0 and variance 1
        norm.running_var.uniform_(0.5, 2.0)
        norm.running_mean.uniform_(-0.5, 0.5)
    weights = torch.randn(2, net.channels, size // 32, size // 32)
    results = {}
    for way, fused, kind, device in (
        ("float64", False, torch.float64, torch.device("cpu")),
        ("fused", True, torch.float32, check.device),
        ("composed", False, torch.float32, check.device),
    ):
        net.to(device, kind, memory_format=torch.channels_last)
        for module in net.modules():
            if hasattr(module, "fused"):
                module.fused = fused
        deltas = [part.to(device, kind).requires_grad_() for part in modulation]
        with _exact_products():
            y = net(images.to(device, kind, memory_format=torch.channels_last), Modulation(*deltas))
            results[way] = [y, *torch.autograd.grad(y, deltas, weights.to(device, kind))]
    rows = []
    for way in ("fused", "composed"):
        errors = [relative_error(*pair) for pair in zip(results[way], results["float64"], strict=True)]
        for part, error in zip(("map", "Δγ", "Δβ"), errors, strict=True):
            assert_close(f"{way}, {part}", error, 1e-3)
        rows.append({"way": way, "map": f"{errors[0]:.1e}", "Δγ": f"{errors[1]:.1e}", "Δβ": f"{errors[2]:.1e}"})
    return rows


@contextmanager
def _exact_products() -> Iterator[None]:
    """Within it float32 convolutions on a GPU are not rounded to TF32."""
    kept = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = kept


def _small_settings(check: Check, *words: str) -> Settings:
    """A small MODERN on generated scenes in this step's folder, in bfloat16."""
    folder = check.folder
    return load_settings(
        CONFIG / "demo.yaml",
        [
            f"device={check.device}",
            "precision=bfloat16",
            "workers=0",
            f"data.folder={folder}/scenes",
            f"data.h5={folder}/scenes.h5",
            "backbone.weights=none",
            f"train.batch_size={check.pick(8, 64)}",
            f"scenes.images={{train: {check.pick(8, 400)}, val: {check.pick(8, 100)}}}",
            *words,
        ],
    )


def commands_rows(check: Check) -> Rows:
    """Trained in bfloat16, then `eval`, `ask`, `inspect`, `features` and `recalibrate` of the saved model; on the CPU
    in float32 `eval` must give nearly the same answers.
    """
    from experiments.evaluate import evaluate
    from experiments.features.compare import compare_features
    from experiments.prepare import prepare
    from experiments.recalibrate import recalibrate
    from vqa.inspect.inspection import ask, inspect

    settings = _small_settings(check, "name=commands")
    prepare(settings)
    run = train(settings, runs=check.folder / "runs").path
    scores = evaluate(run, "val", per_question=False)
    evaluate(run, "val", check.folder / "on_cpu", ["device=cpu", "precision=float32", "workers=0"])
    answers = [
        [entry["answer"] for entry in json.loads((folder / "results_val.json").read_text(encoding="utf-8"))]
        for folder in (run, check.folder / "on_cpu")
    ]
    agree = sum(one == other for one, other in zip(*answers, strict=True)) / len(answers[0])
    if agree < 0.9:
        raise AssertionError(f"only {agree:.2f} of the answers are those of the CPU")
    bundle = load_bundle(run, check.device)
    image = sorted((check.folder / "scenes" / "val").glob("*.png"))[0]
    question = "what color is the circle?"
    on_device, on_cpu = (ask(loaded, image, question, 3) for loaded in (bundle, load_bundle(run)))
    difference = abs(on_device[0]["probability"] - on_cpu[0]["probability"])
    layers = inspect(bundle, image, [question])["readings"][0]["layers"]
    pairs = check.pick(40, 200)
    compare_features([run], "val", check.folder / "features", [], pairs=pairs, seed=0)
    counted = recalibrate(run, check.folder / "recalibrated", "train", [], batches=2)
    return [
        {
            "val_overall": scores["overall"],
            "answers_as_on_cpu": round(agree, 3),
            "ask_difference": f"{assert_close('ask', difference, 1e-2):.1e}",
            "layers_inspected": len(layers),
            "questions_recalibrated_on": counted,
        }
    ]


def resume_rows(check: Check) -> Rows:
    """A bfloat16 training that is ended by SIGTERM in its second epoch and resumed ends as one that is not."""
    from experiments.prepare import prepare

    words = ("train.checkpoint_every=1", "train.epochs=3")
    settings = _small_settings(check, "name=whole", *words)
    prepare(settings)
    lines = {"whole": _last_metrics(train(settings, runs=check.folder / "runs").path)}
    recipe = check.folder / "resumed.yaml"
    _small_settings(check, "name=resumed", *words).save(recipe)
    command = [sys.executable, str(MAIN), "train", "--config", str(recipe), "--resume"]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=check.folder, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            process.send_signal(signal.SIGTERM)
            break
    process.stdout.read()
    if process.wait() not in (143, -signal.SIGTERM):
        raise AssertionError(f"ended with {process.returncode}, not by the signal")
    left = _last_metrics(check.folder / "runs" / "resumed")["epoch"]
    subprocess.run(command, cwd=check.folder, check=True, stdout=subprocess.DEVNULL)
    lines["resumed"] = _last_metrics(check.folder / "runs" / "resumed")
    losses = [line["train_loss"] for line in lines.values()]
    difference = abs(losses[0] - losses[1]) / losses[0]
    # a GPU adds up in another order each time
    assert_close("training loss", difference, 0 if check.device.type == "cpu" else 0.05)
    return [
        {"ended_in_epoch": left + 1, "loss": losses[0], "loss_resumed": losses[1], "difference": f"{difference:.1e}"}
    ]


def _last_metrics(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])


def compile_rows(check: Check) -> Rows:
    """The compiled network gives what the network gives, forward and backward."""
    name, size = check.pick(("resnet10", 64), ("resnet18", 128))
    net = ModulatedResNet(name).to(check.device, memory_format=torch.channels_last)
    images = torch.randn(2, 3, size, size, device=check.device).to(memory_format=torch.channels_last)
    deltas = [0.1 * torch.randn(2, sum(layer.channels for layer in net.layers), device=check.device) for _ in "γβ"]
    deltas = [part.requires_grad_() for part in deltas]
    results = []
    begun = time.monotonic()
    for compiled in (False, True):
        if compiled:
            net.compile(backend=check.pick("aot_eager", "inductor"))
        with _exact_products():
            y = net(images, Modulation(*deltas))
            results.append([y, *torch.autograd.grad(y, deltas, torch.ones_like(y))])
    errors = [relative_error(*pair) for pair in zip(*reversed(results), strict=True)]
    worst = assert_close("compiled", max(errors), 1e-3)
    return [{"network": name, "error": f"{worst:.1e}", "seconds": round(time.monotonic() - begun, 1)}]


def nccl_rows(check: Check) -> Rows:
    """A process group of one: the wrapped model's gradients are the bare one's, and batch statistics are exchanged."""
    backend = "nccl" if check.device.type == "cuda" else "gloo"
    rendezvous = check.folder / "rendezvous"
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=0, world_size=1)
    try:
        model, batch = random_model(load_settings(CONFIG / "demo.yaml", ["backbone.weights=none"]), 4, check)
        model.resnet.set_statistics("batch")
        model.train()
        wrapped = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        found = [_gradient_norm(one, batch) for one in (model, wrapped)]
        del wrapped  # before the group: a wrapper that outlives it can abort at exit
    finally:
        dist.destroy_process_group()
    error = assert_close("gradients", abs(found[0] - found[1]) / found[0], 1e-4)
    return [{"backend": backend, "error": f"{error:.1e}"}]


def _gradient_norm(model: nn.Module, batch: Batch) -> float:
    model.zero_grad(set_to_none=True)
    model(normalised(batch.images), batch.tokens, batch.lengths, places=batch.places).logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


def normalised(images: Tensor) -> Tensor:
    return (images.float() / 64 - 2).permute(0, 3, 1, 2)


def random_model(settings: Settings, batch: int, check: Check) -> tuple[nn.Module, Batch]:
    """A recipe's model and a batch of random questions on as many random images."""
    vocabulary, answers = 14_000 if settings.data.answers > 100 else 50, settings.data.answers
    torch.manual_seed(0)
    model = build_model(settings, vocabulary, answers, pretrained=False).to(check.device)
    size, words = settings.data.image_size, 8
    made = Batch(
        torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8),
        torch.arange(batch),
        torch.randint(2, vocabulary, (batch, words)),
        torch.full((batch,), words),
        torch.randint(0, answers, (batch, 10)),
        torch.arange(batch),
    )
    return model, made.to(check.device)
