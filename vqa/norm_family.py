"""Three relatives of conditional batch normalisation, each a layer on its own, in torch's operations.

x̂ is x normalised with the statistics of a batch norm; Δγ and Δβ are predicted from a condition as in `vqa.cbn`. Each
layer is made from a pretrained norm by `from_batch_norm(norm, condition_size, hidden_size)`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vqa.cbn import ConditionalBatchNorm2d
from vqa.norms import (
    ModulatedAdaptiveNorm2d,
    ModulatedBatchNorm2d,
    Modulation,
    at_least_float32,
    check_map,
    scale_and_shift,
)
from vqa.predictor import INITIAL_DEVIATION


class ConditionalAdaptiveNorm2d(ConditionalBatchNorm2d, ModulatedAdaptiveNorm2d):
    """y = a · x + b · ((γ + Δγ) · x̂ + β + Δβ), with a learnt a and b per layer; see `ModulatedAdaptiveNorm2d`."""


class ConditionalSwitchableNorm2d(ConditionalBatchNorm2d):
    """y = (γ + Δγ) · (x − Σ w_k mean_k) / sqrt(Σ v_k var_k + ε) + β + Δβ, k: batch, instance and layer statistics.

    w = softmax(mean_logits) and v = softmax(var_logits) are learnt and start at thirds (Luo et al., Differentiable
    Learning-to-Normalize via Switchable Normalization, ICLR 2019). In evaluation mode the batch's statistics are the
    running ones.
    """

    is_plain = False

    def __init__(self, *sizes: int, **options: Any) -> None:
        """Arguments as those of `ConditionalBatchNorm2d`."""
        super().__init__(*sizes, **options)
        self.mean_logits = nn.Parameter(self.running_mean.new_ones(3))
        self.var_logits = nn.Parameter(self.running_mean.new_ones(3))

    def as_affine(self, x: Tensor, delta: Modulation) -> tuple[Tensor, Tensor]:
        """As `ModulatedBatchNorm2d.as_affine`."""
        found, exact = [self.statistics(x)], x.to(at_least_float32(self.weight.dtype))
        for values in ((2, 3), (1, 2, 3)):  # of a channel of a sample, of a sample
            var, mean = torch.var_mean(exact, dim=values, correction=0, keepdim=True)
            found.append((mean.flatten(1).expand(x.shape[:2]), var.flatten(1).expand(x.shape[:2])))
        mean, var = (
            sum(share * part for share, part in zip(logits.softmax(0), parts, strict=True))
            for logits, parts in zip((self.mean_logits, self.var_logits), zip(*found, strict=True), strict=True)
        )
        return scale_and_shift(mean, var, self.weight, self.bias, delta, self.eps)


class SpatialConditionalBatchNorm2d(ModulatedBatchNorm2d):
    """y = (γ + Δγ(m)) · x̂ + β + Δβ(m), a pair (Δγ, Δβ) a channel and *position*, from a map m.

    Spatially-adaptive normalisation (SPADE; Park et al., Semantic Image Synthesis with Spatially-Adaptive
    Normalization, CVPR 2019), there with γ = 1 and β = 0: m is resized to x (nearest), a 3 x 3 convolution with ReLU
    follows, and one 3 x 3 convolution each for Δγ and Δβ, here near zero at the start. A question embedding enters as
    channels of m.
    """

    def __init__(self, num_features: int, condition_size: int, hidden_size: int, **options: Any) -> None:
        """`condition_size` is the number of channels of m; options as those of `nn.BatchNorm2d`."""
        super().__init__(num_features, **options)
        like = {"padding": 1, "device": self.weight.device, "dtype": self.weight.dtype}
        self.hidden = nn.Sequential(nn.Conv2d(condition_size, hidden_size, 3, **like), nn.ReLU())
        self.deltas = nn.Conv2d(hidden_size, 2 * num_features, 3, **like)  # Δγ, then Δβ
        nn.init.normal_(self.deltas.weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self.deltas.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, D, H', W'] → [B, C, H, W]."""
        check_map(x, self.num_features)
        if condition.ndim != 4 or len(condition) != len(x):
            raise ValueError(f"a condition must be [B, D, H', W'] with B = {len(x)}, got {list(condition.shape)}")
        deltas = self.deltas(self.hidden(nn.functional.interpolate(condition, x.shape[2:]))).to(self.weight.dtype)
        gamma, beta = deltas.chunk(2, dim=1)
        mean, var, weight, bias = (part[:, None, None] for part in (*self.statistics(x), self.weight, self.bias))
        return ((weight + gamma) * (x - mean) * torch.rsqrt(var + self.eps) + bias + beta).to(x.dtype)
