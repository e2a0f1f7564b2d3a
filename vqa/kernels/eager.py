"""`modulate` with torch's own operations, for every device; a map is contiguous or channels-last."""

import torch
from torch import Tensor
from torch.nn import functional as F


def composed(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, out: Tensor | None = None
) -> Tensor:
    """Compute y = act(scale · x + shift (+ residual)) [B, C, H, W] in the finer type of x and scale, or into `out`."""
    y = torch.addcmul(_as_map(shift), x, _as_map(scale), out=out if residual is None else None)
    if residual is not None:
        y = torch.add(y, residual, out=out)
    return y.relu_() if relu else y


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, keeps_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """Compute y [B, C, H, W] in the type of x, and with `keeps_bits` [y > 0], packed for `backward`."""
    y = composed(x, scale, shift, residual, relu, torch.empty_like(x))  # rounded as it is written: one launch less
    return y, _packed(y) if keeps_bits else None


def backward(
    gradient: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bits: Tensor | None,
    relu: bool,
    wants: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:
    """Compute the requested gradients of x, scale, shift and residual; None for the others.

    `x`, `scale`, `shift` and `bits` are None where they are not needed: [y > 0] is unpacked or computed again.
    """
    wants_x, wants_scale, wants_shift, wants_residual = wants
    g, exact = gradient, torch.promote_types(gradient.dtype, torch.float32 if scale is None else scale.dtype)
    if bits is not None:
        g = torch.ops.aten.threshold_backward(g, _unpacked(bits, g), 127)
    elif relu:
        g = torch.ops.aten.threshold_backward(g, composed(x, scale, shift, None, False), 0)
    return (
        (g * _as_map(scale)).to(gradient.dtype) if wants_x else None,
        (g.to(exact) * x).sum((2, 3)) if wants_scale else None,
        g.sum((2, 3), dtype=exact) if wants_shift else None,
        g.to(gradient.dtype) if wants_residual else None,
    )


def _as_map(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _packed(y: Tensor) -> Tensor:
    """Pack whether each element of a map without negative values is above 0 or NaN, a bit each: uint8 [B, ⌈CHW / 8⌉].

    The highest bit of a sample's bytes belongs to the first eighth of its elements, in the order of memory.
    """
    positive = y.as_strided([len(y), y[0].numel()], [y[0].numel(), 1]).to(torch.bool).view(torch.uint8)
    if missing := -positive.shape[1] % 8:
        positive = F.pad(positive, (0, missing))
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=y.device)[:, None]
    return (positive.view(len(y), 8, -1) << places).sum(1, dtype=torch.uint8)


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """Unpack `_packed` to numbers above 127 where it is true, in the shape and layout of a map."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)[:, None]
    shifted = (bits[:, None] << places).flatten(1)[:, : like[0].numel()]
    return shifted.contiguous().as_strided(like.shape, like.stride())
