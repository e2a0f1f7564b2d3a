"""The conditional layers in other people's networks: made of their norms, synchronised, given maps of other shapes."""

import copy
import inspect
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tests.conftest import ROOT
from vqa.cbn import (
    CategoricalConditionalBatchNorm2d,
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    ConditionalGroupNorm,
    ConditionalInstanceNorm2d,
    ConditionalLayerNorm2d,
    Modulation,
)
from vqa.norms import ModulatedBatchNorm2d, ModulatedGroupNorm

C = 6
CONDITION = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
LAYERS = {  # the class, what its constructor takes after the channels, and what its forward takes after the map
    ConditionalBatchNorm2d: ((4, 5), CONDITION),
    ConditionalInstanceNorm2d: ((4, 5), CONDITION),
    ConditionalLayerNorm2d: ((4, 5), CONDITION),
    ConditionalGroupNorm: ((3, 4, 5), CONDITION),
    CategoricalConditionalBatchNorm2d: ((3,), torch.tensor([2, 0])),
}


def pretrained(**made):
    norm = nn.BatchNorm2d(C, eps=1e-3, momentum=0.2, **made)
    for value in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(value)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    norm.weight.requires_grad_(False)
    return norm


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_takes_the_place_of_a_pretrained_norm(kind, training):
    plain = pretrained(dtype=torch.float64).train(training)
    sizes, condition = LAYERS[kind]
    layer = kind.from_batch_norm(plain, *sizes)
    assert type(layer) is kind
    assert (layer.eps, layer.training) == (1e-3, training)
    assert {value.dtype for value in layer.parameters()} == {torch.float64}
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (False, True)
    for name, value in plain.state_dict().items():
        ours = getattr(layer, name, None)
        if kind is CategoricalConditionalBatchNorm2d and name in ("weight", "bias"):
            assert torch.equal(ours, value.expand(3, C)), name
        elif name in ("weight", "bias") or issubclass(kind, ModulatedBatchNorm2d):
            assert ours.data_ptr() == value.data_ptr(), name
    if issubclass(kind, ModulatedBatchNorm2d):
        assert layer.momentum == 0.2
        for part in ("delta_gamma", "delta_beta"):
            if hasattr(layer, part):
                nn.init.zeros_(getattr(layer, part)[2].weight)
        x = torch.randn(2, C, 3, 3).double()
        condition = condition.double() if condition.is_floating_point() else condition
        torch.testing.assert_close(layer(x, condition), nn.BatchNorm2d.forward(plain, x))


def test_a_layer_is_made_on_the_norms_device_by_names_of_sizes_and_of_a_conditional_norm():
    layer = ConditionalBatchNorm2d.from_batch_norm(pretrained().to("meta"), condition_size=4, hidden_size=5)
    assert {value.device.type for value in (*layer.parameters(), *layer.buffers())} == {"meta"}
    first = ConditionalBatchNorm2d.from_batch_norm(pretrained(), 4, 5)
    second = ConditionalBatchNorm2d.from_batch_norm(first, 7, 5)
    assert second.weight is first.weight
    assert second(torch.randn(2, C, 3, 3), torch.randn(2, 7)).shape == (2, C, 3, 3)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_norm_without_gamma_and_beta_cannot_be_taken_over(kind):
    with pytest.raises(ValueError, match="needs γ and β"):
        kind.from_batch_norm(nn.BatchNorm2d(C, affine=False), *LAYERS[kind][0])


class Net(nn.Module):
    """A network that conditions a layer of its own."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.layer = nn.Sequential(nn.Conv2d(3, C, 3), nn.BatchNorm2d(C)), layer

    def forward(self, x, condition):
        return self.layer(self.first(x), condition)


@pytest.mark.parametrize("kind", [ConditionalBatchNorm2d, CategoricalConditionalBatchNorm2d])
def test_conversion_to_synchronised_norms_keeps_the_conditioning(kind):
    sizes, condition = LAYERS[kind]
    net = Net(kind(C, *sizes)).eval()
    x = torch.randn(2, 3, 6, 6)
    expected, layer = net(x, condition), net.layer
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert converted.layer is layer
    assert layer.synchronised
    assert type(converted.first[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(converted(x, condition), expected)
    assert kind.from_batch_norm(converted.first[1], *sizes).synchronised
    with pytest.raises(ValueError, match="over all processes, not over a process group"):
        nn.SyncBatchNorm.convert_sync_batchnorm(Net(kind(C, *sizes)), process_group=object())


def test_the_module_can_be_loaded_again():
    code = "import importlib, torch, vqa.norms; importlib.reload(vqa.norms); importlib.reload(vqa.norms)\n"
    code += "norm = torch.nn.SyncBatchNorm.convert_sync_batchnorm(torch.nn.BatchNorm2d(3))\n"
    code += "assert type(norm) is torch.nn.SyncBatchNorm"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("shape", [(2, C, 4, 4, 4), (2, C, 4), (2, C), (2, 1, 4, 4), (C, 4, 4)])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_a_map_of_another_shape_is_refused_and_moves_nothing(kind, training, shape):
    sizes, condition = LAYERS[kind]
    layer = kind.from_batch_norm(pretrained(), *sizes).train(training)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match=r"a map must be \[B, C, H, W\] with C = 6, got \["):
        layer(torch.randn(shape), condition)
    assert all(torch.equal(before[name], value) for name, value in layer.state_dict().items())


@pytest.mark.parametrize("norm", [ModulatedBatchNorm2d(C), ModulatedGroupNorm(3, C)])
def test_a_modulated_norm_refuses_a_map_of_another_shape(norm):
    with pytest.raises(ValueError, match="a map must be"):
        norm(torch.randn(2, C, 4, 4, 4), Modulation(torch.zeros(2, C), None))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_made_on_a_device_and_of_a_type(kind):
    sizes, _ = LAYERS[kind]
    first = (sizes[0], C, *sizes[1:]) if kind is ConditionalGroupNorm else (C, *sizes)
    layer = kind(*first, device="meta", dtype=torch.float64)
    floating = [value for value in (*layer.parameters(), *layer.buffers()) if value.is_floating_point()]
    assert {(value.device.type, value.dtype) for value in floating} == {("meta", torch.float64)}


@pytest.mark.parametrize("kind", [ConditionalBatchNorm2d, ConditionalInstanceNorm2d])
@pytest.mark.parametrize("predicted", ["gamma", "beta"])
def test_a_layer_predicts_gamma_or_beta_alone(kind, predicted):
    other = {"gamma": "beta", "beta": "gamma"}[predicted]
    layer = kind.from_batch_norm(pretrained(), 4, 5, **{other: False}).eval()
    assert {name.split(".")[0] for name, _ in layer.named_children()} == {f"delta_{predicted}"}
    x, condition = torch.randn(2, C, 3, 3), torch.randn(2, 4)
    modulated = ModulatedBatchNorm2d if kind is ConditionalBatchNorm2d else ModulatedGroupNorm
    delta = Modulation(**{predicted: getattr(layer, f"delta_{predicted}")(condition), other: None})
    torch.testing.assert_close(layer(x, condition), modulated.forward(layer, x, delta))


def test_a_layer_that_predicts_nothing_is_refused():
    with pytest.raises(ValueError, match="γ, β or both"):
        ConditionalBatchNorm2d(C, 4, 5, gamma=False, beta=False)


@pytest.mark.parametrize(
    ("kind", "theirs", "shape"),
    [
        (ConditionalBatchNorm1d, nn.BatchNorm1d, (4, C)),
        (ConditionalBatchNorm1d, nn.BatchNorm1d, (4, C, 5)),
        (ConditionalBatchNorm3d, nn.BatchNorm3d, (4, C, 2, 3, 2)),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_one_and_three_dimensions(kind, theirs, shape, training):
    plain = theirs(C).double().train(training)
    nn.init.uniform_(plain.running_var, 0.3, 3.0)
    layer = kind.from_batch_norm(copy.deepcopy(plain), 4, 5)
    x, condition = torch.randn(shape).double(), torch.randn(4, 4).double()
    gamma, beta = (part.view(4, C, *[1] * (x.ndim - 2)) for part in layer.deltas(condition))
    torch.testing.assert_close(layer(x, condition), (1 + gamma) * plain(x) + beta)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    with pytest.raises(ValueError, match="x must have .* dimensions and C = 6"):
        layer(torch.randn(4, C, 2, 2), condition)


@pytest.mark.filterwarnings("ignore:var_mean")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (ConditionalGroupNorm(3, C, 4, 5), (0, C, 3, 3)),
        (ConditionalLayerNorm2d(C, 4, 5), (0, C, 3, 3)),
        (ConditionalBatchNorm1d(C, 4, 5), (0, C)),
        (ConditionalBatchNorm1d(C, 4, 5), (0, C, 7)),
        (ConditionalBatchNorm3d(C, 4, 5), (0, C, 2, 2, 2)),
    ],
)
def test_an_empty_batch_has_an_empty_result(layer, shape):
    assert layer.eval()(torch.randn(shape), torch.randn(0, 4)).shape == shape


def test_a_layers_signature_has_the_options_of_torchs_norms():
    for ours, theirs in ((ConditionalBatchNorm2d, nn.BatchNorm2d), (CategoricalConditionalBatchNorm2d, nn.BatchNorm2d)):
        named = [inspect.signature(kind).parameters for kind in (ours, theirs)]
        for option in ("eps", "momentum"):
            assert named[0][option].default == named[1][option].default
    assert inspect.signature(ConditionalGroupNorm).parameters["eps"].default == nn.GroupNorm(1, 1).eps


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_in_a_network_of_a_coarser_type_a_norm_is_as_exact_as_torchs(kind):
    plain = pretrained(dtype=kind).eval()
    layer = ModulatedBatchNorm2d.from_batch_norm(plain)
    x = (plain.running_mean[:, None, None] + torch.randn(8, C, 7, 7)).to(kind)
    exact = copy.deepcopy(plain).float()(x.float())
    ours, theirs = ((y.float() - exact).abs().mean() for y in (layer(x, Modulation(x.new_zeros(8, C), None)), plain(x)))
    assert ours < 1.2 * theirs


@pytest.mark.parametrize("kind", LAYERS)
def test_statistics_of_large_values_in_half_precision(kind):
    sizes, given = LAYERS[kind]
    layer = kind(C, *sizes) if kind is not ConditionalGroupNorm else kind(sizes[0], C, *sizes[1:])
    x = (1000 * torch.randn(2, C, 14, 14)).half()  # their variance is beyond half precision
    expected = layer(x.float(), given)
    layer = layer.half()
    found = layer(x, given.half() if given.is_floating_point() else given)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_no_batch_norm_or_pruned_cannot_be_taken_over(kind):
    sizes = LAYERS[kind][0]
    for norm in (nn.InstanceNorm2d(C, affine=True, track_running_stats=True), nn.LayerNorm(C)):
        with pytest.raises(ValueError, match=f"from a batch norm, not from {type(norm).__name__}"):
            kind.from_batch_norm(norm, *sizes)
    pruned = nn.BatchNorm2d(C)
    prune.l1_unstructured(pruned, "weight", 0.5)
    with pytest.raises(ValueError, match="γ and β must be parameters"):
        kind.from_batch_norm(pruned, *sizes)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit")  # shapes are checked, jit is old
def test_a_layer_is_exported_and_traced_for_batches_of_any_size():
    layer, batch = ConditionalBatchNorm2d(C, 4, 5).eval(), torch.export.Dim("batch")
    arguments, shapes = (torch.randn(2, C, 3, 3), CONDITION), {"x": {0: batch}, "condition": {0: batch}}
    exported = torch.export.export(layer, arguments, dynamic_shapes=shapes).module()
    traced = torch.jit.trace(layer, arguments)
    x, condition = torch.randn(5, C, 3, 3), torch.randn(5, 4)
    for made in (exported, traced):
        torch.testing.assert_close(made(x, condition), layer(x, condition))


def test_gradients_of_each_sample_by_torch_func():
    net = Net(ConditionalBatchNorm2d(C, 4, 5)).eval()
    x, condition = torch.randn(3, 3, 5, 5), torch.randn(3, 4)

    def loss(parameters, x, condition):
        return torch.func.functional_call(net, parameters, (x[None], condition[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(dict(net.named_parameters()), x, condition)
    for sample in range(3):
        net.zero_grad()
        net(x[sample : sample + 1], condition[sample : sample + 1]).square().sum().backward()
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(each[name][sample], parameter.grad, rtol=1e-4, atol=1e-4)
