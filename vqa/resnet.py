"""torchvision's ResNets whose norms take a modulation as an argument (section 3.1 of the paper).

torchvision builds the network and defines every layer. Only the forward pass is restated, so that a norm takes its
deltas, and the residual and the ReLU that follow it; nothing is kept between calls.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck

from vqa.backbone import build_resnet
from vqa.kernels.frozen_conv import Convolution
from vqa.kernels.modulate import Fused
from vqa.norms import Folded, ModulatedBatchNorm2d, ModulatedGroupNorm, Modulation, Pooled, folded_at_once, groups_of

Statistics = Literal["population", "batch"]
Normaliser = Literal["batch", "instance", "group", "layer"]

DECAY = 0.99  # of the moving averages of the policy `batch`, as in the authors' code


class StageMap(NamedTuple):
    """The map after a stage, standing for the images it was made from."""

    stage: int  # 0 is the stem
    map: Tensor  # [B, C, H, W]


class ConditionedNorm(NamedTuple):
    """A norm that takes deltas: its name in torchvision's network, its stage (0 is the stem), its channels."""

    name: str
    stage: int
    channels: int


Deltas = Mapping[str, Modulation | Folded]  # by the names of the conditioned norms


def stage_of(name: str) -> int:
    """The stage of a part of torchvision's network by its name; 0 is the stem."""
    return int(match[1]) if (match := re.match(r"layer(\d)\.", name)) else 0


LAYERS = {  # of torchvision's blocks, in the order of the forward pass, which optimisers' states go by
    BasicBlock: ("conv1", "bn1", "conv2", "downsample", "bn2"),
    Bottleneck: ("conv1", "bn1", "conv2", "bn2", "conv3", "downsample", "bn3"),
}


class ModulatedBlock(nn.Module):
    """The layers of a residual block of torchvision, by their names there, with norms that take deltas."""

    def __init__(self, name: str, block: nn.Module) -> None:
        """`name` is that of the block in torchvision's network.

        Raises:
            ValueError: the block is neither a `BasicBlock` nor a `Bottleneck`.
        """
        super().__init__()
        if type(block) not in LAYERS:
            raise ValueError(f"{name} must be a BasicBlock or a Bottleneck of torchvision, not {type(block).__name__}")
        self.name, self.last_norm = name, LAYERS[type(block)][-1]
        for layer in LAYERS[type(block)]:
            setattr(self, layer, getattr(block, layer))

    def forward(self, x: Tensor, deltas: Deltas) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W']."""

        def norm(name: str, y: Tensor, residual: Tensor | None = None, relu: bool = True) -> Tensor:
            return self.get_submodule(name)(y, deltas.get(f"{self.name}.{name}"), residual, relu)

        y = self.conv2(norm("bn1", self.conv1(x)))
        if self.last_norm == "bn3":
            y = self.conv3(norm("bn2", y))
        shortcut = x if self.downsample is None else norm("downsample.1", self.downsample[0](x), relu=False)
        return norm(self.last_norm, y, shortcut)


class ModulatedResNet(nn.Module):
    """A frozen ResNet up to stage 4 whose norms can be modulated.

    What its norms normalise with is the statistics policy:
    `population`: the pretrained running mean and variance, always; the network begins as exactly the pretrained one.
    `batch`: in training the batch's (of all processes), in evaluation moving averages of decay 0.99 that begin afresh.
    """

    def __init__(
        self,
        name: str,
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
            name: a ResNet of torchvision, or `resnet10` (torchvision's `ResNet` with one basic block a stage).
            weights: torchvision's name of the weights, a file (as `build_resnet` reads), or None for random ones.
            stages: stages (1 to 4) whose norms are conditioned: those after the convolutions of every block.
            stem: condition the stem's norm too.
            shortcuts: condition the norms on the shortcuts of `stages` too.
            statistics: the policy.
            normaliser: what the conditioned norms are; all but `batch` take a sample's own statistics and keep only the
                pretrained γ and β.
            fused: norm, shortcut and ReLU as one operation whose backward pass saves the least, and convolutions that
                save no input (`modulate`, `Convolution`); False: torch's own operations, equal up to rounding; `eager`:
                as True, without kernels and with the weights as they are.
            recompute: stages whose inner maps are not kept for the backward pass but computed again there (gradient
                checkpointing, Chen et al. 2016).

        Raises:
            ValueError: unknown network, weights or stage, or a file that does not fit, naming the keys; or stages to
                recompute under the policy `batch`, whose averages would move twice.
        """
        super().__init__()
        if unknown := set(stages) - {1, 2, 3, 4}:
            raise ValueError(f"stages are 1, 2, 3 and 4, got {', '.join(map(str, sorted(unknown)))}")
        resnet = build_resnet(name, weights)
        self.channels: int = resnet.fc.in_features
        self.recompute = frozenset(recompute)
        if self.recompute and statistics == "batch":
            raise ValueError("stages cannot be recomputed under the policy batch: its averages would move twice")
        self.network = nn.ModuleDict({part: resnet.get_submodule(part) for part in ("conv1", "bn1", "maxpool")})
        for layer in ("layer1", "layer2", "layer3", "layer4"):
            blocks = resnet.get_submodule(layer).named_children()
            self.network[layer] = nn.ModuleList(ModulatedBlock(f"{layer}.{place}", block) for place, block in blocks)
        self.layers: list[ConditionedNorm] = []
        for place, module in list(resnet.named_modules()):
            if isinstance(module, nn.Conv2d):
                made = Convolution.from_conv(module)
            elif isinstance(module, nn.BatchNorm2d):
                stage, channels = stage_of(place), module.num_features
                conditioned = stem if stage == 0 else stage in stages and (shortcuts or "downsample" not in place)
                if conditioned:
                    self.layers.append(ConditionedNorm(place, stage, channels))
                if conditioned and normaliser != "batch":
                    made = ModulatedGroupNorm.from_batch_norm(module, groups_of(normaliser, channels))
                else:
                    made = ModulatedBatchNorm2d.from_batch_norm(module)
            else:
                continue
            made.fused = fused
            self.network.set_submodule(place, made)
        self.requires_grad_(False)
        self.statistics: Statistics = "population"
        for norm in self.batch_norms():
            norm.fixed = True
        self.set_statistics(statistics)
        self.eval()

    def set_statistics(self, policy: Statistics) -> None:
        """Converts to a statistics policy: to `batch` with averages that begin afresh (mean 0, variance 1), to
        `population` with whatever the running statistics are now.
        """
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
        """Every batch norm, conditioned or not."""
        return [module for module in self.modules() if isinstance(module, ModulatedBatchNorm2d)]

    def least_batch(self, image_size: int) -> int:
        """How many samples a batch needs at least where its own statistics normalise: two values a channel."""
        names = (name for name, module in self.network.named_modules() if isinstance(module, ModulatedBatchNorm2d))
        return 2 if image_size <= 32 and any(stage_of(name) == 4 for name in names) else 1  # one position in stage 4

    def forward(
        self, images: Tensor | StageMap, modulation: Modulation | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Normalised images [B, 3, S, S], or what `prefix` made of them → the stage-4 map [B, C, S/32, S/32].

        Without a modulation (and under `population`) this is the pretrained network. With `places`, int64 [B], sample
        i is about image places[i] of [I, 3, S, S]: stages that nothing conditions are then computed once an image.
        """
        begin = images.stage + 1 if isinstance(images, StageMap) else 0
        map_ = images.map if isinstance(images, StageMap) else images
        if places is not None:
            shared = self.unconditioned_stage()
            if shared is not None and begin <= shared:
                map_, begin = self._run(map_, range(begin, shared + 1), {}), shared + 1
            map_ = map_[places]
        return self._run(map_, range(begin, 5), self._deltas(modulation, len(map_)))

    def prefix(self, images: Tensor, stage: int) -> StageMap:
        """Normalised images [B, 3, S, S] → the map after the stem (stage 0) or a stage, without any modulation."""
        return StageMap(stage, self._run(images, range(stage + 1), {}))

    def stage_maps(self, images: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, ...]:
        """As `forward`, with the maps after all of stages 1 to 4: [B, C, S/4, S/4] to [B, C, S/32, S/32]."""
        deltas = self._deltas(modulation, len(images))
        maps = [self._run(images, range(2), deltas)]
        for stage in (2, 3, 4):
            maps.append(self._run(maps[-1], range(stage, stage + 1), deltas))
        return tuple(maps)

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
        """Names and values of all that the map after a stage depends on."""
        return [(name, value) for name, value in self.network.state_dict().items() if stage_of(name) <= stage]

    def unconditioned_stage(self) -> int | None:
        """The last stage (0 is the stem) whose map is the same for all questions on an image: nothing up to it is
        conditioned, and its statistics are not those of a batch; None if not even the stem's is.
        """
        if self.statistics == "batch":
            return None
        last = min((layer.stage for layer in self.layers), default=5) - 1
        return last if last >= 0 else None

    def fixed_stage(self) -> int | None:
        """The last stage (0 is the stem) whose map depends on the image alone, because nothing up to it is conditioned
        or trained and its statistics are the pretrained ones; None if not even the stem's does.
        """
        last = self.unconditioned_stage()
        if last is None:
            return None
        trained = [stage_of(name) for name, value in self.network.named_parameters() if value.requires_grad]
        last = min([last, *(stage - 1 for stage in trained)])
        return last if last >= 0 else None

    def _deltas(self, modulation: Modulation | None, samples: int) -> Deltas:
        """Each norm's part of the modulation of so many samples. Raises ValueError if it has another shape."""
        if modulation is None or (modulation.gamma is None and modulation.beta is None):
            return {}
        widths = [layer.channels for layer in self.layers]
        rows, one_row = (samples, sum(widths)), (1, sum(widths))
        for part in modulation:
            if part is not None and part.shape not in (rows, one_row):
                raise ValueError(f"a modulation must be {list(rows)} or {list(one_row)}, got {list(part.shape)}")
        modulation = Modulation(*(None if part is None else part.expand(rows) for part in modulation))
        norms = [self.norm(layer.name) for layer in self.layers]
        fixed = all(isinstance(norm, ModulatedBatchNorm2d) and not norm.training for norm in norms)
        if fixed and len({norm.eps for norm in norms}) == 1:
            deltas = folded_at_once(norms, modulation)
        else:
            parts = ([None] * len(widths) if part is None else part.split(widths, dim=1) for part in modulation)
            deltas = map(Modulation, *parts)
        return dict(zip((layer.name for layer in self.layers), deltas, strict=True))

    def norm(self, name: str) -> ModulatedBatchNorm2d | ModulatedGroupNorm:
        """A norm by its name in torchvision's network."""
        return self.network.get_submodule(name)

    def trainable(self, what: str) -> list[nn.Parameter]:
        """Parameters that a recipe may train besides the modulation.

        Args:
            what: `none`, `stage4` (all weights of stage 4) or `batchnorm` (every γ and β).
        """
        if what == "none":
            return []
        if what == "stage4":
            return list(self.network.layer4.parameters())
        if what == "batchnorm":
            kinds = (ModulatedBatchNorm2d, ModulatedGroupNorm)
            norms = (module for module in self.network.modules() if isinstance(module, kinds))
            return [parameter for norm in norms for parameter in norm.parameters()]
        raise ValueError(f"backbone.train must be none, stage4 or batchnorm, not {what!r}")

    def train(self, mode: bool = True) -> "ModulatedResNet":
        """Sets the mode of everything; under the policy `population` the batch norms stay in evaluation mode."""
        super().train(mode)
        for norm in self.batch_norms():
            norm.train(mode and self.statistics == "batch")
        return self

    @contextmanager
    def estimating_statistics(self) -> Iterator[None]:
        """Within it the batch norms normalise with each batch's statistics; at the end their running statistics become
        those of all values of all batches that went through (AdaBN, Li et al. 2016). Ended by an exception, it leaves
        them as they were.

        Raises:
            ValueError: no batch went through.
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
            raise ValueError("statistics need at least one batch")
        for norm, pool in zip(norms, pools, strict=True):
            norm.take_statistics(pool)
