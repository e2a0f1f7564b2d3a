"""torchvision's ResNets whose norms take a modulation as an argument (section 2 of the paper).

torchvision builds the network and defines every layer. Only the forward pass is restated, so that a norm takes its
deltas and performs the residual add and the ReLU that follow it. No module keeps state between calls.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vqa.backbone import build_resnet
from vqa.blocks import STAGES, Deltas, check_network, with_modulated_blocks
from vqa.kernels.frozen_conv import Convolution
from vqa.kernels.modulate import Fused
from vqa.norms import (
    Affine,
    ModulatedAdaptiveNorm2d,
    ModulatedBatchNorm2d,
    ModulatedGroupNorm,
    Modulation,
    Pooled,
    groups_of,
    is_empty,
    scale_and_shift,
)

Statistics = Literal["population", "batch"]
Normaliser = Literal["batch", "instance", "group", "layer", "adaptive"]

DECAY = 0.99  # of the moving averages of the policy `batch`, as in the authors' code


class StageMap(NamedTuple):
    """The map after a stage, which `ModulatedResNet` takes in place of the images it was computed from."""

    stage: int  # 0 is the stem
    map: Tensor  # [B, C, H, W]


class ConditionedNorm(NamedTuple):
    """A norm that takes deltas: its name in torchvision's network, its stage (0 is the stem), its channels."""

    name: str
    stage: int
    channels: int


def stage_of(name: str) -> int:
    """Return the stage of a layer by its name in torchvision's network; 0 is the stem."""
    return int(match[1]) if (match := re.match(r"layer(\d)\.", name)) else 0


def _modulated(place: str, norm: nn.BatchNorm2d, normaliser: Normaliser) -> ModulatedBatchNorm2d | ModulatedGroupNorm:
    """The norm at a place as one that takes deltas. Raises ValueError, naming the place, if it cannot be."""
    try:
        if normaliser in ("batch", "adaptive"):
            return (ModulatedBatchNorm2d if normaliser == "batch" else ModulatedAdaptiveNorm2d).from_batch_norm(norm)
        return ModulatedGroupNorm.from_batch_norm(norm, groups_of(normaliser, norm.num_features))
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


class ModulatedResNet(nn.Module):
    """A frozen ResNet up to stage 4 whose norms can be modulated.

    The statistics policy chooses the mean and variance that its batch norms normalise with:
    `population`: always the pretrained running ones; without a modulation, the network is the pretrained one.
    `batch`: those of the batch (of all processes) in training, moving averages of decay 0.99 in evaluation; the
    averages are reset.
    """

    def __init__(
        self,
        name: str | nn.Module,
        weights: str | Path | None = None,
        stages: Sequence[int] = (1, 2, 3, 4),
        *,
        stem: bool = False,
        shortcuts: bool = False,
        statistics: Statistics = "population",
        normaliser: Normaliser = "batch",
        fused: Fused = True,
        recompute: Sequence[int] = (),
    ) -> None:
        """
        Args:
            name: a ResNet of torchvision, or `resnet10` (torchvision's `ResNet` with one basic block a stage); or such
                a network itself, or timm's of the same form, which is copied with its weights.
            weights: torchvision's name of the weights, a file (as `build_resnet` reads), or None for random ones; None
                with a network.
            stages: stages (1 to 4) whose norms are conditioned: those after the convolutions of every block.
            stem: condition the stem's norm too.
            shortcuts: condition the norms on the shortcuts of `stages` too.
            statistics: the policy.
            normaliser: the kind of the conditioned norms. `adaptive` is a · x + b · batch norm of x, with a trained a
                and b; `instance`, `group` and `layer` normalise each sample with its own statistics and keep only the
                pretrained γ and β.
            fused: True: norm, residual add and ReLU are one operation whose backward pass saves the least, and
                convolutions save no input (`modulate`, `Convolution`); `eager`: the same without kernels and reordered
                weights; False: torch's own operations, equal up to rounding.
            recompute: stages whose inner maps are computed again in the backward pass instead of kept (gradient
                checkpointing, Chen et al. 2016).

        Raises:
            ValueError: unknown network, weights, stage, normaliser or policy, or a file that does not fit, naming the
                keys; a network of another form, with shared or pruned layers, or with batch norms without γ and β or
                running statistics, naming the layer; or stages to recompute under the policy `batch`, whose averages
                would move twice.
        """
        super().__init__()
        if unknown := {*stages, *recompute} - {1, 2, 3, 4}:
            raise ValueError(f"stages are 1, 2, 3 and 4, got {', '.join(map(str, sorted(unknown)))}")
        if normaliser not in get_args(Normaliser):
            raise ValueError(f"unknown {normaliser!r}; there are {', '.join(get_args(Normaliser))}")
        if fused not in (True, False, "eager"):
            raise ValueError(f"fused must be True, False or 'eager', not {fused!r}")
        if isinstance(name, nn.Module) and weights is not None:
            raise ValueError("a network has its own weights; `weights` must be None")
        resnet = name if isinstance(name, nn.Module) else build_resnet(name, weights)
        check_network(resnet)
        resnet = copy.deepcopy(resnet) if resnet is name else resnet
        self.recompute = frozenset(recompute)
        self.network = with_modulated_blocks(resnet)
        ends = (self.network[stage][-1] for stage in STAGES)
        self.stage_channels: list[int] = [end.get_submodule(end.last_norm).num_features for end in ends]
        self.channels = self.stage_channels[-1]

        def is_conditioned(place: str) -> bool:
            stage = stage_of(place)
            return stem if stage == 0 else stage in stages and (shortcuts or "downsample" not in place)

        self.layers: list[ConditionedNorm] = []
        for place, module in list(resnet.named_modules()):
            if isinstance(module, nn.Conv2d):
                made = Convolution.from_conv(module)
            elif isinstance(module, nn.BatchNorm2d):
                made = _modulated(place, module, normaliser if is_conditioned(place) else "batch")
                if is_conditioned(place):
                    self.layers.append(ConditionedNorm(place, stage_of(place), module.num_features))
            else:
                continue
            made.fused = fused
            self.network.set_submodule(place, made)
        self.requires_grad_(False)
        self.statistics: Statistics | None = None
        self.set_statistics(statistics)
        self.eval()

    def set_statistics(self, policy: Statistics) -> None:
        """Change the statistics policy: `batch` resets the averages to mean 0 and variance 1, `population` keeps the
        present running statistics.

        Raises:
            ValueError: unknown policy; or stages are recomputed, and it is `batch`, whose averages would move twice.
        """
        if policy not in get_args(Statistics):
            raise ValueError(f"unknown {policy!r}; there are {', '.join(get_args(Statistics))}")
        if self.recompute and policy == "batch":
            raise ValueError("stages cannot be recomputed under the policy batch: its averages would move twice")
        if policy == self.statistics:
            return
        self.statistics = policy
        for norm in self.batch_norms():
            norm.synchronised, norm.fixed = policy == "batch", policy == "population"
            if policy == "batch":
                norm.reset_running_stats()
                norm.momentum = 1 - DECAY
        self.train(self.training)

    def batch_norms(self) -> list[ModulatedBatchNorm2d]:
        """Return every batch norm, conditioned or not."""
        return [module for module in self.modules() if isinstance(module, ModulatedBatchNorm2d)]

    def least_batch(self, image_size: int) -> int:
        """Return the smallest batch whose own statistics can normalise it: two values per channel."""
        names = (name for name, module in self.network.named_modules() if isinstance(module, ModulatedBatchNorm2d))
        return 2 if image_size <= 32 and any(stage_of(name) == 4 for name in names) else 1  # one position in stage 4

    def forward(
        self, images: Tensor | StageMap, modulation: Modulation | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Normalised images [B, 3, S, S], or the result of `prefix` → the stage-4 map [B, C, S/32, S/32].

        Without a modulation (under `population`, with batch norms) this is the pretrained network. With `places`,
        int64 [B], sample i belongs to image places[i] of [I, 3, S, S]; stages that nothing conditions are then
        computed once an image.

        Raises:
            ValueError: the modulation has another shape, or is given with the map of a conditioned stage, which was
                computed without it.
        """
        map_, begin = self._start(images, modulation)
        if places is not None:
            shared = self.unconditioned_stage()
            if shared is not None and begin <= shared:
                map_, begin = self._run(map_, range(begin, shared + 1), {}), shared + 1
            map_ = map_[places]
        return self._run(map_, range(begin, 5), self._deltas(modulation, map_.shape[0]))

    def prefix(self, images: Tensor, stage: int) -> StageMap:
        """Normalised images [B, 3, S, S] → the map after the stem (stage 0) or a stage, without any modulation."""
        return StageMap(stage, self._run(images, range(stage + 1), {}))

    def stage_maps(self, images: Tensor | StageMap, modulation: Modulation | None = None) -> tuple[Tensor, ...]:
        """As `forward`, but return the maps after stages 1 to 4, [B, C, S/4, S/4] to [B, C, S/32, S/32]; for a
        given map, only those of the later stages. Raises ValueError as `forward`.
        """
        map_, begin = self._start(images, modulation)
        deltas, maps = self._deltas(modulation, len(map_)), []
        for stage in range(begin, 5):
            map_ = self._run(map_, range(stage, stage + 1), deltas)
            maps.append(map_)
        return tuple(maps[-4:])  # without the stem's

    def _start(self, images: Tensor | StageMap, modulation: Modulation | None) -> tuple[Tensor, int]:
        """Return what the network begins with, and its first stage (0 is the stem)."""
        if not isinstance(images, StageMap):
            return images, 0
        if not is_empty(modulation) and any(layer.stage <= images.stage for layer in self.layers):
            raise ValueError(f"the map after stage {images.stage} was computed without the modulation of its norms")
        return images.map, images.stage + 1

    def _run(self, map_: Tensor, stages: range, deltas: Deltas) -> Tensor:
        """Images, or the map before the first of the stages (0 is the stem) → the map after the last one."""
        for stage in stages:
            if stage in self.recompute and torch.is_grad_enabled():
                map_ = checkpoint(self._stage, stage, map_, deltas, use_reentrant=False)
            else:
                map_ = self._stage(stage, map_, deltas)
        return map_

    def _stage(self, stage: int, map_: Tensor, deltas: Deltas) -> Tensor:
        if stage == 0:
            network = self.network
            return network.maxpool(network.bn1(network.conv1(map_), deltas.get("bn1"), None, True))
        for block in self.network[f"layer{stage}"]:
            map_ = block(map_, deltas)
        return map_

    def fixed_state(self, stage: int) -> list[tuple[str, Tensor]]:
        """Return the names and values of the parameters and buffers that the map after a stage depends on."""
        return [(name, value) for name, value in self.network.state_dict().items() if stage_of(name) <= stage]

    def unconditioned_stage(self) -> int | None:
        """Return the last stage (0 is the stem) whose map is the same for all questions on an image, because no norm up
        to it is conditioned and none uses the statistics of a batch; None if there is no such stage.
        """
        if self.statistics == "batch":
            return None
        first = min([layer.stage for layer in self.layers] or [5])  # torch 2.11 cannot compile `default=`
        return first - 1 if first > 0 else None

    def fixed_stage(self) -> int | None:
        """Return the last stage (0 is the stem) whose map depends on the image alone in training too, because nothing
        up to it is conditioned or trained; None if there is no such stage.
        """
        unconditioned = self.unconditioned_stage()
        if unconditioned is None:
            return None
        trained = (stage_of(name) for name, value in self.network.named_parameters() if value.requires_grad)
        first = min(trained, default=5)
        return min(unconditioned, first - 1) if first > 0 else None

    def _deltas(self, modulation: Modulation | None, samples: int) -> Deltas:
        """Split a modulation of `samples` rows, or of one, by norm. Raises ValueError if it has another shape.

        Where all norms use running statistics, scale and shift are computed here for all of them at once, which saves
        two fifths of the operations that a training step launches on a GPU.
        """
        if is_empty(modulation):
            return {}
        widths = [layer.channels for layer in self.layers]
        rows, one_row = (samples, sum(widths)), (1, sum(widths))
        for part in modulation:
            if part is not None and part.shape not in (rows, one_row):
                raise ValueError(f"a modulation must be {list(rows)} or {list(one_row)}, got {list(part.shape)}")
        norms = [self.norm(layer.name) for layer in self.layers]
        plain = all(type(norm) is ModulatedBatchNorm2d and not norm.training for norm in norms)
        if plain and len({norm.eps for norm in norms}) == 1:
            names = ("running_mean", "running_var", "weight", "bias")
            joined = (torch.cat([getattr(norm, name) for norm in norms]) for name in names)
            modulation = Affine(*scale_and_shift(*joined, modulation, norms[0].eps))
        parts = (
            [None] * len(widths) if part is None else part.expand(rows).split(widths, dim=1) for part in modulation
        )
        return dict(zip((layer.name for layer in self.layers), map(type(modulation), *parts), strict=True))

    def norm(self, name: str) -> ModulatedBatchNorm2d | ModulatedGroupNorm:
        """Return a norm by its name in torchvision's network."""
        return self.network.get_submodule(name)

    def trainable(self, what: str) -> list[nn.Parameter]:
        """Return the parameters that `backbone.train` names: `none`, `stage4` (all of stage 4) or `batchnorm` (every γ
        and β); and the a and b of every adaptive norm. Raises ValueError if it is none of them.
        """
        adaptive = (module for module in self.network.modules() if isinstance(module, ModulatedAdaptiveNorm2d))
        learnt = [part for norm in adaptive for part in (norm.a, norm.b)]
        if what == "none":
            return learnt
        if what == "stage4":
            return list(dict.fromkeys([*learnt, *self.network.layer4.parameters()]))
        if what == "batchnorm":
            kinds = (ModulatedBatchNorm2d, ModulatedGroupNorm)
            norms = (module for module in self.network.modules() if isinstance(module, kinds))
            return [parameter for norm in norms for parameter in norm.parameters()]
        raise ValueError(f"backbone.train must be none, stage4 or batchnorm, not {what!r}")

    def train(self, mode: bool = True) -> "ModulatedResNet":
        """Set the mode; under the policy `population` the batch norms stay in evaluation mode."""
        super().train(mode)
        for norm in self.batch_norms():
            norm.train(mode and self.statistics == "batch")
        return self

    @contextmanager
    def estimating_statistics(self) -> Iterator[None]:
        """Normalise with the statistics of each batch inside the `with` block; at its end set the running statistics to
        those of all values of all batches (AdaBN, Li et al. 2016). An exception leaves them unchanged. Inside the block
        the mode must stay, and stages that are recomputed in a backward pass would be counted twice. Each process
        has the statistics of its own batches, but under the policy `batch`.

        Raises:
            ValueError: no batch went through in this mode.
        """
        norms = self.batch_norms()
        pools = [Pooled() for _ in norms]
        try:
            for norm, pool in zip(norms, pools, strict=True):
                norm.pooled = pool
                norm.train()
            yield
        finally:
            for norm in norms:
                norm.pooled = None
            self.train(self.training)
        if not all(pool.batches for pool in pools):
            raise ValueError("statistics need at least one batch, and no change of the mode in the block")
        for norm, pool in zip(norms, pools, strict=True):
            norm.take_statistics(pool)
