"""The MLPs that predict the deltas (section 3 of the paper), for one norm or for all norms of a network at once.

For a norm and a condition e (in the paper: the question's embedding),

    Δγ = MLP_γ(e),  Δβ = MLP_β(e)                                one hidden layer with ReLU each
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vqa.norms import Modulation

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


class Predictor(nn.Module):
    """Δγ and Δβ of all conditioned norms of a network from one condition, each by a module or not at all."""

    def __init__(self, make: Callable[[], nn.Module], gamma: bool, beta: bool) -> None:
        """`make` makes the module for each of the two that are predicted. Raises ValueError if neither is."""
        if not (gamma or beta):
            raise ValueError("a modulation predicts γ, β or both")
        super().__init__()
        self.gamma = make() if gamma else None
        self.beta = make() if beta else None

    def forward(self, condition: Tensor) -> Modulation:
        """Condition → Δγ, Δβ, each [B, sum of C] or None where it is not predicted."""
        return Modulation(*(None if part is None else part(condition) for part in (self.gamma, self.beta)))


class ModulationPredictor(Predictor):
    """The deltas of all conditioned norms of a network from one condition [B, D]: two MLPs per norm."""

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


class CategoricalPredictor(Predictor):
    """The deltas of all conditioned norms of a network from classes, int64 [B]: tables that start with zeros.

    γ + Δγ and β + Δβ are then those of `CategoricalConditionalBatchNorm2d`, starting at the pretrained γ and β.
    """

    def __init__(self, num_classes: int, channels: Sequence[int], *, gamma: bool, beta: bool) -> None:
        """As `ModulationPredictor`; `channels` are those of each norm, in order of depth."""
        zeros = torch.zeros(num_classes, sum(channels))
        super().__init__(lambda: nn.Embedding.from_pretrained(zeros.clone(), freeze=False), gamma, beta)


JOINED = ("hidden_weight", "hidden_bias", "weight", "bias")  # the parameters of `DeltaMLPs`


class DeltaMLPs(nn.Module):
    """A `DeltaMLP` for each of N norms, all computed together.

    The first layers share their input and are one layer of N * H units. The last ones share nothing. On a GPU, where
    each product is a launch, they are one batched product of pieces of equal width, the greatest common divisor of the
    numbers of channels (64 in torchvision's ResNets). On a CPU one product per norm is faster.

    The state dict has the parameters of each MLP under the name of its norm, such as `layer1_0_bn1.0.weight`, as views
    of the four joined parameters that `named_parameters` returns. `load_state_dict` takes either names. Where a joined
    parameter is pruned or parametrised, the state dict has the joined names.
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
        together = self._one_by_one if condition.device.type == "cpu" else self._in_one_product
        return together(hidden) + self.bias

    def _one_by_one(self, hidden: Tensor) -> Tensor:
        parts = zip(hidden.split(self.hidden_size, 1), self.weight.split(self.channels), strict=True)
        return torch.cat([part @ weight.T for part, weight in parts], dim=1)

    def _in_one_product(self, hidden: Tensor) -> Tensor:
        norms = [norm for norm, count in enumerate(self.channels) for _ in range(count // self.piece)]
        # Built here and not kept: a plain attribute would stay on the device the module was built on.
        norm_of_piece = torch.tensor(norms, device="cpu").to(hidden.device, non_blocking=True)
        parts = hidden.unflatten(1, (-1, self.hidden_size)).transpose(0, 1)[norm_of_piece]  # [pieces, B, H]
        weights = self.weight.view(len(parts), self.piece, self.hidden_size)
        return torch.bmm(parts, weights.transpose(1, 2)).transpose(0, 1).flatten(1)

    def _by_norm(self, prefix: str, joined: Iterable[Tensor]) -> dict[str, Tensor]:
        """Split the four joined parameters into views by the names of each MLP's parameters."""
        sizes = (self.hidden_size, self.hidden_size, self.channels, self.channels)
        keys, parts = ("0.weight", "0.bias", "2.weight", "2.bias"), {}
        for name, *mlp in zip(self.names, *map(torch.split, joined, sizes), strict=True):
            parts |= {f"{prefix}{name}.{key}": part for key, part in zip(keys, mlp, strict=True)}
        return parts

    def _save_by_norm(self, state: dict[str, Tensor], prefix: str, _metadata: object) -> None:
        if all(prefix + name in state for name in JOINED):
            state.update(self._by_norm(prefix, [state.pop(prefix + name) for name in JOINED]))

    def _load_by_norm(self, state, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        joined = [prefix + name for name in JOINED]
        parts = self._by_norm(prefix, [getattr(self, name).detach() for name in JOINED])
        if any(name in state for name in joined) and not any(name in state for name in parts):
            return  # torch itself loads the joined parameters
        unexpected += [name for name in joined if name in state]
        for name, part in parts.items():
            if name not in state:
                missing.append(name)
            elif (found := state.pop(name).detach()).shape != part.shape:
                errors.append(f"size mismatch for {name}: {list(found.shape)}, not {list(part.shape)}")
            else:
                parts[name] = found
        for place, name in enumerate(joined):
            pieces = list(parts.values())[place :: len(joined)]
            like = min(pieces, key=lambda piece: not piece.is_meta)  # what is missing of a meta module stays there
            state[name] = torch.cat([piece.to(like) for piece in pieces])
