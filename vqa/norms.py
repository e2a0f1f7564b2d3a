"""Norms whose γ and β take a delta a sample: batch, instance, group and layer normalisation, in one formula.

    y = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ)             one pair (Δγ, Δβ) a sample and channel

They differ only in what mean and variance are taken over. All are computed as y = scale · x + shift with
scale = (γ + Δγ) / sqrt(var + ε) and shift = β + Δβ − mean · scale, both [B, C]: one pass over the map instead of two,
and what follows a norm in a ResNet (adding the shortcut, the ReLU) goes with it (`vqa.kernels.modulate`).

Legend: B samples, C channels, H and W map size, G groups of channels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqa.kernels.modulate import Fused, modulate


class Modulation(NamedTuple):
    """What a condition adds to γ and β: [B, C] each for one norm, [B, sum of C] for all conditioned norms of a network
    in order of depth, or of the latter one row for all samples. None adds nothing.
    """

    gamma: Tensor | None
    beta: Tensor | None


NO_MODULATION = Modulation(None, None)


class Folded(NamedTuple):
    """What statistics, γ, β and their deltas come to, y = scale · x + shift: [B, C] each, or [1, C] for all samples."""

    scale: Tensor
    shift: Tensor


def folded(mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, delta: Modulation, eps: float) -> Folded:
    """scale = (γ + Δγ) / sqrt(var + ε) and shift = β + Δβ − mean · scale; arguments as of `modulated_norm`."""
    if delta.gamma is not None:
        gamma = gamma + delta.gamma.to(gamma.dtype)
    if delta.beta is not None:
        beta = beta + delta.beta.to(beta.dtype)
    scale = gamma * torch.rsqrt(var + eps)
    shift = beta - mean * scale
    return Folded(*(part if part.ndim == 2 else part[None] for part in (scale, shift)))


def modulated_norm(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gamma: Tensor,
    beta: Tensor,
    delta: Modulation,
    eps: float,
    residual: Tensor | None = None,
    *,
    relu: bool = False,
    fused: Fused = True,
) -> Tensor:
    """y = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ), and then act(y + residual).

    Args:
        x: map [B, C, H, W]; the result has its type (under autocast it is computed in the type of γ).
        mean, var, gamma, beta: [C], or [B, C] where they differ from sample to sample.
        delta: Δγ and Δβ, each [B, C] or None.
        eps: ε.
        residual, relu, fused: as `modulate`.
    """
    return modulate(x, *folded(mean, var, gamma, beta, delta, eps), residual, relu=relu, fused=fused)


def _checked(delta: Modulation | None, x: Tensor) -> Modulation:
    if delta is None or (delta.gamma is None and delta.beta is None):
        return NO_MODULATION
    for part in delta:
        if part is not None and part.shape != x.shape[:2]:
            raise ValueError(f"a delta must be [B, C] = {list(x.shape[:2])}, got {list(part.shape)}")
    return delta


def check_map(x: Tensor, channels: int) -> None:
    """Raises ValueError if a map is not [B, C, H, W] with so many channels C."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"a map must be [B, C, H, W] with C = {channels}, got {list(x.shape)}")


Norm = TypeVar("Norm", bound=nn.Module)


def in_place_of(norm: nn.BatchNorm2d, make: Callable[[], Norm]) -> Norm:
    """What `make` gives, on the device and in the type of `norm`, with its γ and β (shared) and its mode."""
    if norm.weight is None or norm.bias is None:
        raise ValueError("a modulated norm needs γ and β")
    with norm.weight.device:
        modulated = make().to(norm.weight.dtype)
    modulated.weight, modulated.bias = norm.weight, norm.bias
    return modulated.train(norm.training)


def _wants_gradient(*parts: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts)


class Pooled:
    """Mean and variance of the values of several batches together, from the count, mean and variance of each."""

    def __init__(self) -> None:
        self.batches = self.count = 0
        self.mean = self.var = 0.0  # [C] from the first batch on; the variance is the biased one

    def add(self, mean: Tensor, var: Tensor, count: int) -> None:
        mean, var = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in (mean, var))
        self.batches += 1
        self.count += count
        share, off = count / self.count, mean - self.mean
        self.mean = self.mean + share * off
        self.var = self.var + share * (var - self.var + (1 - share) * off**2)


class ModulatedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, by the same names of parameters and buffers, whose γ and β take a delta a sample.

    As there, the statistics are the batch's in training mode (and move the running ones), the running ones otherwise.
    With `synchronised` set the batch is that of all processes, as in `nn.SyncBatchNorm`, on any device.
    """

    synchronised = False
    fused: Fused = True  # as `modulate`
    fixed = False  # set: the running statistics cannot be reset
    pooled: Pooled | None = None  # set: in training mode the batch's statistics go there, the running ones stay

    def forward(
        self, x: Tensor, delta: Modulation | Folded | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W]; without a delta what `nn.BatchNorm2d` gives.

        A residual and a ReLU may follow as in `modulate`. In evaluation mode the delta may be folded already.

        Raises:
            ValueError: x is not [B, C, H, W], a delta not [B, C], or in training mode there is but one value a channel.
        """
        if isinstance(delta, Folded):
            return modulate(x, *delta, residual, relu=relu, fused=self.fused)
        check_map(x, self.num_features)
        delta = _checked(delta, x)
        unmodulated = delta is NO_MODULATION and not (self.training and (self.synchronised or self.pooled))
        if unmodulated and not _wants_gradient(x, residual, self.weight):
            y = super().forward(x)  # to the bit what the pretrained network gives
            y = y if residual is None else y.add_(residual)
            return y.relu_() if relu else y
        mean, var = self.statistics(x)
        return modulated_norm(
            x, mean, var, self.weight, self.bias, delta, self.eps, residual, relu=relu, fused=self.fused
        )

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and (biased) variance [C] that normalise a map [B, C, H, W]; in training mode the running ones move."""
        check_map(x, self.num_features)
        if not self.training:
            return self.running_mean, self.running_var
        var, mean = torch.var_mean(x.to(self.running_mean.dtype), dim=(0, 2, 3), correction=0)
        count = x.numel() // x.shape[1]
        if self.synchronised and dist.is_initialized():
            mean, var, count = _over_processes(mean, var, count)
        self._move_running_statistics(mean.detach(), var.detach(), count)
        return mean, var

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        if count < 2:
            raise ValueError("batch statistics need more than one value a channel")
        if self.pooled:
            self.pooled.add(mean, var, count)
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * count / (count - 1), momentum)  # the running variance is the unbiased one

    def reset_running_stats(self) -> None:
        """As that of `nn.BatchNorm2d`.

        Raises:
            RuntimeError: the statistics are fixed, so that no batch would move them from mean 0 and variance 1 again.
        """
        if self.fixed:
            raise RuntimeError(
                "statistics under the policy `population` cannot be reset (as swa_utils.update_bn does); estimate them "
                'in `with net.estimating_statistics():`, or call `net.set_statistics("batch")` first'
            )
        super().reset_running_stats()

    @torch.no_grad()
    def take_statistics(self, pooled: Pooled) -> None:
        """Makes pooled statistics the running ones."""
        self.running_mean.copy_(pooled.mean)
        self.running_var.copy_(pooled.var * pooled.count / (pooled.count - 1))
        self.num_batches_tracked.fill_(pooled.batches)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, *sizes: int, **named_sizes: int) -> Self:
        """The same norm, sharing its parameters and buffers, able to take deltas.

        `sizes` are what the constructor takes beside `num_features`, `eps` and `momentum`, which are those of `norm`.

        Raises:
            ValueError: `norm` has no γ and β, or no running statistics.
        """
        if not norm.track_running_stats:
            raise ValueError("a modulated batch norm needs running statistics")
        kept = {"eps": norm.eps, "momentum": norm.momentum}
        modulated = in_place_of(norm, partial(cls, norm.num_features, *sizes, **named_sizes, **kept))
        for name, buffer in norm.named_buffers(recurse=False):
            modulated.register_buffer(name, buffer)
        modulated.synchronised = isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "synchronised", False)
        return modulated


_convert_sync_batchnorm = nn.SyncBatchNorm.convert_sync_batchnorm.__func__


def _keep_modulated_norms(
    cls: type[nn.SyncBatchNorm], module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """As `nn.SyncBatchNorm.convert_sync_batchnorm`, which would replace a modulated norm by one without deltas: it is
    made `synchronised` instead.
    """
    if not isinstance(module, ModulatedBatchNorm2d):
        return _convert_sync_batchnorm(cls, module, process_group)
    if process_group is not None:
        raise ValueError("a modulated norm is synchronised over all processes, not over a process group")
    module.synchronised = True
    return module


# torch asks a module nothing before it replaces it, and calls this for every child
nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(_keep_modulated_norms)


def folded_at_once(norms: Sequence[ModulatedBatchNorm2d], modulation: Modulation) -> list[Folded]:
    """As `folded`, for several batch norms of one ε in evaluation mode and the deltas of them all [B, ΣC]: a few
    operations instead of a few for each norm.
    """
    mean, var, gamma, beta = (
        torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale, shift = folded(mean, var, gamma, beta, modulation, norms[0].eps)
    widths = [norm.num_features for norm in norms]
    return list(map(Folded, scale.split(widths, dim=1), shift.split(widths, dim=1)))


def _over_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, int]:
    """The statistics of all processes' values together from those of each; gradients flow through all of them."""
    counts = mean.new_tensor(count)
    dist.all_reduce(counts)
    share = count / counts
    everyones = _SumOverProcesses.apply(share * mean)
    return everyones, _SumOverProcesses.apply(share * (var + (mean - everyones) ** 2)), int(counts)


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of their gradients."""

    @staticmethod
    def forward(_: Any, part: Tensor) -> Tensor:
        part = part.clone()
        dist.all_reduce(part)
        return part

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _SumOverProcesses.apply(gradient)


class ModulatedGroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` whose γ and β take a delta a sample: instance norm with as many groups as channels, layer norm
    (over channels, height and width) with one. The statistics are the sample's own, in training and evaluation.
    """

    fused: Fused = True  # as `modulate`

    def forward(
        self, x: Tensor, delta: Modulation | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W]; without a delta what `nn.GroupNorm` gives.

        A residual and a ReLU may follow as in `modulate`.

        Raises:
            ValueError: x is not [B, C, H, W], a delta not [B, C], or a group holds but one value.
        """
        check_map(x, self.num_channels)
        delta = _checked(delta, x)
        grouped = x.to(self.weight.dtype).reshape(len(x), self.num_groups, -1)  # [B, G, C / G * H * W]
        if grouped.shape[2] < 2:
            raise ValueError("the statistics of a group need more than one value")
        var, mean = torch.var_mean(grouped, dim=2, correction=0)
        mean, var = (part.repeat_interleave(self.num_channels // self.num_groups, dim=1) for part in (mean, var))
        return modulated_norm(
            x, mean, var, self.weight, self.bias, delta, self.eps, residual, relu=relu, fused=self.fused
        )

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, groups: int, *sizes: int, **named_sizes: int) -> Self:
        """A group norm with the γ and β (shared) and the ε of a batch norm; `sizes` as of `ModulatedBatchNorm2d`."""
        return in_place_of(norm, partial(cls, groups, norm.num_features, *sizes, **named_sizes, eps=norm.eps))


GROUPS = 32  # of group normalisation (Wu and He 2018)


def groups_of(normaliser: str, channels: int) -> int:
    """Groups G of an `instance`, `group` or `layer` normaliser of so many channels."""
    return {"instance": channels, "group": min(GROUPS, channels), "layer": 1}[normaliser]
