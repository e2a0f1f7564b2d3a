"""torchvision's residual blocks whose norms take deltas, and the form that the layers of a network must have."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from vqa.norms import Affine, Modulation

Deltas = Mapping[str, Modulation | Affine]  # by the names of the conditioned norms

LAYERS = {  # of torchvision's blocks, in the order of the forward pass: saved optimiser states refer to this order
    BasicBlock: ("conv1", "bn1", "conv2", "downsample", "bn2"),
    Bottleneck: ("conv1", "bn1", "conv2", "bn2", "conv3", "downsample", "bn3"),
}

FORM = (  # the layers of a ResNet of torchvision's form, by name; timm's blocks have further ones that may do nothing
    (r"conv\d|downsample\.0", nn.Conv2d),
    (r"bn\d|downsample\.1", nn.BatchNorm2d),
    (r"relu|act\d", nn.ReLU),
    (r"maxpool", nn.MaxPool2d),
    (r"downsample|layer\d", nn.Sequential),
    (r".*", nn.Identity),
)
HEAD = ("avgpool", "global_pool", "fc")  # of torchvision and timm; the network ends before it


STEM = ("conv1", "bn1", "maxpool")
STAGES = ("layer1", "layer2", "layer3", "layer4")


def check_network(network: nn.Module) -> None:
    """Raise ValueError if a network has not the form of torchvision's ResNets, or shared or pruned layers."""
    if missing := [part for part in (*STEM, *STAGES) if not hasattr(network, part)]:
        raise ValueError(f"{type(network).__name__} has no {missing[0]}; it must have the form of a ResNet")
    check_form(part for part in network.named_children() if part[0] not in HEAD)
    check_layers(network)


def with_modulated_blocks(network: nn.Module) -> nn.ModuleDict:
    """Return the stem and the stages of a network, with the same layers and names, whose blocks take deltas. Raises
    ValueError as `ModulatedBlock`.
    """
    made = nn.ModuleDict({part: network.get_submodule(part) for part in STEM})
    for stage in STAGES:
        blocks = network.get_submodule(stage).named_children()
        made[stage] = nn.ModuleList(ModulatedBlock(f"{stage}.{place}", block) for place, block in blocks)
    return made


def check_form(layers: Iterable[tuple[str, nn.Module]], within: str = "") -> None:
    """Raise ValueError if a layer is not of the kind that `FORM` has for its name."""
    for name, layer in layers:
        kind = next(kind for pattern, kind in FORM if re.fullmatch(pattern, name))
        if type(layer) is not kind:
            raise ValueError(f"{within}{name} must be {kind.__name__} of torch, not {type(layer).__name__}")


def check_layers(network: nn.Module) -> None:
    """Raise ValueError if a convolution or a norm stands at two places, or its weight is no parameter, as after
    pruning.
    """
    places: dict[nn.Module, str] = {}
    for name, layer in network.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            if (first := places.setdefault(layer, name)) != name:
                raise ValueError(f"{name} is the same layer as {first}; each must be a layer of its own")
            if not isinstance(layer.weight, nn.Parameter | None):
                raise ValueError(f"{name}: its weight must be a parameter; make pruning or parametrisation permanent")


class ModulatedBlock(nn.Module):
    """A residual block of torchvision, with the same layers and names, whose norms take deltas."""

    def __init__(self, name: str, block: nn.Module) -> None:
        """`name` is the name of the block in torchvision's network.

        Raises:
            ValueError: the block is neither a `BasicBlock` nor a `Bottleneck` of torchvision (or timm), or has other
                layers, naming the block or the layer.
        """
        super().__init__()
        kind, timms = type(block), {made.__name__: made for made in LAYERS}
        if kind.__module__ == "timm.models.resnet":
            kind = timms.get(kind.__name__)
        if kind not in LAYERS:
            raise ValueError(f"{name} must be a BasicBlock or a Bottleneck of torchvision, not {type(block).__name__}")
        check_form(list(block.named_modules())[1:], f"{name}.")
        self.name, self.last_norm = name, LAYERS[kind][-1]
        for layer in LAYERS[kind]:
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
