"""`modulate` equals its formula and its gradients in every layout, type and implementation, and saves the least."""

import itertools
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from tests.saved import saved_bytes
from vqa.kernels import cpu, eager
from vqa.kernels.modulate import modulate

CL, NCHW = torch.channels_last, torch.contiguous_format
CASES = list(itertools.product((NCHW, CL), (False, True), (False, True)))
# of rows shorter and longer than eight, in eights and not, and of more than one block
SHAPES = [(2, 12, 3, 7), (1, 160, 5, 5), (3, 5, 1, 1), (2, 1, 5, 3), (1, 8, 1, 9), (2, 33, 50, 41)]


@pytest.fixture
def kernel():
    """The C++ kernels; what is tested with them is not tested without a compiler."""
    with warnings.catch_warnings(action="ignore"):
        if cpu._library() is None:
            pytest.skip("the C++ kernels cannot be compiled on this machine: they are not tested")
    return cpu


def inputs(shape, layout, residual, kind=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(kind).contiguous(memory_format=layout).requires_grad_()
    finer = kind if kind.itemsize > 4 else torch.float32
    scale, shift = (torch.randn(shape[:2], dtype=finer, requires_grad=True) for _ in "ab")
    other = torch.randn_like(x).requires_grad_() if residual else None
    return x, scale, shift, other


def formula(x, scale, shift, residual, relu):
    """In float64, element by element."""
    x, scale, shift = (part.double() for part in (x, scale, shift))
    y = torch.einsum("bchw,bc->bchw", x, scale) + shift.unsqueeze(-1).unsqueeze(-1)
    y = y if residual is None else y + residual.double()
    return y * (y > 0) if relu else y


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("shape", [(3, 5, 3, 7), (2, 16, 4, 4), (3, 8, 1, 1), (2, 1, 5, 3)])
def test_value_and_gradients_in_float64(shape, layout, residual, relu):
    x, scale, shift, other = inputs(shape, layout, residual)
    y = modulate(x, scale, shift, other, relu=relu)
    torch.testing.assert_close(y, formula(x, scale, shift, other, relu))
    assert y.is_contiguous(memory_format=layout)
    of = (x, scale, shift, other) if residual else (x, scale, shift)
    assert torch.autograd.gradcheck(lambda *parts: modulate(*parts, relu=relu), of)


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 1)])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("layout", "kind"), list(itertools.product((NCHW, CL), (torch.float32, torch.float64))))
def test_gradients_that_are_not_wanted_are_skipped(wanted, relu, layout, kind):
    made = inputs((2, 4, 3, 3), layout, True, kind)
    parts = [part.requires_grad_(bool(wants)) for part, wants in zip(made, wanted, strict=True)]
    asked = [part for part in parts if part.requires_grad]
    found = torch.autograd.grad(modulate(*parts, relu=relu).sin().sum(), asked)
    expected = torch.autograd.grad(formula(*parts, relu).sin().sum(), asked)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 if kind == torch.float32 else 1e-7)


@pytest.mark.parametrize("fused", [True, "eager"])
@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
def test_what_is_saved_may_come_back_in_the_other_layout(layout, residual, relu, fused):
    """As from hooks that move it to other memory, such as `save_on_cpu`."""
    parts = inputs((2, 5, 6, 7), layout, residual, torch.float32)
    asked = [part for part in parts if part is not None]

    def turned(part):
        return part.contiguous(memory_format=CL if layout == NCHW else NCHW) if part.ndim == 4 else part

    found = []
    for pack in (lambda part: part, turned):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda part: part):
            y = modulate(*parts, relu=relu, fused=fused)
        found.append(torch.autograd.grad(y.sin().sum(), asked))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
def test_forward_mode_differentiation(layout, residual, relu):
    parts = inputs((2, 5, 3, 4), layout, residual)
    tangents = [None if part is None else torch.randn_like(part) for part in parts]
    with forward_ad.dual_level():
        pairs = zip(parts, tangents, strict=True)
        dual = [None if part is None else forward_ad.make_dual(part, tangent) for part, tangent in pairs]
        found = forward_ad.unpack_dual(modulate(*dual, relu=relu)).tangent
    given, along = ([part for part in some if part is not None] for some in (parts, tangents))
    _, expected = torch.func.jvp(
        lambda *some: formula(*some[:3], some[3] if residual else None, relu), tuple(given), tuple(along)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("fused", [True, "eager"])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
def test_lower_precision_is_rounded_once(kind, layout, residual, relu, fused):
    parts = inputs((2, 6, 4, 5), layout, residual, kind)
    y = modulate(*parts, relu=relu, fused=fused)
    expected = formula(*parts, relu)
    assert y.dtype == kind
    epsilon = torch.finfo(kind).eps
    torch.testing.assert_close(y.double(), expected, rtol=epsilon, atol=1e-6)
    asked = [part for part in parts if part is not None]
    weights = torch.randn_like(expected).to(kind).double()
    found = torch.autograd.grad((y * weights.to(kind)).sum(), asked)
    for one, other in zip(found, torch.autograd.grad((expected * weights).sum(), asked), strict=True):
        assert one.dtype in (kind, torch.float32)
        torch.testing.assert_close(one.double(), other.double(), rtol=2 * epsilon, atol=20 * epsilon)


def test_it_saves_the_map_once_and_a_bit_an_element():
    x, scale, shift, other = inputs((2, 16, 8, 8), CL, True, torch.float32)
    map_, small = x.numel() * 4, scale.numel() * 4
    assert saved_bytes(lambda: modulate(x, scale, shift, relu=True))[0] == map_ + 2 * small
    assert saved_bytes(lambda: modulate(x, scale, shift, other, relu=True))[0] == map_ + small + x.numel() // 8
    assert saved_bytes(lambda: modulate(x, scale, shift, other))[0] == map_ + small
    fixed = [part.detach() for part in (scale, shift)]
    assert saved_bytes(lambda: modulate(x, *fixed, relu=True))[0] == small + x.numel() // 8
    composed, _ = saved_bytes(lambda: modulate(x, scale, shift, other, relu=True, fused=False))
    assert composed > 1.9 * map_


class Launches(TorchDispatchMode):
    """Counts the operations that compute a tensor: on a GPU each of them is a launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **kwargs or {})
        self.count += isinstance(made, torch.Tensor) and not function.is_view and "empty" not in function.name()
        return made


@pytest.mark.parametrize(
    ("residual", "relu", "forward", "backward"),
    [(False, False, 1, 6), (False, True, 2, 7), (True, False, 2, 6), (True, True, 7, 9)],
)
def test_launches_of_torchs_operations_in_bfloat16(residual, relu, forward, backward):
    parts = inputs((2, 16, 8, 8), CL, residual, torch.bfloat16)
    with Launches() as launches:
        y = modulate(*parts, relu=relu)
    assert launches.count == forward
    asked = [part for part in parts if part is not None]
    with Launches() as launches:
        torch.autograd.grad(y, asked, y.detach())
    assert launches.count == backward


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("fused", [True, "eager", False])
def test_second_derivatives_in_float64(fused, layout, residual, relu):
    of = [part for part in inputs((2, 3, 3, 2), layout, residual) if part is not None]
    assert torch.autograd.gradgradcheck(lambda *parts: modulate(*parts, relu=relu, fused=fused), of)


@pytest.mark.parametrize("wanted", [(1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 1, 1)])
@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("fused", [True, "eager"])
def test_second_derivatives_in_float32_of_parts_in_any_layout(fused, layout, residual, relu, wanted):
    parts = inputs((2, 9, 6, 7), layout, residual, torch.float32)
    asked = [part for part, wants in zip(parts, wanted, strict=True) if part is not None and wants]
    x, scale, shift, other = (
        part if any(part is one for one in asked) or part is None else part.detach() for part in parts
    )
    strided = x[:, :, ::2], scale.T.contiguous().T, shift, other if other is None else other[:, :, ::2]

    def twice(function):
        first = torch.autograd.grad(function(*strided).square().sum(), asked, create_graph=True)
        return [*first, *torch.autograd.grad(sum(part.square().sum() for part in first), asked)]

    found = twice(lambda *parts: modulate(*parts, relu=relu, fused=fused))
    assert_same(found, twice(lambda *parts: formula(*parts, relu)), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("fused", [True, "eager", False])
def test_scale_and_shift_may_be_columns_of_more(fused, layout, residual, relu):
    """As those of one norm are where all are folded at once; [1, C] is the same for all samples."""
    x, _, _, other = inputs((3, 5, 3, 7), layout, residual, torch.float32)
    columns = [torch.randn(rows, 11, requires_grad=True) for rows in (3, 1)]
    parts = [part[:, start : start + 5] for part, start in zip(columns, (2, 6), strict=True)]
    y = modulate(x, *parts, other, relu=relu, fused=fused)
    expected = formula(x, parts[0], parts[1].expand(3, 5), other, relu)
    torch.testing.assert_close(y, expected.float())
    weights = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((of * weights).sum(), (x, *columns)) for of in (y, expected))
    assert_same(found, wanted, rtol=1e-4, atol=1e-4)


def test_wrong_shapes_are_refused():
    x, scale, shift, _ = inputs((2, 4, 3, 3), NCHW, False)
    with pytest.raises(ValueError, match=r"takes a scale and a shift \[B, C\]; got \[2, 4, 3, 3\], \[2, 3\]"):
        modulate(x, scale[:, :3], shift)
    with pytest.raises(ValueError, match="a residual must be"):
        modulate(x, scale, shift, x[:, :2])


def results_of(implementation, shape, kind, layout, residual, relu, wants_scale):
    """The results of an implementation, forward and backward."""
    x, scale, shift, other = (None if p is None else p.detach() for p in inputs(shape, layout, residual, kind))
    keeps_bits = relu and (residual or not wants_scale)
    y, bits = implementation.forward(x, scale, shift, other, relu, keeps_bits)
    saved = (x if wants_scale else None, scale, shift if relu and not keeps_bits else None, bits)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(kind).contiguous(memory_format=layout)
    return y, *implementation.backward(gradient, *saved, relu, (True, wants_scale, True, residual))


def assert_same(found, expected, **close):
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("wants_scale", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_cpus_kernels_equal_torchs_operations(kernel, shape, wants_scale, layout, residual, relu):
    case = (shape, torch.float32, layout, residual, relu, wants_scale)
    found, expected = results_of(kernel, *case), results_of(eager, *case)
    # sums of a thousand positions
    assert_same(found, expected, rtol=1e-4, atol=1e-3)
    assert found[0].stride() == expected[0].stride()


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
def test_the_cpus_kernels_give_the_same_bits_by_one_thread_as_by_two_and_again(kernel, layout, residual, relu):
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            found.append(results_of(kernel, SHAPES[-1], torch.float32, layout, residual, relu, True))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[0], found[1], rtol=0, atol=0)
    assert_same(found[1], found[2], rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
@pytest.mark.parametrize("fused", [True, "eager"])
def test_what_is_not_finite_passes_as_through_torchs_own_operations(fused, layout, residual, relu):
    parts = inputs((2, 9, 3, 3), layout, residual, torch.float32)
    with torch.no_grad():
        for place, value in enumerate((float("nan"), float("inf"), -float("inf"))):
            parts[0][0, place, 0, 1] = value
            if residual:
                parts[3][1, place, 1, 2] = value
    asked, found = [part for part in parts if part is not None], []
    for way in (fused, False):
        y = modulate(*parts, relu=relu, fused=way)
        found.append((y, *torch.autograd.grad(y.sum(), asked)))
    assert found[0][0].isnan().any()
    assert_same(*found, equal_nan=True)


@pytest.mark.parametrize("fused", [True, "eager"])
@pytest.mark.parametrize(("layout", "residual", "relu"), CASES)
def test_gradients_of_several_gradients_at_once(fused, layout, residual, relu):
    parts = inputs((2, 5, 3, 3), layout, residual, torch.float32)
    of, several = [part for part in parts if part is not None], torch.randn(3, 2, 5, 3, 3)
    y = modulate(*parts, relu=relu, fused=fused)
    together = torch.autograd.grad(y, of, several, is_grads_batched=True, retain_graph=True)
    for place, gradient in enumerate(several):
        for found, expected in zip(together, torch.autograd.grad(y, of, gradient, retain_graph=True), strict=True):
            torch.testing.assert_close(found[place], expected)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_an_empty_map_has_an_empty_result(shape):
    x, scale, shift, other = inputs(shape, NCHW, True, torch.float32)
    y = modulate(x, scale, shift, other, relu=True)
    assert y.shape == shape
    of_x, of_scale = torch.autograd.grad(y.sum(), (x, scale))
    assert of_x.shape == shape
    assert not of_scale.any()


def test_float32_on_a_cpu_goes_through_the_kernels_unless_told_otherwise(kernel, monkeypatch):
    x, scale, shift, _ = inputs((2, 4, 3, 3), CL, False, torch.float32)
    called = []
    forward = kernel.forward
    monkeypatch.setattr(kernel, "forward", lambda *parts: called.append(1) or forward(*parts))
    for of, fused, times in ((x, True, 1), (x, "eager", 1), (x, False, 1), (x.double(), True, 1), (x, True, 2)):
        modulate(of, scale, shift, fused=fused)
        assert len(called) == times


@pytest.mark.parametrize(("compiler", "reason"), [("no-such-compiler", "no-such-compiler"), ("false", "non-zero exit")])
def test_without_a_compiler_torchs_operations_do_and_it_is_said_once(monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    cpu._library.cache_clear()
    try:
        parts = inputs((2, 4, 3, 3), CL, True, torch.float32)
        with pytest.warns(UserWarning, match=f"without the C\\+\\+ kernel.*{reason}"):
            y = modulate(*parts, relu=True)
        with warnings.catch_warnings(action="error"):
            assert torch.equal(y, modulate(*parts, relu=True, fused="eager"))
            assert torch.equal(y, modulate(*parts, relu=True))
    finally:
        cpu._library.cache_clear()
