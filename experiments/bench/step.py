"""A training step of a modulated ResNet beside three others: time, and bytes kept for the backward pass.

    ours      scale and shift folded, norm, shortcut and ReLU one operation (`modulate`), convolutions keep no input
    plain     torchvision's network, weights frozen, no modulation at all
    usual     an affine-free batch norm, then γ · x + β: how most code writes conditional batch normalisation
    usual, compiled   the same under torch.compile: what a user would try first
    ours, compiled    ours under torch.compile, which fuses the composed form by itself
    stacked   mean and deviation of the whole tensor, γ and β stacked to full maps: the port that is copied most

All four differentiate with respect to the map after the stem (and, but for plain, with respect to the deltas), so each
goes back through the same stages. `usual` and `stacked` restate that arithmetic in the same network.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vqa.backbone import build_resnet
from vqa.devices import autocast
from vqa.norms import ModulatedBatchNorm2d, Modulation
from vqa.resnet import ModulatedResNet, StageMap

GIB = 2**30


class Case(NamedTuple):
    """What is measured."""

    network: str
    size: int  # of an image, pixels
    batch: int
    channels_last: bool = True
    precision: str = "float32"  # as the setting
    compiled: bool = False  # the compiled ways too: about a minute each


def cases(device: torch.device) -> tuple[Case, ...]:
    """The networks and sizes of the paper; batches and types as a CPU or a GPU takes them."""
    if device.type == "cuda":
        half = "bfloat16"
        return (
            Case("resnet50", 224, 64, precision=half, compiled=True),
            Case("resnet50", 224, 256, precision=half),
            Case("resnet50", 224, 64, channels_last=False, precision=half),
            Case("resnet50", 224, 64),
            Case("resnet50", 448, 64, precision=half),
            Case("resnet152", 224, 64, precision=half),
            Case("resnet152", 448, 32, precision=half),
        )
    return (
        Case("resnet50", 224, 8, compiled=True),
        Case("resnet50", 224, 8, channels_last=False),
        Case("resnet50", 448, 2),
        Case("resnet152", 224, 4),
        Case("resnet152", 448, 1),
    )


TINY = (Case("resnet10", 64, 2, precision="bfloat16"), Case("resnet10", 64, 2, channels_last=False))


class _Usual(nn.Module):
    """An affine-free batch norm, then γ · x + β."""

    def __init__(self, norm: ModulatedBatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, x: Tensor, delta: Modulation | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        norm = self.norm
        if delta is None:
            y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = self.modulated(x, norm.weight + delta.gamma, norm.bias + delta.beta)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y

    def modulated(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        return gamma[:, :, None, None] * y + beta[:, :, None, None]


class _Stacked(_Usual):
    """Mean and deviation of the whole tensor; γ and β as maps."""

    def modulated(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        height, width = x.shape[2:]
        gamma, beta = (
            torch.stack([torch.stack([part] * height, dim=2)] * width, dim=3).to(x.dtype) for part in (gamma, beta)
        )
        return (x - x.mean()) / torch.sqrt(x.var() + self.norm.eps) * gamma + beta


def _ways(
    network: str, device: torch.device, layout: torch.memory_format, compiled: bool = False
) -> dict[str, Callable[..., Tensor]]:
    """Each way as a function of the map after the stem and the deltas (what has none leaves them)."""

    def modulated(kind: type[_Usual] | None, compile_: bool = False) -> Callable[..., Tensor]:
        net = ModulatedResNet(network, fused=kind is None)
        if kind is not None:
            for name, module in list(net.network.named_modules()):
                if isinstance(module, ModulatedBatchNorm2d):
                    net.network.set_submodule(name, kind(module))
        net.to(device, memory_format=layout)
        if compile_:
            net.compile()
        return lambda map_, deltas: net(StageMap(0, map_), Modulation(*deltas))

    resnet = build_resnet(network).requires_grad_(False).eval().to(device, memory_format=layout)

    def plain(map_: Tensor, _deltas: object) -> Tensor:
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            map_ = stage(map_)
        return map_

    ways = {"ours": modulated(None), "plain": plain, "usual": modulated(_Usual), "stacked": modulated(_Stacked)}
    if compiled:
        ways |= {"usual, compiled": modulated(_Usual, True), "ours, compiled": modulated(None, True)}
    return ways


def step_rows(cases: tuple[Case, ...], repeats: int, device: torch.device) -> list[dict[str, Any]]:
    """A row a case and way: milliseconds (medians), bytes kept, and ours as a multiple of it."""
    return [row for case in cases for row in _rows_of(case, repeats, device)]


def _rows_of(case: Case, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    layout = torch.channels_last if case.channels_last else torch.contiguous_format
    precision = case.precision
    ways = _ways(case.network, device, layout, case.compiled)
    width = sum(layer.channels for layer in ModulatedResNet(case.network).layers)
    map_ = torch.randn(case.batch, 64, case.size // 4, case.size // 4, device=device).to(memory_format=layout)
    deltas = [0.1 * torch.randn(case.batch, width, device=device) for _ in "γβ"]

    def run(way: str, train: bool) -> Tensor:
        parts = [part.detach().requires_grad_(train) for part in (map_, *deltas)]
        with torch.set_grad_enabled(train), autocast(device, precision):
            y = ways[way](parts[0], parts[1:])
        if train:
            wanted = parts[:1] if way == "plain" else parts
            torch.autograd.grad(y, wanted, torch.ones_like(y))
        return y

    forward = interleaved({way: lambda way=way: run(way, False) for way in ways}, repeats, device)
    training = interleaved({way: lambda way=way: run(way, True) for way in ways}, repeats, device)
    peaks = {way: _peak_mib(lambda way=way: run(way, True), device) for way in ways}
    parts = [part.requires_grad_() for part in (map_, *deltas)]
    with autocast(device, precision):
        kept = {way: kept_bytes(lambda way=way: ways[way](parts[0], parts[1:]), case.batch) for way in ways}
    return [
        {
            "network": case.network,
            "pixels": case.size,
            "batch": case.batch,
            "layout": "channels last" if case.channels_last else "channels first",
            "precision": precision,
            "way": way,
            "training_ms": round(1e3 * training[way], 2),
            "ours_training": round(training["ours"] / training[way], 3),
            "forward_ms": round(1e3 * forward[way], 2),
            "ours_forward": round(forward["ours"] / forward[way], 3),
            "kept_mib_an_image": round(kept[way] / 2**20, 2),
            "ours_kept": round(kept["ours"] / kept[way], 3),
            "peak_mib": peaks[way],
        }
        for way in ways
    ]


def interleaved(
    functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device | None = None
) -> dict[str, float]:
    """The median seconds of each function; they take turns, after one turn that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            begun = time.perf_counter()
            function()
            if device is not None and device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begun)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def _peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """The most memory of a GPU that a function holds; not told on a CPU, where all ways share a process."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


def kept_bytes(function: Callable[[], Tensor], batch: int) -> float:
    """Bytes an image of all memory that autograd keeps, without the weights (nothing of them grows with the batch)."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim > 0 and tensor.shape[0] == batch:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself, if it is a result, would keep its own graph alive

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = function()
    del y
    return sum(kept.values()) / batch


def memory_rows(case: Case, gib: float, device: torch.device) -> list[dict[str, Any]]:
    """The largest batch of MODERN in so much memory of a GPU, computed from exact bytes: what does not grow with the
    batch (the network; the predicting MLPs with gradients and Adam's two moments; 1 GiB for the device's own), then
    what is kept an image, and three of the largest maps, which live for a moment.
    """
    from vqa.cbn import ModulationPredictor

    torch.manual_seed(0)
    ways = _ways(case.network, device, torch.channels_last)
    net = ModulatedResNet(case.network)
    names, channels = [layer.name for layer in net.layers], [layer.channels for layer in net.layers]
    predictor = ModulationPredictor(1024, names, channels, 512, gamma=True, beta=True)
    predicting = sum(parameter.numel() for parameter in predictor.parameters())
    fixed = 4 * sum(parameter.numel() for parameter in net.parameters()) + 16 * predicting + GIB
    del predictor
    map_ = torch.randn(case.batch, 64, case.size // 4, case.size // 4, device=device).requires_grad_()
    deltas = [torch.randn(case.batch, sum(channels), device=device).requires_grad_() for _ in "γβ"]
    rows = []
    for precision, width in (("float32", 4), ("bfloat16", 2)):
        largest = width * 4 * 64 * (case.size // 4) ** 2
        for way in ("ours", "usual", "stacked"):
            with autocast(device, precision):
                kept = kept_bytes(lambda way=way: ways[way](map_, deltas), case.batch)
            rows.append(
                {
                    "network": case.network,
                    "pixels": case.size,
                    "precision": precision,
                    "way": way,
                    "kept_mib_an_image": round(kept / 2**20, 1),
                    "fixed_gib": round(fixed / GIB, 2),
                    "memory_gib": gib,
                    "largest_batch": int((gib * GIB - fixed) / (kept + 3 * largest)),
                }
            )
    return rows
