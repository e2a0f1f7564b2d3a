"""`modulate` with torch's own operations, for every device: some samples go through all steps before the next ones, so
that on a CPU they stay in its cache.

Legend: B samples, C channels, H and W map size; a map is contiguous or channels-last.
"""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_CHUNK = 2**22  # bytes of a map at once: what fits into a CPU's cache beside its gradients
# eight bytes of 0 or 1 times _GATHER have them as the bits of the highest byte
_GATHER = 0x0102040810204080
# eight copies of a byte: in the i-th, bit i is kept
_COPIES, _OWN_BITS = 0x0101010101010101, 0x8040201008040201 - 2**64


_kept = threading.local()


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, keeps_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """y [B, C, H, W], and with `keeps_bits` where it is positive, to be handed to `backward`."""
    kind = torch.promote_types(x.dtype, scale.dtype)
    y = torch.empty_like(x)
    bits = torch.empty(len(x), -(-x[0].numel() // 8), dtype=torch.uint8, device=x.device) if keeps_bits else None
    work = None if kind == y.dtype else _work(x, kind)
    for part in _chunks(x):
        out = y[part] if work is None else work[: len(x[part])]
        torch.addcmul(_as_map(shift[part]), x[part], _as_map(scale[part]), out=out)
        if residual is not None:
            out += residual[part]
        if relu:
            out.relu_()
        if bits is not None:
            bits[part] = _positive(out)
        if work is not None:
            y[part] = out
    return y, bits


def backward(
    gradient: Tensor,
    x: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    bits: Tensor | None,
    relu: bool,
    wants_x: bool,
    wants_scale: bool,
    wants_shift: bool,
    wants_residual: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, scale, shift and residual, None where not wanted; x and the three after it as far as saved."""
    kind = torch.promote_types(gradient.dtype, torch.float32 if scale is None else scale.dtype)
    of_x = torch.empty_like(gradient) if wants_x else None
    of_scale, of_shift = (
        torch.empty(gradient.shape[:2], dtype=kind, device=gradient.device) if wanted else None
        for wanted in (wants_scale, wants_shift)
    )
    of_residual = torch.empty_like(gradient) if wants_residual and relu else gradient if wants_residual else None
    work = _work(gradient, kind)
    for part in _chunks(gradient):
        g = gradient[part].to(kind)
        if relu:
            here = work[: len(g)] if of_residual is None or of_residual.dtype != kind else of_residual[part]
            if bits is not None:
                torch.mul(g, _unpacked(bits[part], g), out=here)
            else:
                torch.addcmul(_as_map(shift[part]), x[part], _as_map(scale[part]), out=here)
                torch.ops.aten.threshold_backward.grad_input(g, here, 0, grad_input=here)
            g = here
            if of_residual is not None and of_residual.dtype != kind:
                of_residual[part] = g
        if of_shift is not None:
            torch.sum(g, (2, 3), out=of_shift[part])
        if of_x is not None:
            torch.mul(g, _as_map(scale[part]), out=of_x[part])
        if of_scale is not None:
            torch.sum(torch.mul(g, x[part], out=work[: len(g)]), (2, 3), out=of_scale[part])
    return of_x, of_scale, of_shift, of_residual


def _as_map(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _samples(x: Tensor) -> int:
    """Samples that are worked on at once."""
    size = x[0].numel() * x.element_size()
    return max(1, min(len(x), _CHUNK // max(size, 1)))


def _chunks(x: Tensor) -> Iterator[slice]:
    step = _samples(x)
    return (slice(start, start + step) for start in range(0, len(x), step))


def _work(x: Tensor, kind: torch.dtype) -> Tensor:
    """Memory for one chunk of a map, in its layout; kept for the next call, as to touch fresh memory is slow."""
    like = x[: _samples(x)]
    kept = getattr(_kept, "memory", None)
    if kept is None or kept.numel() < like.numel() * kind.itemsize or kept.device != x.device:
        kept = _kept.memory = torch.empty(like.numel() * kind.itemsize, dtype=torch.uint8, device=x.device)
    return kept[: like.numel() * kind.itemsize].view(kind).as_strided(like.shape, like.stride())


def _rows(x: Tensor) -> Tensor:
    """A map in the order of its memory, [B, C * H * W]; a view."""
    return (x if x.is_contiguous() else x.permute(0, 2, 3, 1)).reshape(len(x), -1)


def _positive(y: Tensor) -> Tensor:
    """Where a map [B, C, H, W] of no negative values is above 0: uint8 [B, ceil(C * H * W / 8)].

    A cast to bool tells that as `> 0` would, six times faster.
    """
    rows = _rows(y).to(torch.bool).view(torch.uint8)
    if missing := -rows.shape[1] % 8:
        rows = torch.nn.functional.pad(rows, (0, missing))
    return (rows.view(torch.int64) * _GATHER >> 56).to(torch.uint8)


def _unpacked(bits: Tensor, like: Tensor) -> Tensor:
    """What `_positive` found, as 0 and 1 in the shape, layout and type of a map."""
    eights = (bits.to(torch.int64) * _COPIES).bitwise_and_(_OWN_BITS)
    rows = eights.view(torch.uint8).to(torch.bool)[:, : like[0].numel()].view(torch.uint8).to(like.dtype)
    if like.is_contiguous():
        return rows.reshape(like.shape)
    samples, channels, height, width = like.shape
    return rows.reshape(samples, height, width, channels).permute(0, 3, 1, 2)
