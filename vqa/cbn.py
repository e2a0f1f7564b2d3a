"""Conditional batch normalisation (section 3 of the paper).

For a batch norm with affine parameters γ, β and a condition e (here: the question's embedding),

    Δγ = MLP_γ(e),  Δβ = MLP_β(e)                                one hidden layer with ReLU each
    y  = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ)        one pair (Δγ, Δβ) a sample and channel

The layer is computed as y = scale · x + shift with scale = (γ + Δγ) / sqrt(var + ε) and
shift = β + Δβ − mean · scale, both [B, C]: one pass over the map instead of two.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Standard deviation of the last layer's initial weights: deltas begin near zero, so the network begins as pretrained.
INITIAL_DEVIATION = 0.01


class Modulation(NamedTuple):
    """What a condition adds to γ and β: [B, C] each for one norm, [B, sum of C] for all conditioned norms of a network
    in order of depth. None adds nothing.
    """

    gamma: Tensor | None
    beta: Tensor | None


def modulated_batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, gamma: Tensor, beta: Tensor, delta: Modulation, eps: float
) -> Tensor:
    """y = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ).

    Args:
        x: map [B, C, H, W]; the result has its type (under autocast it is computed in the type of γ).
        mean, var, gamma, beta: [C].
        delta: Δγ and Δβ, each [B, C] or None.
        eps: ε.
    """
    if delta.gamma is not None:
        gamma = gamma + delta.gamma.to(gamma.dtype)
    if delta.beta is not None:
        beta = beta + delta.beta.to(beta.dtype)
    scale = gamma * torch.rsqrt(var + eps)
    shift = beta - mean * scale
    scale, shift = (part.expand(len(x), -1)[:, :, None, None] for part in (scale, shift))
    return torch.addcmul(shift, x, scale).to(x.dtype)


class ModulatedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d`, by the same names of parameters and buffers, whose γ and β take a delta a sample.

    As there, the statistics are the batch's in training mode (and move the running ones), the running ones otherwise.
    """

    def forward(self, x: Tensor, delta: Modulation | None = None) -> Tensor:
        """x [B, C, H, W] → [B, C, H, W]; without a delta exactly what `nn.BatchNorm2d` gives."""
        if delta is None or (delta.gamma is None and delta.beta is None):
            return super().forward(x)
        for part in delta:
            if part is not None and part.shape != x.shape[:2]:
                raise ValueError(f"a delta must be [B, C] = {list(x.shape[:2])}, got {list(part.shape)}")
        if not self.training:
            return modulated_batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, delta, self.eps)
        var, mean = torch.var_mean(x.to(self.weight.dtype), dim=(0, 2, 3), correction=0)
        self._move_running_statistics(mean.detach(), var.detach(), x.numel() // x.shape[1])
        return modulated_batch_norm(x, mean, var, self.weight, self.bias, delta, self.eps)

    @torch.no_grad()
    def _move_running_statistics(self, mean: Tensor, var: Tensor, count: int) -> None:
        if count < 2:
            raise ValueError("batch statistics need more than one value a channel")
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * count / (count - 1), momentum)  # the running variance is the unbiased one

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d) -> "ModulatedBatchNorm2d":
        """The same norm, sharing its parameters and buffers, able to take deltas.

        Raises:
            ValueError: `norm` has no γ and β, or no running statistics.
        """
        if not (norm.affine and norm.track_running_stats):
            raise ValueError("a modulated norm needs γ, β and running statistics")
        modulated = cls(norm.num_features, norm.eps, norm.momentum)
        for name, parameter in norm.named_parameters():
            modulated.register_parameter(name, parameter)
        for name, buffer in norm.named_buffers():
            modulated.register_buffer(name, buffer)
        return modulated.train(norm.training)


class DeltaMLP(nn.Sequential):
    """Condition [B, D] → deltas [B, C] through one hidden layer with ReLU; near zero to begin with."""

    def __init__(self, condition_size: int, hidden_size: int, channels: int) -> None:
        super().__init__(nn.Linear(condition_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, channels))
        # Without biases to begin with: a small condition would drown in them, and all samples get the same deltas.
        nn.init.kaiming_normal_(self[0].weight, nonlinearity="relu")
        nn.init.zeros_(self[0].bias)
        nn.init.normal_(self[2].weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self[2].bias)


class ConditionalBatchNorm2d(ModulatedBatchNorm2d):
    """A batch norm whose γ and β are moved by a condition; usable in any network in place of `nn.BatchNorm2d`.

        norm = ConditionalBatchNorm2d(num_features=64, condition_size=256, hidden_size=128)
        y = norm(x, condition)              # x [B, 64, H, W], condition [B, 256] → [B, 64, H, W]

    γ, β and the running statistics keep the names of `nn.BatchNorm2d`, so a pretrained norm's state loads with
    `norm.load_state_dict(state, strict=False)` (only `delta_gamma` and `delta_beta` are missing there). To keep the
    pretrained network as the paper does, freeze them (`norm.weight.requires_grad_(False)`, likewise `bias`) and keep
    the layer in evaluation mode.
    """

    def __init__(
        self,
        num_features: int,
        condition_size: int,
        hidden_size: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.delta_gamma = DeltaMLP(condition_size, hidden_size, num_features)
        self.delta_beta = DeltaMLP(condition_size, hidden_size, num_features)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C, H, W]."""
        return super().forward(x, Modulation(self.delta_gamma(condition), self.delta_beta(condition)))


class ModulationPredictor(nn.Module):
    """The deltas of all conditioned norms of a network from one condition: two MLPs a norm."""

    def __init__(
        self,
        condition_size: int,
        names: Sequence[str],
        channels: Sequence[int],
        hidden_size: int,
        *,
        gamma: bool,
        beta: bool,
    ) -> None:
        """`names` and `channels` describe the norms in order of depth; `gamma` and `beta` say what is predicted.

        Raises:
            ValueError: neither γ nor β is predicted.
        """
        super().__init__()
        if not (gamma or beta):
            raise ValueError("a modulation predicts γ, β or both")

        def mlps() -> nn.ModuleDict:
            # a module's name cannot hold a dot
            named = zip((name.replace(".", "_") for name in names), channels, strict=True)
            return nn.ModuleDict({name: DeltaMLP(condition_size, hidden_size, count) for name, count in named})

        self.gamma = mlps() if gamma else None
        self.beta = mlps() if beta else None

    def forward(self, condition: Tensor) -> Modulation:
        """Condition [B, D] → Δγ, Δβ, each [B, sum of C] or None where it is not predicted."""

        def deltas(mlps: nn.ModuleDict | None) -> Tensor | None:
            return None if mlps is None else torch.cat([mlp(condition) for mlp in mlps.values()], dim=1)

        return Modulation(deltas(self.gamma), deltas(self.beta))
