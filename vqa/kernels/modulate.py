"""One operation for what follows a convolution in a modulated ResNet, with a backward pass that saves the least.

    y = act(scale · x + shift (+ residual))             one scale and shift per sample and channel; act: ReLU or nothing

Autograd would keep x, the sums and the result. The gradients need less:

    g = ∂y · [y > 0],   ∂residual = g,   ∂x = g · scale,   ∂shift = Σ_hw g,   ∂scale = Σ_hw g · x

x is saved once, and only where the gradient of scale is wanted. [y > 0] is computed again from x, scale and shift, or
stored, one bit per element, where there is a residual or no x.
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
    """Compute y = act(scale · x + shift (+ residual)).

    Args:
        x: map [B, C, H, W] of a floating type, contiguous or channels-last; y has its type and layout.
        scale, shift: [B, C], or [1, C] for all samples; y is computed in their type (or in that of x, if it is finer)
            and rounded once.
        residual: map [B, C, H, W] that is added before the ReLU.
        relu: apply a ReLU.
        fused: True computes float32 maps on a CPU by C++ kernels and others by torch's operations, and saves the least;
            `eager` does the same without the kernels; False leaves the gradients to autograd, which saves more.

    Raises:
        ValueError: a shape does not fit.
    """
    if x.ndim != 4 or any(part.shape not in (x.shape[:2], (1, x.shape[1])) for part in (scale, shift)):
        shapes = [list(part.shape) for part in (x, scale, shift)]
        raise ValueError(f"a map [B, C, H, W] takes a scale and a shift [B, C]; got {', '.join(map(str, shapes))}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"a residual must be {list(x.shape)}, got {list(residual.shape)}")
    # a compiler fuses by itself; forward-mode differentiation and torch.func need torch's own operations
    if not fused or not x.numel() or torch.compiler.is_compiling() or under_transform():
        return by_torch.composed(x, scale, shift, residual, relu).to(x.dtype)
    layout = _layout(x)
    x, residual = (None if part is None else part.contiguous(memory_format=layout) for part in (x, residual))
    scale, shift = (part.expand(x.shape[:2]) for part in (scale, shift))
    return _Modulate.apply(x, scale, shift, residual, relu, fused == "eager")


def under_transform() -> bool:
    """Return whether a transform of `torch.func` or forward-mode differentiation (`dual_level`) is active."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def is_batched(gradient: Tensor) -> bool:
    """Return whether ∂y is vectorised (`is_grads_batched`, `torch.vmap`): such a tensor has no storage."""
    return not torch.compiler.is_compiling() and (
        under_transform() or torch._C._functorch.is_legacy_batchedtensor(gradient)
    )


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, eager: bool
    ) -> Tensor:
        ctx.layout, ctx.wants, ctx.relu = _layout(x), ctx.needs_input_grad[:4], relu
        wants_x, wants_scale, _, _ = ctx.wants
        masks = relu and any(ctx.wants)  # the backward pass needs [y > 0]
        keeps_bits = masks and (residual is not None or not wants_scale)
        ctx.by = by_cpp if not eager and by_cpp.can(x, scale, shift, residual) else by_torch
        y, bits = ctx.by.forward(x, scale, shift, residual, relu, keeps_bits)
        recomputes = masks and not keeps_bits
        ctx.save_for_backward(
            x if wants_scale else None,
            scale if wants_x or recomputes else None,
            shift if recomputes else None,
            bits,
        )
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, bits = ctx.saved_tensors  # once: torch.utils.checkpoint allows no second access
        if x is not None:  # hooks on saved tensors, as of `save_on_cpu`, return contiguous ones
            x = x.to(gradient.dtype, memory_format=ctx.layout)
        saved = x, scale, shift, bits
        if not (torch.is_grad_enabled() or is_batched(gradient)):
            gradient = gradient.contiguous(memory_format=ctx.layout)
            return *ctx.by.backward(gradient, *saved, ctx.relu, ctx.wants), None, None
        # `create_graph` or a vectorised ∂y needs torch's own operations. The mask [y > 0] needs no gradient: it is
        # the residual's gradient for a ∂y of ones.
        if ctx.relu:
            with torch.no_grad():
                ones = torch.ones(gradient.shape, dtype=gradient.dtype, device=gradient.device)
                wants = (False, False, False, True)
                *_, positive = ctx.by.backward(ones.contiguous(memory_format=ctx.layout), *saved, True, wants)
            gradient = gradient * positive
        return *by_torch.backward(gradient, x, scale, shift, None, False, ctx.wants), None, None


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
