"""The traced graph of torchvision's ResNet: which norms it has, and what is changed in it so that they take deltas."""

import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

from torch import fx, nn
from torchvision.models.resnet import ResNet


class ConditionedNorm(NamedTuple):
    """A norm that takes deltas: its name in torchvision's network, its stage (0 is the stem), its channels."""

    name: str
    stage: int
    channels: int


def stage_of(name: str) -> int:
    """The stage of a part of torchvision's network by its name; 0 is the stem."""
    return int(match[1]) if (match := re.match(r"layer(\d)\.", name)) else 0


def conditioned_norms(
    graph: fx.Graph, resnet: ResNet, stages: set[int], stem: bool, shortcuts: bool
) -> list[ConditionedNorm]:
    """The chosen norms in the order in which the network computes them."""
    chosen = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(norm := resnet.get_submodule(node.target), nn.BatchNorm2d):
            continue
        stage = stage_of(node.target)
        if stem if stage == 0 else stage in stages and (shortcuts or ".downsample." not in node.target):
            chosen.append(ConditionedNorm(node.target, stage, norm.num_features))
    return chosen


def end_with_stages(graph: fx.Graph) -> None:
    """Cuts torchvision's forward off after stage 4; its output is the last map of each stage."""
    ends = {str(node.target).split(".")[0]: node for node in graph.nodes if node.op == "call_module"}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(ends[f"layer{stage}"] for stage in (1, 2, 3, 4)),)
    _without_dead_code(graph)


def join_to_norms(graph: fx.Graph, resnet: ResNet) -> None:
    """Gives each norm what follows it, the shortcut and the ReLU, as arguments: norm(x, delta, residual, relu)."""

    def is_a(kind: type[nn.Module], node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(resnet.get_submodule(node.target), kind)

    for relu in [node for node in graph.nodes if is_a(nn.ReLU, node)]:
        norm, residual = relu.args[0], None
        if norm.op == "call_function" and norm.target in (operator.add, operator.iadd):
            norm, residual = norm.args
        if not is_a(nn.BatchNorm2d, norm):
            raise ValueError(f"{norm.target} before a ReLU is no batch norm, as it is in torchvision's ResNets")
        with graph.inserting_before(relu):
            joined = graph.call_module(norm.target, (norm.args[0], None, residual, True))
        relu.replace_all_uses_with(joined)
    _without_dead_code(graph)


def hand_deltas_to(graph: fx.Graph, names: Sequence[str]) -> None:
    """Adds the input `deltas` to the graph and passes its i-th entry to the i-th of the named norms."""
    images = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(images):
        deltas = graph.placeholder("deltas")
    for node in list(graph.nodes):
        if node.op == "call_module" and node.target in names:
            with graph.inserting_before(node):
                delta = graph.call_function(operator.getitem, (deltas, names.index(node.target)))
            node.args = (node.args[0], delta, *node.args[2:])
    graph.lint()


def cut(graph: fx.Graph, first: int | None, last: int) -> fx.Graph:
    """(images, or the map after stage `first`, and deltas) → the map after stage `last`."""
    part, copies = fx.Graph(), {}
    part.graph_copy(graph, copies)
    ends = {stage_of(node.target): copies[node] for node in graph.nodes if node.op == "call_module"}
    part.output(ends[last])
    if first is not None:
        images = next(node for node in part.nodes if node.op == "placeholder")
        with part.inserting_before(images):
            map_ = part.placeholder("map_")
        ends[first].replace_all_uses_with(map_)
        _without_dead_code(part)
        part.erase_node(images)
    _without_dead_code(part)
    return part


def _without_dead_code(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
