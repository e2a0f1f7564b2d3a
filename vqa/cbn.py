"""Conditional batch normalisation (section 3 of the paper) and related norms.

For a norm with affine parameters γ, β and a condition e (in the paper: the question's embedding),

    Δγ = MLP_γ(e),  Δβ = MLP_β(e)                                one hidden layer with ReLU each
    y  = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ)        one pair (Δγ, Δβ) per sample and channel

Each layer can replace a norm in any network. `vqa.norms` computes the second line, `vqa.predictor` the first, also for
all norms of a network at once.
"""

from typing import Any, Self

from torch import Tensor, nn

from vqa.kernels.modulate import modulate
from vqa.norms import (
    NO_MODULATION,
    ModulatedBatchNorm2d,
    ModulatedGroupNorm,
    Modulation,
    check_map,
    check_replaceable,
    groups_of,
    in_place_of,
    scale_and_shift,
)
from vqa.predictor import CategoricalPredictor, DeltaMLP, ModulationPredictor

__all__ = [
    "CategoricalConditionalBatchNorm2d",
    "CategoricalPredictor",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "ConditionalGroupNorm",
    "ConditionalInstanceNorm2d",
    "ConditionalLayerNorm2d",
    "Modulation",
    "ModulationPredictor",
]


class _Conditioned(nn.Module):
    """The part of a conditional norm that predicts its deltas: `delta_gamma` and `delta_beta`, each an MLP or None."""

    def _condition_on(self, condition_size: int, hidden_size: int, gamma: bool, beta: bool) -> None:
        if not (gamma or beta):
            raise ValueError("a conditional norm predicts γ, β or both")
        sizes, like = (condition_size, hidden_size, len(self.weight)), self.weight
        for name, predicted in (("delta_gamma", gamma), ("delta_beta", beta)):
            setattr(self, name, DeltaMLP(*sizes, device=like.device, dtype=like.dtype) if predicted else None)

    def deltas(self, condition: Tensor) -> Modulation:
        """Condition [B, D] → Δγ, Δβ, each [B, C] or None where it is not predicted."""
        return Modulation(*(None if part is None else part(condition) for part in (self.delta_gamma, self.delta_beta)))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C, H, W].

        Raises:
            ValueError: x is not [B, C, H, W], the condition not [B, D], or there are too few values for statistics.
        """
        return super().forward(x, self.deltas(condition))


class ConditionalBatchNorm2d(_Conditioned, ModulatedBatchNorm2d):
    """A batch norm whose γ and β are moved by a condition; replaces `nn.BatchNorm2d` in any network.

        norm = ConditionalBatchNorm2d(num_features=64, condition_size=256, hidden_size=128)
        y = norm(x, condition)              # x [B, 64, H, W], condition [B, 256] → [B, 64, H, W]

    `ConditionalBatchNorm2d.from_batch_norm(pretrained, condition_size, hidden_size)` replaces a pretrained norm and
    shares its parameters and statistics. They have the names of `nn.BatchNorm2d`, so the state of a pretrained norm
    loads with `norm.load_state_dict(state, strict=False)` (only `delta_gamma` and `delta_beta` are missing there). To
    keep the pretrained network as the paper does, freeze γ and β (`requires_grad_(False)` on `weight` and `bias`) and
    keep the layer in evaluation mode. `gamma=False` or `beta=False` predicts only the other.
    """

    def __init__(
        self,
        num_features: int,
        condition_size: int,
        hidden_size: int,
        *,
        gamma: bool = True,
        beta: bool = True,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **made: Any,
    ) -> None:
        """`gamma` and `beta` say what is predicted, ValueError if neither; `made` may hold `device` and `dtype`."""
        super().__init__(num_features, eps, momentum, **made)
        self._condition_on(condition_size, hidden_size, gamma, beta)


class ConditionalBatchNorm1d(ConditionalBatchNorm2d):
    """The same for `nn.BatchNorm1d`: x [B, C] or [B, C, T]."""

    dimensions = (2, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x with one of `dimensions`, condition [B, D] → as x. Raises ValueError for other shapes."""
        if x.ndim not in self.dimensions or x.shape[1] != self.num_features:
            dimensions = " or ".join(map(str, self.dimensions))
            raise ValueError(f"x must have {dimensions} dimensions and C = {self.num_features}, got {list(x.shape)}")
        return super().forward(x[..., None].flatten(2)[..., None], condition).reshape(x.shape)


class ConditionalBatchNorm3d(ConditionalBatchNorm1d):
    """The same for `nn.BatchNorm3d`: x [B, C, T, H, W]."""

    dimensions = (5,)


class ConditionalGroupNorm(_Conditioned, ModulatedGroupNorm):
    """A group norm whose γ and β are moved by a condition."""

    def __init__(
        self,
        num_groups: int,
        num_features: int,
        condition_size: int,
        hidden_size: int,
        *,
        gamma: bool = True,
        beta: bool = True,
        eps: float = 1e-5,
        **made: Any,
    ) -> None:
        """`gamma` and `beta` say what is predicted, ValueError if neither; `made` may hold `device` and `dtype`."""
        super().__init__(num_groups, num_features, eps, **made)
        self._condition_on(condition_size, hidden_size, gamma, beta)


class _OfFixedGroups(ConditionalGroupNorm):
    """A conditional group norm whose kind determines the number of groups."""

    kind: str

    def __init__(self, num_features: int, condition_size: int, hidden_size: int, **options: Any) -> None:
        """`options` as those of `ConditionalGroupNorm`."""
        super().__init__(groups_of(self.kind, num_features), num_features, condition_size, hidden_size, **options)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, condition_size: int, hidden_size: int, **options: Any) -> Self:
        """Return a norm of this kind with the γ and β (shared) and the ε of a batch norm.

        Raises:
            ValueError: `norm` is no batch norm, or has no γ and β.
        """
        check_replaceable(norm)
        return in_place_of(norm, cls, norm.num_features, condition_size, hidden_size, eps=norm.eps, **options)


class ConditionalInstanceNorm2d(_OfFixedGroups):
    """An instance norm whose γ and β are moved by a condition (as in Dumoulin et al. 2017 and AdaIN)."""

    kind = "instance"


class ConditionalLayerNorm2d(_OfFixedGroups):
    """A layer norm (over channels, height and width) whose γ and β are moved by a condition."""

    kind = "layer"


def _for_each_class(value: nn.Parameter, num_classes: int) -> nn.Parameter:
    """[C] → [K, C], a copy for each class."""
    return nn.Parameter(value.detach().repeat(num_classes, 1), value.requires_grad)


class CategoricalConditionalBatchNorm2d(ModulatedBatchNorm2d):
    """A batch norm with one γ and one β for each class, as in conditional GANs (Miyato and Koyama 2018).

    `weight` (initially ones) and `bias` (zeros) are [K, C].
    """

    def __init__(
        self, num_features: int, num_classes: int, *, eps: float = 1e-5, momentum: float | None = 0.1, **made: Any
    ) -> None:
        """`made` may hold `device` and `dtype`."""
        super().__init__(num_features, eps, momentum, **made)
        self.weight, self.bias = _for_each_class(self.weight, num_classes), _for_each_class(self.bias, num_classes)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, num_classes: int) -> Self:
        """Return the same norm, sharing its buffers, with a copy of its γ and β for every class. Raises ValueError as
        `ModulatedBatchNorm2d.from_batch_norm`.
        """
        modulated = super().from_batch_norm(norm, num_classes)
        for name in ("weight", "bias"):
            setattr(modulated, name, _for_each_class(getattr(norm, name), num_classes))
        return modulated

    def forward(self, x: Tensor, classes: Tensor) -> Tensor:
        """x [B, C, H, W], classes int64 [B] → [B, C, H, W].

        Raises:
            ValueError: classes are not [B], or (on a CPU; CUDA asserts instead) not from 0 to K − 1.
        """
        check_map(x, self.num_features)
        if classes.shape != x.shape[:1]:
            raise ValueError(f"classes must be [B] = [{len(x)}], got {list(classes.shape)}")
        try:  # before the running statistics move
            gamma, beta = (nn.functional.embedding(classes, table) for table in (self.weight, self.bias))
        except IndexError:
            raise ValueError(f"classes must be from 0 to {len(self.weight) - 1}, got {classes.tolist()}") from None
        scale, shift = scale_and_shift(*self.statistics(x), gamma, beta, NO_MODULATION, self.eps)
        return modulate(x, scale, shift, fused=self.fused)
