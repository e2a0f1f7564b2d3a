"""The fast ways through the modulated ResNet equal the plain one, and keep less for the backward pass."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.resnets import pair, random_modulation
from tests.saved import saved_bytes
from vqa.norms import ModulatedBatchNorm2d, Modulation
from vqa.resnet import ModulatedResNet, StageMap


def loss_gradients(net, x, modulation, places=None):
    """Of deltas and of a map in the place of the images."""
    parts = [part for part in (*modulation, x.map if isinstance(x, StageMap) else x) if part.requires_grad]
    return torch.autograd.grad(net(x, modulation, places).square().sum(), parts)


def equal_to_rounding(one, other):
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())


def in_float64(name, **options):
    """A network and deltas that require gradients."""
    torch.manual_seed(1)
    net = pair(name, **options)[1].double()
    return net, Modulation(*(part.double().requires_grad_() for part in random_modulation(net, 3)))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet10", torch.contiguous_format),
        ("resnet10", torch.channels_last),
        ("resnet50", torch.channels_last),
        ("resnext50_32x4d", torch.contiguous_format),
    ],
)
def test_the_fused_network_has_the_gradients_of_the_composed_one(name, layout):
    fused, modulation = in_float64(name)
    composed, _ = in_float64(name, fused=False)
    stem = fused.prefix(torch.randn(3, 3, 64, 64).double(), 0).map.contiguous(memory_format=layout)
    found, expected = (loss_gradients(net, StageMap(0, stem.requires_grad_()), modulation) for net in (fused, composed))
    equal_to_rounding(found, expected)


@pytest.mark.parametrize("options", [{}, {"recompute": (2, 3)}, {"statistics": "batch"}])
def test_the_fused_network_has_the_second_derivatives_of_the_composed_one(options):
    x = torch.randn(2, 3, 32, 32).double().requires_grad_()
    penalties = []
    for fused in (True, "eager", False):
        torch.manual_seed(1)
        net = pair("resnet10", fused=fused, **options)[1].double().train()
        parts = [part.double().requires_grad_() for part in random_modulation(net, 2)]
        (gradient,) = torch.autograd.grad(net(x, Modulation(*parts)).square().sum(), x, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), (x, *parts)))
    equal_to_rounding(penalties[0], penalties[2])
    equal_to_rounding(penalties[1], penalties[2])


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, operation, kinds, arguments=(), options=None):
        self.count[operation.overloadpacket.__name__] += 1
        return operation(*arguments, **(options or {}))


class OnItsOwn(ModulatedBatchNorm2d):
    """A kind of norm that may compute its scale and shift in another way."""


@pytest.mark.parametrize("options", [{}, {"shortcuts": True, "stages": (2, 4)}])
def test_scales_and_shifts_of_all_norms_are_computed_at_once_and_equal_those_norm_by_norm(options):
    found = []
    for kind in (ModulatedBatchNorm2d, OnItsOwn):
        torch.manual_seed(1)
        net = pair("resnet10", **options)[1]
        net.norm(net.layers[0].name).__class__ = kind
        parameters = [part.requires_grad_() for part in net.trainable("batchnorm")]
        modulation = moving(net, 3)
        with Operations() as operations:
            y = net(torch.randn(3, 3, 64, 64), modulation)
        found.append((y, torch.autograd.grad(y.square().sum(), (*modulation, *parameters)), operations.count["rsqrt"]))
    (together, gradients, once), (apart, expected, often) = found
    assert torch.equal(together, apart)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())
    assert often - once == len(net.layers) - 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"shortcuts": True, "stem": True}),
        ("resnet18", {"normaliser": "group"}),
        ("resnet18", {"stages": (2, 4)}),
        ("resnet10", {"statistics": "batch"}),
    ],
)
def test_the_fused_network_with_other_norms_and_statistics(name, options):
    fused, modulation = in_float64(name, **options)
    composed, _ = in_float64(name, fused=False, **options)
    x = torch.randn(3, 3, 64, 64).double()
    equal_to_rounding(*(loss_gradients(net.train(), x, modulation) for net in (fused, composed)))
    state = composed.state_dict()
    assert all(torch.allclose(value, state[name]) for name, value in fused.state_dict().items())


@pytest.mark.parametrize("options", [{"stages": (3, 4)}, {"stages": (4,)}, {"stages": (1,)}, {"stem": True}])
def test_questions_share_what_nothing_conditions(options):
    net, modulation = in_float64("resnet10", **options)
    images, places = torch.randn(2, 3, 64, 64).double(), torch.tensor([1, 0, 1])
    seen = []
    net.network.conv1.register_forward_hook(lambda *call: seen.append(len(call[-1])))
    shared = loss_gradients(net, images, modulation, places)
    assert seen == ([3] if options.get("stem") else [2])
    equal_to_rounding(shared, loss_gradients(net, images[places], modulation))
    if not options.get("stem"):
        equal_to_rounding(shared, loss_gradients(net, net.prefix(images, 0), modulation, places))


@pytest.mark.parametrize("options", [{}, {"statistics": "batch"}, {"normaliser": "group"}, {"recompute": (2,)}])
@pytest.mark.parametrize("training", [False, True])
def test_one_row_of_deltas_stands_for_all_images(options, training):
    net = pair("resnet10", **options)[1].train(training)
    x, row = torch.randn(3, 3, 64, 64), random_modulation(net, 1)
    repeated = Modulation(*(part.expand(3, -1) for part in row))
    torch.testing.assert_close(net(x, row), net(x, repeated))
    torch.testing.assert_close(net(x, Modulation(row.gamma, repeated.beta)), net(x, repeated))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=r"must be \[3, \d+\] or \[1, \d+\], got \[2, "):
        net(x, random_modulation(net, 2))
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())


def test_every_norm_has_its_own_epsilon():
    net = pair("resnet10")[1]
    x, modulation = torch.randn(2, 3, 64, 64), random_modulation(net, 2)
    with_one = net(x, modulation)
    net.norm("layer4.0.bn1").eps = 1.0
    changed = net(x, modulation)
    assert not torch.allclose(changed, with_one)
    norm = net.norm("layer4.0.bn1")
    norm.running_var += 1 - 1e-5  # the same sum under the root
    norm.eps = 1e-5
    torch.testing.assert_close(net(x, modulation), changed)


def test_modulated_norms_take_the_batchs_statistics_where_the_policy_says_so():
    net = pair("resnet10", statistics="batch")[1].train()
    x, modulation = torch.randn(4, 3, 64, 64), random_modulation(net, 4)
    before = net(x, modulation)
    for norm in net.batch_norms():
        norm.running_mean.fill_(5.0)
        norm.running_var.fill_(9.0)
    torch.testing.assert_close(net(x, modulation), before)


def test_batch_statistics_are_those_of_all_questions():
    net = pair("resnet10", statistics="batch")[1].train()
    other = pair("resnet10", statistics="batch")[1].train()
    images, places = torch.randn(2, 3, 64, 64), torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(net(images, None, places), other(images[places]))


@pytest.mark.parametrize("recompute", [(1, 2, 3, 4), (2,), (4,)])
def test_recomputed_stages_change_nothing_and_keep_less(recompute):
    net, modulation = in_float64("resnet10")
    lean, _ = in_float64("resnet10", recompute=recompute)
    x = torch.randn(3, 3, 64, 64).double()
    equal_to_rounding(*(loss_gradients(one, x, modulation) for one in (lean, net)))
    less, more = (saved_bytes(lambda one=one: one(x, modulation))[0] for one in (lean, net))
    assert less < more


def test_a_modulated_resnet50_keeps_half_of_what_is_usual():
    """Fused, against an affine-free norm and γ · x + β as torch's own operations."""
    net = ModulatedResNet("resnet50")
    kept, _ = saved_bytes(lambda: net(torch.randn(2, 3, 64, 64), moving(net, 2)), net.parameters())
    for name, module in list(net.network.named_modules()):
        if isinstance(module, ModulatedBatchNorm2d):
            net.network.set_submodule(name, Usual(module))
        module.fused = False
    usually, _ = saved_bytes(lambda: net(torch.randn(2, 3, 64, 64), moving(net, 2)), net.parameters())
    assert kept <= 0.55 * usually


def moving(net, samples):
    return Modulation(*(part.requires_grad_() for part in random_modulation(net, samples)))


class Usual(nn.Module):
    """How most code writes it."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, x, delta=None, residual=None, relu=False):
        norm = self.norm
        y = nn.functional.batch_norm(x, norm.running_mean, norm.running_var)
        gamma, beta = (norm.weight, norm.bias) if delta is None else (norm.weight + delta.gamma, norm.bias + delta.beta)
        shape = (-1, y.shape[1], 1, 1)
        y = gamma.view(shape) * y + beta.view(shape)
        y = y if residual is None else y + residual
        return torch.relu(y) if relu else y
