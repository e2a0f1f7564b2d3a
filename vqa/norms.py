"""Batch, instance, group and layer normalisation whose γ and β take a delta per sample, in one formula.

    y = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ)             one pair (Δγ, Δβ) per sample and channel

They differ only in the values that mean and variance are taken over. Each is computed as y = scale · x + shift, in one
pass over the map together with the residual add and the ReLU that follow a norm in a ResNet (`vqa.kernels.modulate`).
"""

from typing import Any, NamedTuple, Self, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqa.kernels.modulate import Fused, modulate


class Modulation(NamedTuple):
    """The deltas that a condition adds to γ and β: [B, C] each for one norm, [B, sum of C] for all conditioned norms of
    a network in order of depth, or [1, sum of C] for all samples. None adds nothing.
    """

    gamma: Tensor | None
    beta: Tensor | None


NO_MODULATION = Modulation(None, None)


def is_empty(modulation: Modulation | None) -> bool:
    """Return whether a modulation adds nothing."""
    return modulation is None or (modulation.gamma is None and modulation.beta is None)


class Affine(NamedTuple):
    """A norm with running statistics and its deltas, as y = scale · x + shift: [B, C] or [1, C] each."""

    scale: Tensor
    shift: Tensor


def at_least_float32(kind: torch.dtype) -> torch.dtype:
    """Return the type that statistics, scale and shift are computed in for parameters of this type."""
    return torch.promote_types(kind, torch.float32)


def scale_and_shift(
    mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, delta: Modulation, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute scale = (γ + Δγ) / sqrt(var + ε) and shift = β + Δβ − mean · scale, each [B, C] or [1, C].

    `mean`, `var`, `gamma` and `beta` are [C], or [B, C] where they differ between samples; the deltas are [B, C],
    [1, C] or None. The result is float32 or finer, also under autocast and in a network of a coarser type.
    """
    mean, var, gamma, beta = (part.to(at_least_float32(part.dtype)) for part in (mean, var, gamma, beta))
    if delta.gamma is not None:
        gamma = gamma + delta.gamma.to(gamma.dtype)
    if delta.beta is not None:
        beta = beta + delta.beta.to(beta.dtype)
    scale = gamma * torch.rsqrt(var + eps)
    return torch.atleast_2d(scale), torch.atleast_2d(beta - mean * scale)


def checked(delta: Modulation | None, x: Tensor) -> Modulation:
    """Return the delta, or NO_MODULATION for none; raise ValueError if it does not fit a map x: it must be [B, C]."""
    if is_empty(delta):
        return NO_MODULATION
    for part in delta:
        if part is not None and part.shape != x.shape[:2]:
            raise ValueError(f"a delta must be [B, C] = {list(x.shape[:2])}, got {list(part.shape)}")
    return delta


def check_map(x: Tensor, channels: int) -> None:
    """Raise ValueError if a map is not [B, C, H, W] with this number of channels."""
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"a map must be [B, C, H, W] with C = {channels}, got {list(x.shape)}")


Norm = TypeVar("Norm", bound=nn.Module)


def check_replaceable(norm: nn.Module) -> None:
    """Raise ValueError if a module is no batch norm, or has no γ and β, or they are no parameters, as after pruning."""
    if not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
        raise ValueError(f"a modulated norm is made from a batch norm, not from {type(norm).__name__}")
    if norm.weight is None or norm.bias is None:
        raise ValueError("a modulated norm needs γ and β")
    if not (isinstance(norm.weight, nn.Parameter) and isinstance(norm.bias, nn.Parameter)):
        raise ValueError("γ and β must be parameters: make the pruning or parametrisation permanent first")


def in_place_of(norm: nn.BatchNorm2d, kind: type[Norm], *sizes: int, **options: Any) -> Norm:
    """Return `kind(*sizes, **options)` with the device, type, mode, γ and β (shared) of a batch norm."""
    modulated = kind(*sizes, **options, device=norm.weight.device, dtype=norm.weight.dtype)
    modulated.weight, modulated.bias = norm.weight, norm.bias
    return modulated.train(norm.training)


class Pooled:
    """Mean and variance of the values of several batches together, from the count, mean and variance of each."""

    def __init__(self) -> None:
        self.batches = self.count = 0
        self.mean = self.var = 0.0  # [C] after the first batch; the variance is the biased one

    def add(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        """Add the mean and biased variance [C] of `count` values per channel."""
        mean, var = (part.to(at_least_float32(part.dtype)) for part in (mean, var))
        self.batches += 1
        self.count += count
        share, difference = count / self.count, mean - self.mean
        self.mean = self.mean + share * difference
        self.var = self.var + share * (var - self.var + (1 - share) * difference**2)


class ModulatedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, with the same names of parameters and buffers, whose γ and β take a delta per sample.

    As there, training mode normalises with the statistics of the batch, which also move the running ones, and
    evaluation mode with the running statistics. It needs γ, β and running statistics, as are the default there.
    """

    synchronised = False  # True: the batch is that of all processes, as in `nn.SyncBatchNorm`, on any device
    fused: Fused = True  # as in `modulate`
    fixed = False  # True: the running statistics cannot be reset
    is_plain = True  # without a delta it is `nn.BatchNorm2d`
    pooled: Pooled | None = None  # if set, training mode adds the statistics of the batch to it; the running ones stay

    def forward(
        self, x: Tensor, delta: Modulation | Affine | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W], act(norm(x) (+ residual)); without a delta the norm is `nn.BatchNorm2d`.

        `delta` may be an `Affine`, which already contains this norm's statistics, γ and β.

        Raises:
            ValueError: x is not [B, C, H, W], a delta is not [B, C], or training mode has one value per channel.
        """
        check_map(x, self.num_features)
        if isinstance(delta, Affine):
            return modulate(x, *delta, residual, relu=relu, fused=self.fused)
        delta = checked(delta, x)
        plain = self.is_plain and delta is NO_MODULATION and not (self.training and (self.synchronised or self.pooled))
        parts = (x, self.weight) if residual is None else (x, self.weight, residual)
        if plain and not (torch.is_grad_enabled() and any(part.requires_grad for part in parts)):
            y = super().forward(x)  # bit for bit what the pretrained network computes
            y = y if residual is None else y.add_(residual)
            return y.relu_() if relu else y
        return modulate(x, *self.as_affine(x, delta), residual, relu=relu, fused=self.fused)

    def as_affine(self, x: Tensor, delta: Modulation) -> tuple[Tensor, Tensor]:
        """Return scale and shift, [B, C] or [1, C] each: the normalised map is scale · x + shift."""
        return scale_and_shift(*self.statistics(x), self.weight, self.bias, delta, self.eps)

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and biased variance [C] that normalise a map [B, C, H, W]; in training mode, move the running
        statistics. Raises ValueError in training mode if there is only one value per channel.
        """
        if not self.training and self.running_mean is not None:
            return self.running_mean, self.running_var
        exact = x.to(at_least_float32(self.weight.dtype))
        var, mean = torch.var_mean(exact, dim=(0, 2, 3), correction=0)
        count, together = x.numel() // x.shape[1], self.synchronised and dist.is_initialized()
        if count < 2 and not (together and dist.get_world_size() > 1):
            raise ValueError("batch statistics need more than one value per channel")
        if together:
            if not count:  # zeros, which the sums below skip; mean and variance of nothing are NaN
                mean = var = exact.sum((0, 2, 3))
            mean, var, count = _over_processes(mean, var, count)
        self._move_running_statistics(mean.detach(), var.detach(), count)
        return mean, var

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, var: Tensor, count: int | Tensor) -> None:
        if self.pooled:
            self.pooled.add(mean, var, count)
            return
        if not self.track_running_stats:  # as in `nn.BatchNorm2d`, where it may be changed at any time
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        unbiased = var * count / (count - 1)
        self.running_var.lerp_(unbiased.to(self.running_var), momentum)

    def reset_running_stats(self) -> None:
        """Reset the running statistics to mean 0 and variance 1.

        Raises:
            RuntimeError: the statistics are fixed: no batch would move them again.
        """
        if self.fixed:
            raise RuntimeError(
                "statistics under the policy `population` cannot be reset (as swa_utils.update_bn does); estimate them "
                'in `with net.estimating_statistics():`, or call `net.set_statistics("batch")` first'
            )
        super().reset_running_stats()

    @torch.no_grad()
    def take_statistics(self, pooled: Pooled) -> None:
        """Make pooled statistics the running ones."""
        self.running_mean.copy_(pooled.mean)
        self.running_var.copy_(pooled.var * pooled.count / (pooled.count - 1))
        self.num_batches_tracked.fill_(pooled.batches)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, *sizes: int, **options: Any) -> Self:
        """Return the same norm, sharing its parameters and buffers, that takes deltas.

        `sizes` and `options` are the arguments of the constructor besides `num_features`, `eps` and `momentum`, which
        are those of `norm`.

        Raises:
            ValueError: `norm` is no batch norm, or has no γ and β or no running statistics.
        """
        check_replaceable(norm)
        if not norm.track_running_stats:
            raise ValueError("a modulated batch norm needs running statistics")
        kept = {"eps": norm.eps, "momentum": norm.momentum}
        modulated = in_place_of(norm, cls, norm.num_features, *sizes, **options, **kept)
        for name, buffer in norm.named_buffers(recurse=False):
            modulated.register_buffer(name, buffer)
        modulated.synchronised = isinstance(norm, nn.SyncBatchNorm) or getattr(norm, "synchronised", False)
        return modulated


class ModulatedAdaptiveNorm2d(ModulatedBatchNorm2d):
    """y = a · x + b · norm(x), norm as in `ModulatedBatchNorm2d`, with a learnt a and b a layer.

    Adaptive normalisation (Chen, Xu and Koltun, Fast Image Processing with Fully-Convolutional Networks, ICCV 2017). It
    starts as the batch norm (a = 0, b = 1); there it starts as the identity (1, 0), which would give the deltas no
    gradient.
    """

    is_plain = False

    def __init__(self, *sizes: Any, **options: Any) -> None:
        """Arguments as those of `nn.BatchNorm2d`."""
        super().__init__(*sizes, **options)
        self.a = nn.Parameter(torch.zeros_like(self.running_mean[0]))
        self.b = nn.Parameter(torch.ones_like(self.running_mean[0]))

    def as_affine(self, x: Tensor, delta: Modulation) -> tuple[Tensor, Tensor]:
        """As `ModulatedBatchNorm2d.as_affine`."""
        scale, shift = super().as_affine(x, delta)
        return self.a + self.b * scale, self.b * shift

    def folded(self) -> tuple[Tensor, Tensor]:
        """Return γ and β [C] of the batch norm that this one is in evaluation mode; there b · delta is the delta."""
        deviation = torch.sqrt(self.running_var + self.eps)
        return self.b * self.weight + self.a * deviation, self.b * self.bias + self.a * self.running_mean


_present = nn.SyncBatchNorm.convert_sync_batchnorm.__func__
_convert_sync_batchnorm = getattr(_present, "of_torch", _present)  # the present one is ours if this is loaded again


def _keep_modulated_norms(
    cls: type[nn.SyncBatchNorm], module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """As `nn.SyncBatchNorm.convert_sync_batchnorm`, but mark a modulated norm as `synchronised`; torch would replace it
    by a norm without deltas.
    """
    if not isinstance(module, ModulatedBatchNorm2d):
        return _convert_sync_batchnorm(cls, module, process_group)
    if process_group is not None:
        raise ValueError("a modulated norm is synchronised over all processes, not over a process group")
    module.synchronised = True
    return module


_keep_modulated_norms.of_torch = _convert_sync_batchnorm
# torch replaces every subclass of BatchNorm2d and has no hook for it; trainers such as Lightning call it by this name.
nn.SyncBatchNorm.convert_sync_batchnorm = classmethod(_keep_modulated_norms)


def _over_processes(mean: Tensor, var: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the statistics of all processes; gradients flow through all of them. The count stays on the device."""
    counts = mean.new_full((), count)
    dist.all_reduce(counts)
    share = count / counts
    total = _SumOverProcesses.apply(share * mean)
    return total, _SumOverProcesses.apply(share * (var + (mean - total) ** 2)), counts


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
    """`nn.GroupNorm` whose γ and β take a delta per sample: instance norm with as many groups as channels, layer norm
    (over channels, height and width) with one. The statistics are the sample's own, in training and evaluation.
    """

    fused: Fused = True  # as in `modulate`

    def forward(
        self, x: Tensor, delta: Modulation | None = None, residual: Tensor | None = None, relu: bool = False
    ) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W], act(norm(x) (+ residual)); without a delta the norm is `nn.GroupNorm`.

        Raises:
            ValueError: x is not [B, C, H, W], a delta is not [B, C], or a group holds one value.
        """
        check_map(x, self.num_channels)
        delta = checked(delta, x)
        exact = x.to(at_least_float32(self.weight.dtype))
        grouped = exact.unflatten(1, (self.num_groups, -1)).flatten(2)  # [B, groups, values]
        if grouped.shape[2] < 2:
            raise ValueError("the statistics of a group need more than one value")
        var, mean = torch.var_mean(grouped, dim=2, correction=0)
        mean, var = (part.repeat_interleave(self.num_channels // self.num_groups, dim=1) for part in (mean, var))
        scale, shift = scale_and_shift(mean, var, self.weight, self.bias, delta, self.eps)
        return modulate(x, scale, shift, residual, relu=relu, fused=self.fused)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, groups: int, *sizes: int, **options: Any) -> Self:
        """Return a group norm with the γ and β (shared) and the ε of a batch norm; the rest goes to the constructor.

        Raises:
            ValueError: `norm` is no batch norm, or has no γ and β.
        """
        check_replaceable(norm)
        return in_place_of(norm, cls, groups, norm.num_features, *sizes, **options, eps=norm.eps)


GROUPS = 32  # of group normalisation (Wu and He 2018)


def groups_of(normaliser: str, channels: int) -> int:
    """Return the number of groups of an `instance`, `group` or `layer` norm of this number of channels."""
    return {"instance": channels, "group": min(GROUPS, channels), "layer": 1}[normaliser]
