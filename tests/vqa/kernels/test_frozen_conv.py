"""Convolutions with frozen weights equal torch's, save no input, and notice when a weight changes."""

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tests.saved import saved_bytes
from vqa.kernels import frozen_conv
from vqa.kernels.frozen_conv import Convolution

CL, NCHW = torch.channels_last, torch.contiguous_format


@pytest.mark.parametrize("layout", [NCHW, CL])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 2}, {"dilation": 2, "padding": 2}])
def test_a_frozen_convolution_is_nn_conv2d_and_saves_its_weight_alone(geometry, layout):
    plain = nn.Conv2d(4, 6, 3, bias=False, **geometry).double().requires_grad_(False)
    ours = Convolution.from_conv(plain)
    assert ours.weight is plain.weight
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    saved, y = saved_bytes(lambda: ours(x))
    torch.testing.assert_close(y, plain(x))
    assert saved == plain.weight.untyped_storage().nbytes()
    weights = torch.randn_like(y)
    found, expected = (torch.autograd.grad((conv(x) * weights).sum(), x)[0] for conv in (ours, plain))
    torch.testing.assert_close(found, expected)
    ours.weight.requires_grad_(True)
    assert saved_bytes(lambda: ours(x))[0] > saved
    of_weight = torch.autograd.grad((ours(x) * weights).sum(), ours.weight)[0]
    torch.testing.assert_close(
        of_weight, torch.autograd.grad((F.conv2d(x, ours.weight, **geometry) * weights).sum(), ours.weight)[0]
    )


@pytest.mark.parametrize("layout", [NCHW, CL])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"groups": 2}])
def test_second_derivatives_of_a_frozen_convolution(geometry, layout):
    ours = Convolution.from_conv(nn.Conv2d(4, 6, 3, bias=False, **geometry).requires_grad_(False))
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout).requires_grad_()
    seconds = []
    for convolved in (ours, lambda x: F.conv2d(x, ours.weight, **geometry)):
        (first,) = torch.autograd.grad(convolved(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), x)[0])
    torch.testing.assert_close(*seconds, rtol=1e-4, atol=1e-4)
    assert torch.autograd.gradgradcheck(ours.double(), (x.double().detach().requires_grad_(),))


@pytest.mark.parametrize("layout", [NCHW, CL])
@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}])
def test_gradients_of_several_gradients_at_once_and_by_torch_func(geometry, layout):
    ours = Convolution.from_conv(nn.Conv2d(4, 6, 3, bias=False, **geometry).requires_grad_(False))
    x = torch.randn(2, 4, 5, 5).contiguous(memory_format=layout).requires_grad_()
    y = ours(x)
    several = torch.randn(3, *y.shape)
    (together,) = torch.autograd.grad(y, x, several, is_grads_batched=True, retain_graph=True)
    (mapped,) = torch.vmap(torch.func.vjp(ours, x.detach())[1])(several)
    for place, gradient in enumerate(several):
        (expected,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
        torch.testing.assert_close(together[place], expected)
        torch.testing.assert_close(mapped[place], expected)


@pytest.mark.parametrize("layout", [NCHW, CL])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode_differentiation_and_counts_of_operations(layout, requires_grad):
    plain = nn.Conv2d(4, 6, 3, bias=False).requires_grad_(False)
    ours = Convolution.from_conv(plain)
    x = torch.randn(2, 4, 9, 9).contiguous(memory_format=layout).requires_grad_(requires_grad)
    ours(x)  # a copy in oneDNN's order is kept
    tangent = torch.randn_like(x)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, tangent))).tangent
    torch.testing.assert_close(found, plain(tangent))
    counts = []
    for conv in (ours, plain):
        with FlopCounterMode(display=False) as counted:
            conv(x)
        counts.append(counted.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.fixture
def ordering(monkeypatch):
    """Counts how often a weight is ordered for oneDNN; what is tested with it is not tested without oneDNN."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN: weights in its order are not tested")
    assert frozen_conv._has_operators()
    made, order = [], frozen_conv._ordered
    monkeypatch.setattr(frozen_conv, "_ordered", lambda *given: made.append(1) or order(*given))
    return made


GEOMETRIES = [
    {"kernel_size": 1},
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "padding": 1, "stride": 2},
    {"kernel_size": 3},
    {"kernel_size": 3, "padding": 3},
    {"kernel_size": 3, "padding": 2, "dilation": 2},
    {"kernel_size": 3, "padding": 1, "groups": 2},
    {"kernel_size": (1, 3), "padding": (0, 1)},
]


def frozen(**geometry):
    return nn.Conv2d(8, 16, bias=False, **geometry).requires_grad_(False)


def assert_convolves(ours, x):
    """As torch does: the result, and the gradient of the map."""
    expected = F.conv2d(x, ours.weight, padding=1)
    torch.testing.assert_close(ours(x), expected)
    weights = torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours(x), expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_a_weight_that_is_ordered_once_convolves_all_the_same(geometry, ordering):
    plain = frozen(**geometry)
    ours = Convolution.from_conv(plain)
    with torch.inference_mode():  # what is made there is used in training, too
        ours(torch.randn(2, 8, 9, 9).to(memory_format=CL))
    for size in (9, 9, 6):
        x = torch.randn(3, 8, size, size).to(memory_format=CL).requires_grad_()
        saved, y = saved_bytes(lambda x=x: ours(x))
        assert saved == plain.weight.untyped_storage().nbytes()
        assert y.is_contiguous(memory_format=CL)
        expected = plain(x)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        found, wanted = (torch.autograd.grad((of * weights).sum(), x)[0] for of in (y, expected))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), expected)
    turned = geometry.get("stride", 1) == geometry.get("groups", 1) == 1 and geometry.get("padding") != 3
    assert len(ordering) == 1 + turned  # forward, and backward where that is a convolution, too


def test_a_weight_is_ordered_anew_when_it_changes(ordering):
    ours = Convolution.from_conv(frozen(kernel_size=3, padding=1))
    x = torch.randn(2, 8, 5, 5).to(memory_format=CL).requires_grad_()
    assert_convolves(ours, x)
    with torch.no_grad():
        ours.weight.mul_(-2)
    assert_convolves(ours, x)
    with torch.no_grad():
        ours.weight[1].mul_(-2)  # a filter that is not in the sample
    assert_convolves(ours, x)
    ours.load_state_dict({"weight": torch.randn(16, 8, 3, 3)})
    assert_convolves(ours, x)
    for _ in range(3):  # what is freed may be given out again at the same address
        ours.weight = nn.Parameter(torch.randn(16, 8, 3, 3), requires_grad=False)
        assert_convolves(ours, x)
    ours.to(torch.float64).to(torch.float32)
    assert_convolves(ours, x)
    before = len(ordering)
    assert_convolves(ours, x)
    assert len(ordering) == before
    y = ours(x)
    with torch.no_grad():
        ours.weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


UNCOUNTED = {
    "fused optimiser": lambda weight: torch.optim.Adam([weight], lr=0.1, fused=True).step(),
    "data": lambda weight: weight.data.mul_(-2),
    "numpy": lambda weight: weight.detach().numpy().__imul__(-2),
    "shared memory": lambda weight: torch.from_file(weight.file, shared=True, size=weight.numel()).mul_(-2),
}


@pytest.mark.parametrize("how", UNCOUNTED)
@pytest.mark.parametrize("looks", [False, True])
def test_a_change_that_autograd_does_not_count_is_noticed(how, looks, ordering, tmp_path):
    """As when a stage is trained and frozen again; `looks`: a forward pass sees the weight while it is trainable."""
    ours = Convolution.from_conv(frozen(kernel_size=3, padding=1))
    if how == "shared memory":
        file = str(tmp_path / "weight")
        torch.from_file(file, shared=True, size=16 * 8 * 9).copy_(ours.weight.flatten())
        mapped = torch.from_file(file, shared=True, size=16 * 8 * 9).view(16, 8, 3, 3)
        ours.weight = nn.Parameter(mapped, requires_grad=False)
        ours.weight.file = file
    x = torch.randn(2, 8, 5, 5).to(memory_format=CL).requires_grad_()
    torch.autograd.grad(ours(x).sum(), x)
    ours.weight.requires_grad_(True)
    if looks:
        ours(x)
        assert ours._ordered is None
    ours.weight.grad = torch.ones_like(ours.weight)
    UNCOUNTED[how](ours.weight)
    ours.weight.requires_grad_(False)
    assert_convolves(ours, x)
    before = len(ordering)
    ours(x)
    assert len(ordering) == before


@pytest.mark.filterwarnings("ignore:TF32 acceleration")
@pytest.mark.parametrize("why", ["layout", "type", "autocast", "eager", "trained", "switched off", "inference"])
def test_where_a_weight_is_not_ordered(why, ordering):
    ours = Convolution.from_conv(frozen(kernel_size=3, padding=1))
    x = torch.randn(2, 8, 5, 5).to(memory_format=NCHW if why == "layout" else CL)
    if why == "type":
        ours, x = ours.double(), x.double()
    ours.fused = "eager" if why == "eager" else True
    ours.weight.requires_grad_(why == "trained")
    if why == "inference":
        with torch.inference_mode():
            ours.weight = nn.Parameter(ours.weight.clone(), requires_grad=False)
    switched = torch.backends.mkldnn.flags(enabled=False) if why == "switched off" else nullcontext()
    with torch.autocast("cpu", enabled=why == "autocast"), switched:
        y = ours(x)
        torch.testing.assert_close(y, F.conv2d(x, ours.weight, padding=1))
    assert not ordering


def test_a_convolution_with_an_ordered_weight_can_be_copied_and_stored(ordering):
    ours = Convolution.from_conv(frozen(kernel_size=3, padding=1))
    x = torch.randn(2, 8, 5, 5).to(memory_format=CL)
    expected = ours(x)
    assert len(ordering) == 1
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(copied(x), expected)
    assert list(ours.state_dict()) == ["weight"]


OTHER_OPERATORS = {
    "missing": None,
    "other arguments": lambda weight: weight,
    "another result": lambda weight, *_: (2 * weight.to_dense()).to_mkldnn(),
}


@pytest.mark.usefixtures("ordering")
@pytest.mark.parametrize("operator", OTHER_OPERATORS)
def test_a_torch_with_other_private_operators_convolves_all_the_same(operator, monkeypatch):
    monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    if OTHER_OPERATORS[operator] is not None:
        monkeypatch.setattr(torch._C._nn, "mkldnn_reorder_conv2d_weight", OTHER_OPERATORS[operator], raising=False)
    monkeypatch.setattr(frozen_conv, "_has_operators", frozen_conv._has_operators.__wrapped__)
    ours = Convolution.from_conv(frozen(kernel_size=3, padding=1))
    x = torch.randn(2, 8, 5, 5).to(memory_format=CL).requires_grad_()
    assert_convolves(ours, x)
    assert ours._ordered is None
