"""Small ResNets with non-trivial norms, as torchvision's network and as ours."""

import copy
import functools

import torch
from torch import nn
from torchvision.models import ResNet

from vqa.backbone import build_resnet
from vqa.cbn import Modulation
from vqa.resnet import ModulatedResNet


class NarrowResNet(ResNet):
    """torchvision's with a quarter of the channels after the stem: of a ResNet-10's weights a fifteenth is left.

    Not fewer: with 8 channels oneDNN's gradients of 1 x 1 convolutions crash in two threads (torch 2.15, AVX-512).
    """

    def __init__(self, block, layers, num_classes=1000):
        super().__init__(block, layers, num_classes)
        self.fc = nn.Linear(self.inplanes, num_classes)

    def _make_layer(self, block, planes, *arguments, **named):
        return super()._make_layer(block, planes // 4, *arguments, **named)


def with_statistics(resnet):
    """Gives a random network non-trivial norms, as a pretrained one has."""
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return resnet.eval()


def stage4_map(resnet, x):
    """torchvision's own modules, called by hand."""
    x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(x))))
    return resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))


@functools.lru_cache(maxsize=2)
def pretrained(name):
    torch.manual_seed(0)
    return with_statistics(build_resnet(name))


def pair(name, stages=(1, 2, 3, 4), **where):
    """torchvision's network, and ours with its weights."""
    plain = copy.deepcopy(pretrained(name))
    torch.manual_seed(0)
    net = ModulatedResNet(name, None, stages, **where)
    state = {f"network.{key}": value for key, value in plain.state_dict().items() if not key.startswith("fc.")}
    net.load_state_dict(state, strict="normaliser" not in where)
    return plain, net


def random_modulation(net, batch, size=0.1):
    width = sum(layer.channels for layer in net.layers)
    return Modulation(size * torch.randn(batch, width), size * torch.randn(batch, width))
