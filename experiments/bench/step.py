"""A training step of a modulated ResNet computed in several ways: time, and bytes kept for the backward pass.

    ours      norm folded to one scale and shift, one operation with shortcut and ReLU; convolutions keep no input
    plain     torchvision's network, weights frozen, no modulation
    usual     an affine-free batch norm, then γ · x + β: how most code writes conditional batch normalisation
    stacked   mean and deviation of the whole tensor, γ and β stacked to full maps: the port that is copied most
    ours, compiled; plain, compiled; usual, compiled     the same under torch.compile

All differentiate with respect to the map after the stem and (except for the plain network) the deltas, so that all go
back through the same stages. `usual` and `stacked` replace the norms of the same network.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments.bench.setup import Rows, Setup
from vqa.backbone import build_resnet
from vqa.devices import autocast
from vqa.norms import ModulatedBatchNorm2d, Modulation
from vqa.predictor import ModulationPredictor
from vqa.resnet import ModulatedResNet, StageMap

GIB = 2**30


class Case(NamedTuple):
    """A network, its input and how it is computed."""

    network: str
    size: int  # of an image, pixels
    batch: int
    channels_last: bool = True
    precision: str = "float32"  # as the setting
    compiled: bool = False  # measure the compiled ways too: about a minute each

    @property
    def layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def cases(setup: Setup) -> tuple[Case, ...]:
    """The networks and sizes of the paper, with batches and precision that suit a CPU or a GPU."""
    if setup.tiny:
        return Case("resnet10", 64, 2, compiled=True), Case("resnet10", 64, 2, False, "bfloat16")
    if setup.device.type == "cuda":
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


class _Usual(nn.Module):
    """An affine-free batch norm, then γ · x + β."""

    def __init__(self, norm: ModulatedBatchNorm2d) -> None:
        super().__init__()
        self.norm = norm

    def forward(
        self, x: Tensor, delta: Modulation | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        norm = self.norm
        if delta is None:  # on a shortcut
            y = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            y = self.modulate(x, norm.weight + delta.gamma, norm.bias + delta.beta)
        y = y if residual is None else y.add_(residual)
        return y.relu_() if relu else y

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = F.batch_norm(x, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps)
        return gamma[:, :, None, None] * y + beta[:, :, None, None]


class _Stacked(_Usual):
    """Mean and deviation of the whole tensor; γ and β as maps."""

    def modulate(self, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        height, width = x.shape[2:]
        gamma, beta = (
            torch.stack([torch.stack([part] * height, dim=2)] * width, dim=3).to(x.dtype) for part in (gamma, beta)
        )
        return (x - x.mean()) / torch.sqrt(x.var() + self.norm.eps) * gamma + beta


Way = Callable[..., Tensor]  # the map after the stem, Δγ, Δβ → the stage-4 map


def ways_of(case: Case, setup: Setup) -> dict[str, Way]:
    """Build the networks of every way to compute a case, by its name."""
    device, compiler = setup.device, setup.pick("eager", "inductor")

    def modulated(norm: type[_Usual] | None = None, compiled: bool = False) -> Way:
        net = ModulatedResNet(case.network, fused=norm is None)
        if norm is not None:
            for name, module in list(net.network.named_modules()):
                if isinstance(module, ModulatedBatchNorm2d):
                    net.network.set_submodule(name, norm(module))
        net.to(device, memory_format=case.layout)
        if compiled:
            net.compile(backend=compiler)
        return lambda map_, *deltas: net(StageMap(0, map_), Modulation(*deltas))

    resnet = build_resnet(case.network).requires_grad_(False).eval().to(device, memory_format=case.layout)
    stages = nn.Sequential(resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4)
    ways = {
        "ours": modulated(),
        "plain": lambda map_, *_: stages(map_),
        "usual": modulated(_Usual),
        "stacked": modulated(_Stacked),
    }
    if case.compiled:
        compiled_stages = torch.compile(stages, backend=compiler)
        ways |= {
            "ours, compiled": modulated(compiled=True),
            "plain, compiled": lambda map_, *_: compiled_stages(map_),
            "usual, compiled": modulated(_Usual, compiled=True),
        }
    return ways


def inputs_of(case: Case, device: torch.device) -> list[Tensor]:
    """Return a random map after the stem and random deltas: what a way takes."""
    width = sum(layer.channels for layer in ModulatedResNet(case.network).layers)
    map_ = torch.randn(case.batch, 64, case.size // 4, case.size // 4, device=device).to(memory_format=case.layout)
    parts = [map_, *(0.1 * torch.randn(case.batch, width, device=device) for _ in "γβ")]
    return [part.requires_grad_() for part in parts]


def compute(way: Way, inputs: Sequence[Tensor], precision: str, *, train: bool) -> None:
    """Compute the stage-4 map in one way; for training also the gradients of the inputs."""
    with torch.set_grad_enabled(train), autocast(inputs[0].device, precision):
        y = way(*inputs)
    if train:
        torch.autograd.grad(y, inputs, torch.ones_like(y), allow_unused=True)  # the plain network takes no deltas


def step_rows(setup: Setup) -> Rows:
    """Yield the rows of every case."""
    for case in cases(setup):
        yield from rows_of(case, setup)


def rows_of(case: Case, setup: Setup) -> Rows:
    """Yield a row for each way: milliseconds (medians), bytes kept, and the ratio of ours to it."""
    torch.manual_seed(0)
    device = setup.device
    ways, inputs = ways_of(case, setup), inputs_of(case, device)
    forward, training = (
        {name: partial(compute, way, inputs, case.precision, train=train) for name, way in ways.items()}
        for train in (False, True)
    )
    forward_seconds, training_seconds = (interleaved(jobs, setup.repeats, device) for jobs in (forward, training))
    peaks, queued = ({way: of(job, device) for way, job in training.items()} for of in (peak_mib, queued_ms))
    kept = {way: _kept_bytes(function, inputs, case.precision) for way, function in ways.items()}
    for way in ways:
        yield {
            "network": case.network,
            "pixels": case.size,
            "batch": case.batch,
            "layout": "channels last" if case.channels_last else "channels first",
            "precision": case.precision,
            "way": way,
            "training_ms": round(1e3 * training_seconds[way], 2),
            "ours_training": round(training_seconds["ours"] / training_seconds[way], 3),
            "forward_ms": round(1e3 * forward_seconds[way], 2),
            "ours_forward": round(forward_seconds["ours"] / forward_seconds[way], 3),
            "kept_mib_an_image": round(kept[way] / 2**20, 2),
            "ours_kept": round(kept["ours"] / kept[way], 3),
            "peak_mib": peaks[way],
            "queued_ms": queued[way],
        }


def interleaved(functions: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device) -> dict[str, float]:
    """Time functions in turns; return the median seconds of each, without those of the first turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def peak_mib(function: Callable[[], Any], device: torch.device) -> float | None:
    """Run a function on a GPU and return its peak memory there; None on a CPU, where nothing is run."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)


def queued_ms(function: Callable[[], Any], device: torch.device) -> float | None:
    """Return the milliseconds (median) until a GPU has been told all that it has to compute, None on a CPU. Where that
    is much less than the whole, the GPU is what limits; it lets the host wait where about a thousand operations wait.
    """
    if device.type != "cuda":
        return None
    times = []
    for _ in range(5):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return round(1e3 * statistics.median(times), 2)


def _kept_bytes(way: Way, inputs: Sequence[Tensor], precision: str) -> float:
    """Bytes an image that autograd keeps, without the weights (nothing of them grows with the batch)."""
    batch, kept = len(inputs[0]), {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.ndim > 0 and tensor.shape[0] == batch:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself, if it is a result, would keep its own graph alive

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with autocast(inputs[0].device, precision), hooks:
        y = way(*inputs)
    del y
    return sum(kept.values()) / batch


def memory_rows(setup: Setup) -> Rows:
    """Compute from exact bytes the largest batch of MODERN that fits into 24 GiB of GPU memory.

    What does not grow with the batch: the network, the predicting MLPs with gradients and Adam's two moments, 1 GiB for
    the device itself. What does: the bytes kept an image, and three of the largest maps, which exist for a moment.
    """
    case, gib = setup.pick(Case("resnet10", 64, 2), Case("resnet152", 448, 1)), 24
    torch.manual_seed(0)
    ways, inputs = ways_of(case, setup), inputs_of(case, setup.device)
    net = ModulatedResNet(case.network)
    names, channels = [layer.name for layer in net.layers], [layer.channels for layer in net.layers]
    predictor = ModulationPredictor(1024, names, channels, 512, gamma=True, beta=True)
    network, predicting = (sum(parameter.numel() for parameter in part.parameters()) for part in (net, predictor))
    fixed = 4 * network + 16 * predicting + GIB
    for precision, width in (("float32", 4), ("bfloat16", 2)):
        largest = width * 4 * inputs[0][0].numel()
        for way in ("ours", "usual", "stacked"):
            kept = _kept_bytes(ways[way], inputs, precision)
            yield {
                "network": case.network,
                "pixels": case.size,
                "precision": precision,
                "way": way,
                "kept_mib_an_image": round(kept / 2**20, 1),
                "fixed_gib": round(fixed / GIB, 2),
                "memory_gib": gib,
                "largest_batch": int((gib * GIB - fixed) / (kept + 3 * largest)),
            }
