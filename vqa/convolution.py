"""A convolution that saves nothing of its input while its weight is not trained.

The gradient of the input needs the weight alone, ∂x = wᵀ ⋆ ∂y; torch's own convolution saves x all the same. In a
frozen network that is every second map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Convolution(nn.Conv2d):
    """`nn.Conv2d`, by the same names; with a frozen weight (and without a bias) its backward pass needs no input."""

    fused = True  # False: always torch's own

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] → [B, C', H', W']."""
        frozen = torch.is_grad_enabled() and x.requires_grad and not self.weight.requires_grad
        as_in_a_resnet = self.bias is None and self.padding_mode == "zeros" and not isinstance(self.padding, str)
        if not (self.fused and frozen and as_in_a_resnet):
            return super().forward(x)
        return _OfFrozenWeight.apply(x, self.weight, self.stride, self.padding, self.dilation, self.groups)

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


class _OfFrozenWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *geometry: Any) -> Tensor:
        ctx.shape, ctx.geometry = x.shape, geometry
        ctx.save_for_backward(weight)
        return torch.conv2d(x, weight, None, *geometry)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        layout = torch.contiguous_format if gradient.is_contiguous() else torch.channels_last
        of_x, _, _ = torch.ops.aten.convolution_backward(
            gradient,
            _placeholder(gradient, ctx.shape, layout),
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
        return of_x, None, None, None, None, None


def _placeholder(like: Tensor, shape: torch.Size, layout: torch.memory_format) -> Tensor:
    """Stands for the input, of which only shape and layout are looked at.

    On a CPU it is memory that is never touched, as one element expanded would be written out there; elsewhere it is
    that one element.
    """
    if like.device.type == "cpu":
        return torch.empty(shape, dtype=like.dtype, memory_format=layout)
    return like.new_empty(1).expand(shape)
