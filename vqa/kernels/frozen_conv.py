"""A convolution with a frozen weight: its backward pass saves nothing of its input, and a CPU reorders its weight once.

The gradient of the input needs the weight alone, ∂x = wᵀ ⋆ ∂y, but torch's convolution saves x too. In a frozen network
x is every second map.

On a CPU oneDNN convolves with weights in its own order. torch reorders them at every step, forward and backward,
which takes a tenth of the time of a convolution at small batches. A frozen weight is reordered once.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vqa.kernels.modulate import Fused, is_batched, under_transform


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, with the same names; with a frozen weight (and without a bias) its backward pass needs no input.

    On a CPU a copy of a frozen weight in oneDNN's order is kept, where this torch can make one. The copy is dropped
    when `forward` finds the weight trainable. It is made again when the weight is replaced, is changed by an operation
    that autograd counts, or differs in a sample of its values that is compared at every call. One change goes
    unnoticed: one that autograd does not count (through `.data`, a numpy array or another process) and that spares the
    whole sample, such as pruning a single filter in this way.
    """

    fused: Fused = True  # False: always torch's own convolution; `eager`: no copy of the weight
    _ordered: "_Ordered | None" = None

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W']."""
        if self.weight.requires_grad:
            self._ordered = None  # the steps of a fused optimiser are not counted in `_version`
        as_in_a_resnet = self.bias is None and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not self.fused or self.weight.requires_grad or not as_in_a_resnet or under_transform():
            return super().forward(x)
        geometry = _Geometry(self.stride, self.padding, self.dilation, self.groups)
        ordered = None
        if self.fused is True and _can_order(x, self.weight):
            if self._ordered is None or not self._ordered.is_of(self.weight):
                self._ordered = _Ordered(self.weight, geometry, x.shape)
            ordered = self._ordered
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenConvolution.apply(x, self.weight, geometry, ordered)
        return super().forward(x) if ordered is None else ordered.convolve(x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ordered": None}  # oneDNN's tensors cannot be copied

    @classmethod
    def from_conv(cls, conv: nn.Conv2d) -> "Convolution":
        """Return the same convolution, sharing its parameters."""
        geometry = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
        options = {name: getattr(conv, name) for name in geometry} | {"bias": conv.bias is not None, "device": "meta"}
        made = cls(conv.in_channels, conv.out_channels, **options)
        made.weight, made.bias = conv.weight, conv.bias
        return made


class _Geometry(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _FrozenConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, geometry: _Geometry, ordered: "_Ordered | None") -> Tensor:
        ctx.shape, ctx.geometry, ctx.ordered = x.shape, geometry, ordered
        ctx.save_for_backward(weight)
        return torch.conv2d(x, weight, None, *geometry) if ordered is None else ordered.convolve(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        batched = is_batched(gradient)
        if ctx.ordered is not None and ctx.ordered.has_adjoint and not torch.is_grad_enabled() and not batched:
            return ctx.ordered.convolve_adjoint(gradient), None, None, None  # which cannot be differentiated again
        stride, padding, dilation, groups = ctx.geometry
        layout = torch.contiguous_format if batched or gradient.is_contiguous() else torch.channels_last
        # only the shape and the layout of the input are read: uninitialised memory replaces it
        x = torch.empty(ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=layout)
        weight = weight.to(gradient.dtype, memory_format=layout)  # autocast casts it in the forward pass too
        options = (None, stride, padding, dilation, False, [0, 0], groups, [True, False, False])
        of_x, _, _ = torch.ops.aten.convolution_backward(gradient, x, weight, *options)
        return of_x, None, None, None


class _Ordered:
    """A weight in oneDNN's order, for channels-last maps of float32.

    Without a stride the gradient of the input is a convolution too, with the flipped weight, which is reordered as
    well. With a stride torch's own operation computes it.
    """

    def __init__(self, weight: Tensor, geometry: _Geometry, shape: torch.Size) -> None:
        """`shape` is the shape of x for which the order is chosen."""
        self.geometry = geometry
        self._source, self._version = weight.detach(), weight._version  # holding it keeps its address from being reused
        self._sample = _sample(weight).clone()
        self._weight = _ordered(weight, geometry, shape)
        stride, padding, dilation, groups = geometry
        reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        inner = tuple(r - p for r, p in zip(reach, padding, strict=True))
        self.has_adjoint = groups == 1 and set(stride) == {1} and min(inner) >= 0
        self._adjoint_geometry = geometry._replace(padding=inner)
        self._adjoint: Tensor | None = None

    def is_of(self, weight: Tensor) -> bool:
        """Return whether it was made from this weight, and the sample shows no change since."""
        same = self._source.data_ptr() == weight.data_ptr() and self._version == weight._version
        return same and torch.equal(self._sample, _sample(weight))

    def convolve(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W'], both channels-last."""
        return _convolved(x, self._weight, self.geometry)

    def convolve_adjoint(self, gradient: Tensor) -> Tensor:
        """∂y → ∂x, where `has_adjoint`."""
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        if self._adjoint is None:
            flipped = self._source.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
            self._adjoint = _ordered(flipped, self._adjoint_geometry, gradient.shape)
        return _convolved(gradient, self._adjoint, self._adjoint_geometry)


def _sample(weight: Tensor) -> Tensor:
    """Return a view of up to 8 x 8 of the kernels of a weight [C', C, height, width], evenly spread."""
    outputs, inputs = (-(-size // 8) for size in weight.shape[:2])
    return weight.detach()[::outputs, ::inputs]


def _can_order(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()  # it reorders frozen weights itself
        and not torch._C._len_torch_dispatch_stack()  # modes such as `FlopCounterMode` do not know the operators
        and not weight.is_inference()  # inference tensors do not count their changes
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
