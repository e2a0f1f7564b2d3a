"""One operation for what follows a convolution in a modulated ResNet, with a backward pass that saves the least.

    y = act(scale · x + shift (+ residual))               one scale and shift a sample and channel; act: ReLU or nothing

Autograd would keep x, the sums and the result. The gradients need less:

    g = ∂y · [y > 0],   ∂residual = g,   ∂x = g · scale,   ∂shift = Σ_hw g,   ∂scale = Σ_hw g · x

x is saved once, and only where the gradient of scale is wanted. Where the ReLU was open is computed again from x, scale
and shift, or stored, a bit an element, where there is a residual or no x.

Legend: B samples, C channels, H and W map size.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from vqa.kernels import cpu as by_cpp
from vqa.kernels import eager as by_torch

Fused = bool | Literal["eager"]


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, *, relu: bool = False, fused: Fused = True
) -> Tensor:
    """y = act(scale · x + shift (+ residual)).

    Args:
        x: map [B, C, H, W] of a floating type, contiguous or channels-last; y has its type and layout.
        scale, shift: [B, C], or [1, C] for all samples; what is computed, is computed in their type (or in x's, if
            that is finer).
        residual: what is added before the ReLU, [B, C, H, W].
        relu: whether there is a ReLU.
        fused: False for torch's own operations and their gradients: the same up to rounding, with more memory; `eager`
            for no kernel but torch's operations with as little memory.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.ndim != 4 or any(part.shape not in ((len(x), x.shape[1]), (1, x.shape[1])) for part in (scale, shift)):
        shapes = [list(part.shape) for part in (x, scale, shift)]
        raise ValueError(f"a map [B, C, H, W] takes a scale and a shift [B, C]; got {', '.join(map(str, shapes))}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual must be {list(x.shape)}, got {list(residual.shape)}")
    if not fused or not x.numel() or torch.compiler.is_compiling():  # a compiler fuses by itself
        return _composed(x, scale, shift, residual, relu)
    layout = _layout(x)
    x, residual = (None if part is None else part.contiguous(memory_format=layout) for part in (x, residual))
    scale, shift = (part if len(part) == len(x) else part.expand(len(x), -1) for part in (scale, shift))
    # of all norms folded at once these are columns, which need no copy
    scale, shift = (part if part.stride(1) == 1 else part.contiguous() for part in (scale, shift))
    return _Modulate.apply(x, scale, shift, residual, relu, fused == "eager")


def _composed(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    y = torch.addcmul(shift[:, :, None, None], x, scale[:, :, None, None])
    if residual is not None:
        y = y + residual
    return (torch.relu(y) if relu else y).to(x.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, eager: bool
    ) -> Tensor:
        ctx.layout, ctx.wants, ctx.relu = _layout(x), ctx.needs_input_grad[:4], relu
        wants_x, wants_scale, _, _ = ctx.wants
        keeps_bits = relu and any(ctx.wants) and (residual is not None or not wants_scale)
        recomputes = relu and any(ctx.wants) and not keeps_bits
        ctx.by = by_cpp if not eager and by_cpp.can(x, scale, shift, residual) else by_torch
        y, bits = ctx.by.forward(x, scale, shift, residual, relu, keeps_bits)
        ctx.save_for_backward(
            x if wants_scale else None,
            scale if wants_x or recomputes else None,
            shift if recomputes else None,
            bits,
        )
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradient.contiguous(memory_format=ctx.layout)
        if torch.is_grad_enabled():  # as `create_graph` asks for
            return *_differentiable_gradients(ctx, gradient), None, None
        return *ctx.by.backward(gradient, *ctx.saved_tensors, ctx.relu, *ctx.wants), None, None


def _differentiable_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of x, scale, shift and residual by torch's own operations, to be differentiated again."""
    x, scale, shift, bits = ctx.saved_tensors
    wants_x, wants_scale, wants_shift, wants_residual = ctx.wants
    g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    if ctx.relu:
        with torch.no_grad():  # the residual's gradient, for a ∂y of ones, is [y > 0]
            wants = (False, wants_scale, False, True)
            g_of_ones = ctx.by.backward(torch.ones_like(gradient), x, scale, shift, bits, True, *wants)[3]
        g = g * g_of_ones
    return (
        (g * scale[:, :, None, None]).to(gradient.dtype) if wants_x else None,
        (g * x).sum((2, 3)) if wants_scale else None,
        g.sum((2, 3)) if wants_shift else None,
        g.to(gradient.dtype) if wants_residual else None,
    )


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
