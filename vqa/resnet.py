"""torchvision's own ResNet, with batch norms that take a modulation as an argument (section 3.1 of the paper).

The network's forward is traced (`torch.fx`), cut after stage 4, and given one more input: the deltas, which the trace
hands to each conditioned norm. So the definition stays torchvision's, and nothing is kept between calls.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from vqa.backbone import build_resnet
from vqa.convolution import Convolution
from vqa.modulate import Fused
from vqa.norms import (
    Folded,
    ModulatedBatchNorm2d,
    ModulatedGroupNorm,
    Modulation,
    Pooled,
    folded_at_once,
    groups_of,
)
from vqa.resnet_graph import conditioned_norms, cut, end_with_stages, hand_deltas_to, join_to_norms, stage_of

Statistics = Literal["population", "batch"]
Normaliser = Literal["batch", "instance", "group", "layer"]

DECAY = 0.99  # of the moving averages of the policy `batch`, as in the authors' code


class StageMap(NamedTuple):
    """The map after a stage, standing for the images it was made from."""

    stage: int  # 0 is the stem
    map: Tensor  # [B, C, H, W]


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
            weights: torchvision's name of the weights, a file (.safetensors or .pth), or None for random ones.
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
        graph = fx.Tracer().trace(resnet)
        self.layers = conditioned_norms(graph, resnet, set(stages), stem, shortcuts)
        end_with_stages(graph)
        join_to_norms(graph, resnet)
        hand_deltas_to(graph, [layer.name for layer in self.layers])
        self.network = fx.GraphModule(resnet, graph)
        self._parts: dict[tuple[int | None, int], fx.GraphModule] = {}  # of the network, whose modules they share
        conditioned = {layer.name for layer in self.layers}
        for place, module in list(self.network.named_modules()):
            if isinstance(module, nn.Conv2d):
                self.network.set_submodule(place, Convolution.from_conv(module))
            elif place in conditioned and normaliser != "batch":
                groups = groups_of(normaliser, module.num_features)
                self.network.set_submodule(place, ModulatedGroupNorm.from_batch_norm(module, groups))
            elif isinstance(module, nn.BatchNorm2d):
                self.network.set_submodule(place, ModulatedBatchNorm2d.from_batch_norm(module))
        for module in self.network.modules():
            if isinstance(module, Convolution | ModulatedBatchNorm2d | ModulatedGroupNorm):
                module.fused = fused
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

    def forward(
        self, images: Tensor | StageMap, modulation: Modulation | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Normalised images [B, 3, S, S], or what `prefix` made of them → the stage-4 map [B, C, S/32, S/32].

        Without a modulation (and under `population`) this is the pretrained network. With `places`, int64 [B], sample
        i is about image places[i] of [I, 3, S, S]: stages that nothing conditions are then computed once an image.
        """
        stage = images.stage if isinstance(images, StageMap) else None
        map_ = images.map if isinstance(images, StageMap) else images
        if places is not None:
            shared = self.unconditioned_stage()
            if shared is not None and (stage is None or stage < shared):
                map_, stage = self._run(map_, stage, shared, None), shared
            map_ = map_[places]
        return self._run(map_, stage, 4, modulation)

    def _run(self, map_: Tensor, first: int | None, last: int, modulation: Modulation | None) -> Tensor:
        """The map after stage `last` from images (`first` None) or the map after stage `first`."""
        deltas = self._deltas(modulation, len(map_))
        if (first, last) == (None, 4) and not self.recompute:
            return self.network(map_, deltas)[-1]
        begin = -1 if first is None else first
        ends = [stage for stage in range(begin + 1, last) if stage in self.recompute or stage + 1 in self.recompute]
        for end in [*ends, last] if begin < last else []:
            part = self._between(None if begin < 0 else begin, end)
            if end in self.recompute and torch.is_grad_enabled():
                map_ = checkpoint(part, map_, deltas, use_reentrant=False)
            else:
                map_ = part(map_, deltas)
            begin = end
        return map_

    def prefix(self, images: Tensor, stage: int) -> StageMap:
        """Normalised images [B, 3, S, S] → the map after the stem (stage 0) or a stage, without any modulation."""
        return StageMap(stage, self._between(None, stage)(images, self._deltas(None, len(images))))

    def fixed_state(self, stage: int) -> list[tuple[str, Tensor]]:
        """Names and values of all that the map after a stage depends on."""
        return [(name, value) for name, value in self.network.state_dict().items() if stage_of(name) <= stage]

    def _between(self, first: int | None, last: int) -> fx.GraphModule:
        """(images, or the map after stage `first`, and deltas) → the map after stage `last`."""
        if (first, last) not in self._parts:
            self._parts[first, last] = fx.GraphModule(self.network, cut(self.network.graph, first, last))
        return self._parts[first, last]

    def compile(self, **options: Any) -> None:
        """As `nn.Module.compile`; the parts that a network may be run in are cut before, which cannot be compiled."""
        shared = self.unconditioned_stage()
        for first in range(4):
            self._between(first, 4)
            if shared is not None and first < shared:
                self._between(first, shared)
        if shared is not None:
            self._between(None, shared)
        super().compile(**options)

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

    def stage_maps(self, images: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, ...]:
        """As `forward`, with the maps after all of stages 1 to 4: [B, C, S/4, S/4] to [B, C, S/32, S/32]."""
        return self.network(images, self._deltas(modulation, len(images)))

    def _deltas(self, modulation: Modulation | None, samples: int) -> Sequence[Modulation | Folded | None]:
        """What each norm takes of the modulation of so many samples. Raises ValueError if its shape is another."""
        if modulation is None or (modulation.gamma is None and modulation.beta is None):
            return (None,) * len(self.layers)
        widths = [layer.channels for layer in self.layers]
        rows, one_row = (samples, sum(widths)), (1, sum(widths))
        for part in modulation:
            if part is not None and part.shape not in (rows, one_row):
                raise ValueError(f"a modulation must be {list(rows)} or {list(one_row)}, got {list(part.shape)}")
        modulation = Modulation(*(None if part is None else part.expand(rows) for part in modulation))
        norms = [self.norm(layer.name) for layer in self.layers]
        fixed = all(isinstance(norm, ModulatedBatchNorm2d) and not norm.training for norm in norms)
        if fixed and len({norm.eps for norm in norms}) == 1:
            return folded_at_once(norms, modulation)
        parts = ([None] * len(widths) if part is None else part.split(widths, dim=1) for part in modulation)
        return tuple(map(Modulation, *parts))

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
        raise ValueError(f"of a ResNet none, stage4 or batchnorm can be trained, not {what!r}")

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
