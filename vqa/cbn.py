"""Conditional batch normalisation (section 3 of the paper), related norms, and the MLPs that predict the deltas.

For a norm with affine parameters γ, β and a condition e (in the paper: the question's embedding),

    Δγ = MLP_γ(e),  Δβ = MLP_β(e)                                one hidden layer with ReLU each
    y  = (γ + Δγ) · (x − mean) / sqrt(var + ε) + (β + Δβ)        one pair (Δγ, Δβ) a sample and channel

Each layer can replace a norm in any network. `vqa.norms` computes the second line. `ModulationPredictor` computes the
first for all norms of a network at once.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from vqa.kernels.modulate import modulate
from vqa.norms import (
    NO_MODULATION,
    ModulatedBatchNorm2d,
    ModulatedGroupNorm,
    Modulation,
    check_map,
    groups_of,
    in_place_of,
    scale_and_shift,
)

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

# Standard deviation of the last layer's initial weights: deltas start near zero, so the network starts as pretrained.
INITIAL_DEVIATION = 0.01


class DeltaMLP(nn.Sequential):
    """Condition [B, D] → deltas [B, C] through one hidden layer with ReLU; near zero at the start."""

    def __init__(self, condition_size: int, hidden_size: int, channels: int, **made: Any) -> None:
        """`made` may hold `device` and `dtype`."""
        first, last = nn.Linear(condition_size, hidden_size, **made), nn.Linear(hidden_size, channels, **made)
        super().__init__(first, nn.ReLU(), last)
        # Biases start at zero: random ones would outweigh a small condition, and all deltas would be equal.
        nn.init.kaiming_normal_(self[0].weight, nonlinearity="relu")
        nn.init.zeros_(self[0].bias)
        nn.init.normal_(self[2].weight, std=INITIAL_DEVIATION)
        nn.init.zeros_(self[2].bias)


class _Conditioned(nn.Module):
    """The part of a conditional norm that predicts its deltas: `delta_gamma` and `delta_beta`, each an MLP or None."""

    def _condition_on(
        self, condition_size: int, hidden_size: int, channels: int, gamma: bool, beta: bool, **made: Any
    ) -> None:
        if not (gamma or beta):
            raise ValueError("a conditional norm predicts γ, β or both")
        for name, predicted in (("delta_gamma", gamma), ("delta_beta", beta)):
            setattr(self, name, DeltaMLP(condition_size, hidden_size, channels, **made) if predicted else None)

    def deltas(self, condition: Tensor) -> Modulation:
        """Condition [B, D] → Δγ, Δβ, each [B, C] or None where it is not predicted."""
        return Modulation(*(None if part is None else part(condition) for part in (self.delta_gamma, self.delta_beta)))


class ConditionalBatchNorm2d(_Conditioned, ModulatedBatchNorm2d):
    """A batch norm whose γ and β are moved by a condition; replaces `nn.BatchNorm2d` in any network.

        norm = ConditionalBatchNorm2d(num_features=64, condition_size=256, hidden_size=128)
        y = norm(x, condition)              # x [B, 64, H, W], condition [B, 256] → [B, 64, H, W]

    `ConditionalBatchNorm2d.from_batch_norm(pretrained, condition_size, hidden_size)` replaces a pretrained norm and
    shares its parameters and statistics. They have the names of `nn.BatchNorm2d`, so the state of a pretrained norm
    loads with `norm.load_state_dict(state, strict=False)` (only `delta_gamma` and `delta_beta` are missing there). To
    keep the pretrained network as the paper does, freeze γ and β (`norm.weight.requires_grad_(False)`, likewise `bias`)
    and keep the layer in evaluation mode. `gamma=False` or `beta=False` predicts only the other.
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
        """`gamma` and `beta` say what is predicted; `made` may hold `device` and `dtype`."""
        super().__init__(num_features, eps, momentum, **made)
        self._condition_on(condition_size, hidden_size, num_features, gamma, beta, **made)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C, H, W]."""
        return super().forward(x, self.deltas(condition))


class ConditionalBatchNorm1d(ConditionalBatchNorm2d):
    """The same for `nn.BatchNorm1d`: x [B, C] or [B, C, T]."""

    dimensions = (2, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x with one of `dimensions`, condition [B, D] → as x."""
        if x.ndim not in self.dimensions or x.shape[1] != self.num_features:
            dimensions = " or ".join(map(str, self.dimensions))
            raise ValueError(f"x must have {dimensions} dimensions and C = {self.num_features}, got {list(x.shape)}")
        return super().forward(x.reshape(*x.shape[:2], -1, 1), condition).reshape(x.shape)


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
        """`gamma` and `beta` say what is predicted; `made` may hold `device` and `dtype`."""
        super().__init__(num_groups, num_features, eps, **made)
        self._condition_on(condition_size, hidden_size, num_features, gamma, beta, **made)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, C, H, W], condition [B, D] → [B, C, H, W]."""
        return super().forward(x, self.deltas(condition))


class _OfFixedGroups(ConditionalGroupNorm):
    """A conditional group norm whose kind determines the number of groups."""

    kind: str

    def __init__(self, num_features: int, condition_size: int, hidden_size: int, **options: Any) -> None:
        """`options` as those of `ConditionalGroupNorm`."""
        super().__init__(groups_of(self.kind, num_features), num_features, condition_size, hidden_size, **options)

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, condition_size: int, hidden_size: int, **options: Any) -> Self:
        """Return a norm of this kind with the γ and β (shared) and the ε of a batch norm."""
        make = partial(cls, norm.num_features, condition_size, hidden_size, eps=norm.eps, **options)
        return in_place_of(norm, make)


class ConditionalInstanceNorm2d(_OfFixedGroups):
    """An instance norm whose γ and β are moved by a condition (as in Dumoulin et al. 2017 and AdaIN)."""

    kind = "instance"


class ConditionalLayerNorm2d(_OfFixedGroups):
    """A layer norm (over channels, height and width) whose γ and β are moved by a condition."""

    kind = "layer"


class CategoricalConditionalBatchNorm2d(ModulatedBatchNorm2d):
    """A batch norm with one γ and one β for each class, as in conditional GANs (Miyato and Koyama 2018).

    `weight` (initially ones) and `bias` (zeros) are [K, C].
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        **made: Any,
    ) -> None:
        """`made` may hold `device` and `dtype`."""
        super().__init__(num_features, eps, momentum, **made)
        self.weight = nn.Parameter(torch.ones(num_classes, num_features, **made))
        self.bias = nn.Parameter(torch.zeros(num_classes, num_features, **made))

    @classmethod
    def from_batch_norm(cls, norm: nn.BatchNorm2d, num_classes: int) -> Self:
        """Return the same norm, sharing its buffers, with a copy of its γ and β for every class."""
        modulated = super().from_batch_norm(norm, num_classes)
        for name in ("weight", "bias"):
            value = getattr(norm, name)
            setattr(modulated, name, nn.Parameter(value.detach().repeat(num_classes, 1), value.requires_grad))
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


class _Predictor(nn.Module):
    """Δγ and Δβ of all conditioned norms of a network from one condition, each by a module or not at all."""

    def __init__(self, make: Callable[[], nn.Module], gamma: bool, beta: bool) -> None:
        if not (gamma or beta):
            raise ValueError("a modulation predicts γ, β or both")
        super().__init__()
        self.gamma = make() if gamma else None
        self.beta = make() if beta else None

    def forward(self, condition: Tensor) -> Modulation:
        """Condition → Δγ, Δβ, each [B, sum of C] or None where it is not predicted."""
        return Modulation(*(None if part is None else part(condition) for part in (self.gamma, self.beta)))


class ModulationPredictor(_Predictor):
    """The deltas of all conditioned norms of a network from one condition [B, D]: two MLPs a norm."""

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
        super().__init__(lambda: DeltaMLPs(condition_size, names, channels, hidden_size), gamma, beta)


class CategoricalPredictor(_Predictor):
    """The deltas of all conditioned norms of a network from classes, int64 [B]: tables that start with zeros.

    γ + Δγ and β + Δβ are then those of `CategoricalConditionalBatchNorm2d`, starting at the pretrained γ and β.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], *, gamma: bool, beta: bool) -> None:
        """As `ModulationPredictor`."""
        zeros = partial(torch.zeros, num_classes, sum(channels))
        super().__init__(lambda: nn.Embedding.from_pretrained(zeros(), freeze=False), gamma, beta)


JOINED = ("hidden_weight", "hidden_bias", "weight", "bias")  # the parameters of `DeltaMLPs`


class DeltaMLPs(nn.Module):
    """A `DeltaMLP` for each of N norms, all computed together.

    The first layers share their input and are one layer of N * H units. The last ones share nothing. On a GPU, where
    each product is a launch, they are one batched product of pieces of equal width, the greatest common divisor of the
    numbers of channels (64 in torchvision's ResNets). On a CPU one product a norm is faster.

    The state dict has the parameters of each MLP under the name of its norm, such as `layer1_0_bn1.0.weight`.
    """

    def __init__(self, condition_size: int, names: Sequence[str], channels: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.names = [name.replace(".", "_") for name in names]  # a module's name cannot hold a dot
        self.channels, self.hidden_size = list(channels), hidden_size
        mlps = [DeltaMLP(condition_size, hidden_size, count) for count in channels]
        self.hidden_weight = nn.Parameter(torch.cat([mlp[0].weight.detach() for mlp in mlps]))  # [N * H, D]
        self.hidden_bias = nn.Parameter(torch.cat([mlp[0].bias.detach() for mlp in mlps]))  # [N * H]
        self.weight = nn.Parameter(torch.cat([mlp[2].weight.detach() for mlp in mlps]))  # [sum of C, H]
        self.bias = nn.Parameter(torch.cat([mlp[2].bias.detach() for mlp in mlps]))  # [sum of C]
        self.piece = math.gcd(*self.channels)
        self.register_state_dict_post_hook(DeltaMLPs._save_by_norm)
        self.register_load_state_dict_pre_hook(DeltaMLPs._load_by_norm)

    def forward(self, condition: Tensor) -> Tensor:
        """Condition [B, D] → deltas [B, sum of C]."""
        hidden = torch.relu(nn.functional.linear(condition, self.hidden_weight, self.hidden_bias))
        together = self._in_one_product if condition.device.type == "cuda" else self._one_by_one
        return together(hidden) + self.bias

    def _one_by_one(self, hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(self.hidden_size, 1), self.weight.split(self.channels), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts], dim=1)

    def _in_one_product(self, hidden: Tensor) -> Tensor:
        norms = [norm for norm, count in enumerate(self.channels) for _ in range(count // self.piece)]
        # Built here and not kept: a plain attribute would stay on the device the module was built on.
        norm_of_piece = torch.tensor(norms, device="cpu").to(hidden.device, non_blocking=True)
        parts = hidden.view(len(hidden), -1, self.hidden_size).transpose(0, 1)[norm_of_piece]  # [pieces, B, H]
        weights = self.weight.view(len(parts), self.piece, self.hidden_size)
        return torch.bmm(parts, weights.transpose(1, 2)).transpose(0, 1).reshape(len(hidden), -1)

    def _by_norm(self, prefix: str, joined: Iterable[Tensor]) -> dict[str, Tensor]:
        """Split the four joined parameters into views by the names of each MLP's parameters."""
        sizes = (self.hidden_size, self.hidden_size, self.channels, self.channels)
        keys, parts = ("0.weight", "0.bias", "2.weight", "2.bias"), {}
        for name, *mlp in zip(self.names, *map(torch.split, joined, sizes), strict=True):
            parts |= {f"{prefix}{name}.{key}": part for key, part in zip(keys, mlp, strict=True)}
        return parts

    def _save_by_norm(self, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
        state.update(self._by_norm(prefix, [state.pop(prefix + name) for name in JOINED]))

    def _load_by_norm(self, state, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        joined = {prefix + name: getattr(self, name).detach().clone() for name in JOINED}
        unexpected += joined.keys() & state.keys()
        for name, part in self._by_norm(prefix, joined.values()).items():
            if name not in state:
                missing.append(name)
            elif (found := state.pop(name)).shape != part.shape:
                errors.append(f"size mismatch for {name}: {list(found.shape)}, not {list(part.shape)}")
            else:
                part.copy_(found)
        state.update(joined)
