"""torchvision's own ResNet, with batch norms that take a modulation as an argument (section 3.1 of the paper).

The network's forward is traced (`torch.fx`), cut after stage 4, and given one more input: the deltas, which the trace
hands to each conditioned norm. So the definition stays torchvision's, and nothing is kept between calls.
"""

import operator
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple

from torch import Tensor, fx, nn
from torchvision.models.resnet import ResNet

from vqa.backbone import build_resnet
from vqa.norms import ModulatedBatchNorm2d, ModulatedGroupNorm, Modulation, groups_of

Statistics = Literal["population", "batch"]
Normaliser = Literal["batch", "instance", "group", "layer"]

DECAY = 0.99  # of the moving averages of the policy `batch`, as in the authors' code


class ConditionedNorm(NamedTuple):
    """A norm that takes deltas: its name in torchvision's network, its stage (0 is the stem), its channels."""

    name: str
    stage: int
    channels: int


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

        Raises:
            ValueError: unknown network, weights or stage, or a file that does not fit, naming the keys.
        """
        super().__init__()
        if unknown := set(stages) - {1, 2, 3, 4}:
            raise ValueError(f"stages are 1, 2, 3 and 4, got {', '.join(map(str, sorted(unknown)))}")
        resnet = build_resnet(name, weights)
        self.channels: int = resnet.fc.in_features
        graph = _stages_of(resnet)
        self.layers = _conditioned_norms(graph, resnet, set(stages), stem, shortcuts)
        _hand_deltas_to(graph, [layer.name for layer in self.layers])
        self.network = fx.GraphModule(resnet, graph)
        self._parts: dict[tuple, fx.GraphModule] = {}  # of the network, whose modules they share
        conditioned = {layer.name for layer in self.layers}
        for place, norm in list(self.network.named_modules()):
            if not isinstance(norm, nn.BatchNorm2d):
                continue
            replaced: nn.Module = ModulatedBatchNorm2d.from_batch_norm(norm)
            if place in conditioned and normaliser != "batch":
                replaced = ModulatedGroupNorm.from_batch_norm(norm, groups_of(normaliser, norm.num_features))
            self.network.set_submodule(place, replaced)
        self.requires_grad_(False)
        self.statistics: Statistics = "population"
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
            norm.synchronised = policy == "batch"
            if policy == "batch":
                norm.reset_running_stats()
                norm.momentum = 1 - DECAY
        self.train(self.training)

    def batch_norms(self) -> list[ModulatedBatchNorm2d]:
        """Every batch norm, conditioned or not."""
        return [module for module in self.modules() if isinstance(module, ModulatedBatchNorm2d)]

    def forward(self, images: Tensor | StageMap, modulation: Modulation | None = None) -> Tensor:
        """Normalised images [B, 3, S, S], or what `prefix` made of them → the stage-4 map [B, C, S/32, S/32].

        Without a modulation (and under `population`) this is the pretrained network.
        """
        if not isinstance(images, StageMap):
            return self.stage_maps(images, modulation)[-1]
        if images.stage == 4:
            return images.map
        return self._part(_from, images.stage)(images.map, self._deltas(modulation))

    def prefix(self, images: Tensor, stage: int) -> StageMap:
        """Normalised images [B, 3, S, S] → the map after the stem (stage 0) or a stage, without any modulation."""
        return StageMap(stage, self._part(_up_to, stage)(images, self._deltas(None)))

    def fixed_state(self, stage: int) -> list[tuple[str, Tensor]]:
        """Names and values of all that the map after a stage depends on."""
        return [(name, value) for name, value in self.network.state_dict().items() if _stage_of(name) <= stage]

    def _part(self, cut: Callable[[fx.Graph, int], fx.Graph], stage: int) -> fx.GraphModule:
        if (cut, stage) not in self._parts:
            self._parts[cut, stage] = fx.GraphModule(self.network, cut(self.network.graph, stage))
        return self._parts[cut, stage]

    def fixed_stage(self) -> int | None:
        """The last stage (0 is the stem) whose map depends on the image alone, because nothing up to it is conditioned
        or trained and its statistics are the pretrained ones; None if not even the stem's does.
        """
        if self.statistics == "batch":
            return None
        moving = [layer.stage for layer in self.layers]
        moving += [_stage_of(name) for name, value in self.network.named_parameters() if value.requires_grad]
        last = min(moving, default=5) - 1
        return last if last >= 0 else None

    def stage_maps(self, images: Tensor, modulation: Modulation | None = None) -> tuple[Tensor, ...]:
        """As `forward`, with the maps after all of stages 1 to 4: [B, C, S/4, S/4] to [B, C, S/32, S/32]."""
        return self.network(images, self._deltas(modulation))

    def _deltas(self, modulation: Modulation | None) -> tuple[Modulation | None, ...]:
        """The modulation of each norm. Raises ValueError if the modulation is of another width."""
        if modulation is None:
            return (None,) * len(self.layers)
        widths = [layer.channels for layer in self.layers]
        columns = []
        for part in modulation:
            if part is not None and (part.ndim != 2 or part.shape[1] != sum(widths)):
                raise ValueError(f"a modulation must be [B, {sum(widths)}], got {list(part.shape)}")
            columns.append([None] * len(widths) if part is None else part.split(widths, dim=1))
        return tuple(map(Modulation, *columns))

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
        """Within it the batch norms normalise with each batch's statistics, and at the end their running statistics are
        the means over all batches that went through (AdaBN, Li et al. 2016).

        Raises:
            ValueError: no batch went through.
        """
        norms = self.batch_norms()
        momenta = [norm.momentum for norm in norms]
        try:
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean
                norm.train()
            yield
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
            self.train(self.training)
        if any(not norm.num_batches_tracked for norm in norms):
            raise ValueError("statistics need at least one batch")


def _stages_of(resnet: ResNet) -> fx.Graph:
    """torchvision's forward up to stage 4; its output is the last map of each stage."""
    graph = fx.Tracer().trace(resnet)
    ends = {str(node.target).split(".")[0]: node for node in graph.nodes if node.op == "call_module"}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(ends[f"layer{stage}"] for stage in (1, 2, 3, 4)),)
    _without_dead_code(graph)
    return graph


def _stage_of(name: str) -> int:
    """The stage of a part of torchvision's network by its name; 0 is the stem."""
    return int(match[1]) if (match := re.match(r"layer(\d)\.", name)) else 0


def _up_to(graph: fx.Graph, stage: int) -> fx.Graph:
    """(images, deltas) → the map after a stage."""
    part, ends = _copied(graph)
    part.output(ends[stage])
    _without_dead_code(part)
    return part


def _from(graph: fx.Graph, stage: int) -> fx.Graph:
    """(the map after a stage, deltas) → the map after stage 4."""
    part, ends = _copied(graph)
    images = next(node for node in part.nodes if node.op == "placeholder")
    with part.inserting_before(images):
        map_ = part.placeholder("map_")
    ends[stage].replace_all_uses_with(map_)
    part.output(ends[4])
    _without_dead_code(part)
    part.erase_node(images)
    return part


def _copied(graph: fx.Graph) -> tuple[fx.Graph, dict[int, fx.Node]]:
    """A copy without its output, and the last node of each stage."""
    part, copies = fx.Graph(), {}
    part.graph_copy(graph, copies)
    return part, {_stage_of(node.target): copies[node] for node in graph.nodes if node.op == "call_module"}


def _without_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def _conditioned_norms(
    graph: fx.Graph, resnet: ResNet, stages: set[int], stem: bool, shortcuts: bool
) -> list[ConditionedNorm]:
    """The chosen norms in the order in which the network computes them."""
    chosen = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(norm := resnet.get_submodule(node.target), nn.BatchNorm2d):
            continue
        stage = _stage_of(node.target)
        if stem if stage == 0 else stage in stages and (shortcuts or ".downsample." not in node.target):
            chosen.append(ConditionedNorm(node.target, stage, norm.num_features))
    return chosen


def _hand_deltas_to(graph: fx.Graph, names: Sequence[str]) -> None:
    """Adds the input `deltas` to the graph and passes its i-th entry to the i-th of the named norms."""
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        deltas = graph.placeholder("deltas")
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in names:
            with graph.inserting_before(node):
                delta = graph.call_function(operator.getitem, (deltas, names.index(node.target)))
            node.args = (*node.args, delta)
    graph.lint()
