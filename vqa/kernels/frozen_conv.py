"""A convolution with a frozen weight: its backward pass saves nothing of its input, and a CPU orders its weight once.

The gradient of the input needs the weight alone, ∂x = wᵀ ⋆ ∂y; torch's own convolution saves x all the same. In a
frozen network that is every second map.

On a CPU, oneDNN convolves with weights in an order of its own, which torch makes anew at every step, forward and
backward: with small batches a tenth of a convolution's time. A weight that stays the same is ordered once.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqa.kernels.modulate import Fused


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, by the same names; with a frozen weight (and without a bias) its backward pass needs no input.

    On a CPU a frozen weight is kept in oneDNN's order as well, if this torch can do that. The copy is dropped when
    `forward` meets a trainable weight, and made again when the weight is replaced, is changed by an operation that
    autograd counts, or differs in a sample of its values that is compared at every call. One change is not noticed: a
    change that autograd does not count (through `.data`, a numpy array or another process) and that spares the whole
    sample, as when single filters are pruned in this way. With `fused = "eager"` no copy is kept.
    """

    fused: Fused = True  # False: always torch's own; `eager`: the weight is not kept in oneDNN's order
    _ordered: "_Ordered | None" = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W']."""
        if self.weight.requires_grad:
            self._ordered = None  # a fused optimiser's steps are not counted in `_version`
        as_in_a_resnet = self.bias is None and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not self.fused or self.weight.requires_grad or not as_in_a_resnet:
            return super().forward(x)
        ordered = self._in_order(x) if self.fused is True and _can_order(x, self.weight) else None
        if torch.is_grad_enabled() and x.requires_grad:
            return _OfFrozenWeight.apply(x, self.weight, self._geometry, ordered)
        return super().forward(x) if ordered is None else ordered.convolved(x)

    @property
    def _geometry(self) -> "_Geometry":
        return _Geometry(self.stride, self.padding, self.dilation, self.groups)

    def _in_order(self, x: Tensor) -> "_Ordered":
        if self._ordered is None or not self._ordered.is_of(self.weight):
            self._ordered = _Ordered(self.weight, self._geometry, x.shape)
        return self._ordered

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_ordered"}  # it cannot be copied

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "Convolution":
        """The same convolution, sharing its weight."""
        made = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            device="meta",
        )
        for name, parameter in conv.named_parameters():
            made.register_parameter(name, parameter)
        return made


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _OfFrozenWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry, ordered: "_Ordered | None") -> Tensor:
        ctx.shape, ctx.geometry, ctx.ordered = x.shape, geometry, ordered
        ctx.save_for_backward(weight)
        return torch.conv2d(x, weight, None, *geometry) if ordered is None else ordered.convolved(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        if ctx.ordered is not None and ctx.ordered.has_adjoint and not torch.is_grad_enabled():
            return ctx.ordered.of_input(gradient), None, None, None  # which cannot be differentiated again
        stride, padding, dilation, groups = ctx.geometry
        layout = torch.contiguous_format if gradient.is_contiguous() else torch.channels_last
        of_x, _, _ = torch.ops.aten.convolution_backward(
            gradient,
            # of the input only shape and layout are read: memory that is never touched stands for it
            torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout),
            weight.to(gradient.dtype, memory_format=layout),  # cast as autocast did
            None,
            stride,
            padding,
            dilation,
            False,
            [0, 0],
            groups,
            [True, False, False],
        )
        return of_x, None, None, None


class _Ordered:
    """A weight in oneDNN's order, for channels-last maps of float32.

    The gradient of the input is a convolution, too, where there is no stride: with the weight turned round, ordered as
    well. With a stride it is torch's own.
    """

    def __init__(self, weight: Tensor, geometry: _Geometry, shape: torch.Size) -> None:
        """`shape` is the one of x for which the order is best."""
        self.geometry = geometry
        self._of, self._version = weight.detach(), weight._version  # while it is kept, its address is no other's
        self._sample = _sample(weight).clone()
        self._weight = _ordered(weight, geometry, shape)
        stride, padding, dilation, groups = geometry
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        inner = tuple(r - p for r, p in zip(reach, padding, strict=True))
        self.has_adjoint = groups == 1 and set(stride) == {1} and min(inner) >= 0
        self._adjoint_geometry = geometry._replace(padding=inner)
        self._adjoint: Tensor | None = None

    def is_of(self, weight: Tensor) -> bool:
        """Whether it was made of this weight, and the weight has not changed since (as far as `_sample` tells)."""
        same = self._of.data_ptr() == weight.data_ptr() and self._version == weight._version
        return same and torch.equal(self._sample, _sample(weight))

    def convolved(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W'], both channels-last."""
        return _convolved(x, self._weight, self.geometry)

    def of_input(self, gradient: Tensor) -> Tensor:
        """∂x of ∂y, where `has_adjoint`."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if self._adjoint is None:
            turned = self._of.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self._adjoint = _ordered(turned, self._adjoint_geometry, gradient.shape)
        return _convolved(gradient, self._adjoint, self._adjoint_geometry)


def _sample(weight: Tensor) -> Tensor:
    """A view of up to 8 x 8 of a weight's kernels [C', C, kernel's height and width], evenly spread."""
    outputs, inputs = (-(-size // 8) for size in weight.shape[:2])
    return weight.detach()[::outputs, ::inputs]


def _can_order(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # it orders frozen weights by itself
        and not weight.is_inference()  # these do not say when they change
        and torch.backends.mkldnn.enabled
        and _has_operators()
    )


@cache
def _has_operators() -> bool:
    """Test whether torch's private operators that order a weight and convolve with it exist and are correct."""
    x = torch.arange(16, dtype=torch.float32, device="cpu").view(1, 4, 2, 2).to(memory_format=torch.channels_last)
    geometry = _Geometry((1, 1), (0, 0), (1, 1), 1)
    try:
        return torch.allclose(_convolved(x, _ordered(x, geometry, x.shape), geometry), torch.conv2d(x, x))
    except (AttributeError, RuntimeError, TypeError):  # missing, not built, or with other arguments
        return False


def _ordered(weight: Tensor, geometry: _Geometry, shape: torch.Size) -> Tensor:
    stride, padding, dilation, groups = geometry
    apart = weight.detach().to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(apart, padding, stride, dilation, groups, list(shape))


def _convolved(x: Tensor, ordered: Tensor, geometry: _Geometry) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.ops.mkldnn._convolution_pointwise(x, ordered, None, padding, stride, dilation, groups, "none", [], "")
