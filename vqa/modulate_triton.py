"""`modulate` as two Triton kernels for CUDA: one pass over the maps forward, one backward.

A map is seen as B matrices of rows and columns as they lie in memory: positions by channels where it is channels-last,
channels by positions where it is contiguous. A program computes one tile of one matrix. Backward, it also writes the
tile's sums over positions, which are then added up in a fixed order: the result is the same in every run.

Not yet measured on a GPU; tested with Triton's interpreter.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Row and column numbers of this program's tile, which of them are there, and their places in the matrix."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    there = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, there, row[:, None] * columns + column[None, :]


@triton.jit
def _of_channels(values, stride, row, column, rows, columns, CHANNELS_LAST: tl.constexpr):
    """A value a channel of this sample, in the shape of the tile's columns or rows; `stride` from sample to sample."""
    if CHANNELS_LAST:
        found = tl.load(values + tl.program_id(0) * stride + column, mask=column < columns, other=0.0)[None, :]
    else:
        found = tl.load(values + tl.program_id(0) * stride + row, mask=row < rows, other=0.0)[:, None]
    return found.to(tl.float32)


@triton.jit
def _forward_kernel(
    x, scale, shift, residual, y, bits, scale_stride, shift_stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RESIDUAL: tl.constexpr, RELU: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    row, column, there, place = _tile(rows, columns, ROWS, COLUMNS)
    sample = tl.program_id(0).to(tl.int64)
    begin = sample * rows * columns
    factor = _of_channels(scale, scale_stride, row, column, rows, columns, CHANNELS_LAST)
    term = _of_channels(shift, shift_stride, row, column, rows, columns, CHANNELS_LAST)
    out = tl.load(x + begin + place, mask=there, other=0.0).to(tl.float32) * factor + term
    if RESIDUAL:
        out += tl.load(residual + begin + place, mask=there, other=0.0).to(tl.float32)
    if RELU:
        out = tl.maximum(out, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(y + begin + place, out.to(y.dtype.element_ty), mask=there)
    if BITS:
        positive = tl.reshape(((out > 0.0) & there).to(tl.int32), (ROWS, COLUMNS // 8, 8))
        packed = tl.sum(positive << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)
        byte = tl.program_id(2) * (COLUMNS // 8) + tl.arange(0, COLUMNS // 8)
        width = (columns + 7) // 8
        inside = (row < rows)[:, None] & (byte < width)[None, :]
        tl.store(bits + sample * rows * width + row[:, None] * width + byte[None, :], packed, mask=inside)


@triton.jit
def _backward_kernel(
    gradient, x, scale, shift, bits, of_x, of_scale, of_shift, of_residual, scale_stride, shift_stride, rows, columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    RELU: tl.constexpr, BITS: tl.constexpr,
    WANTS_X: tl.constexpr, WANTS_SCALE: tl.constexpr, WANTS_SHIFT: tl.constexpr, WANTS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    row, column, there, place = _tile(rows, columns, ROWS, COLUMNS)
    sample = tl.program_id(0).to(tl.int64)
    begin = sample * rows * columns
    g = tl.load(gradient + begin + place, mask=there, other=0.0).to(tl.float32)
    if WANTS_SCALE:
        value = tl.load(x + begin + place, mask=there, other=0.0).to(tl.float32)
    if WANTS_X or (RELU and not BITS):
        factor = _of_channels(scale, scale_stride, row, column, rows, columns, CHANNELS_LAST)
    if RELU:
        if BITS:
            width = (columns + 7) // 8
            byte = sample * rows * width + row[:, None] * width + column[None, :] // 8
            opened = (tl.load(bits + byte, mask=there, other=0).to(tl.int32) >> (column % 8)[None, :]) & 1 > 0
        else:
            term = _of_channels(shift, shift_stride, row, column, rows, columns, CHANNELS_LAST)
            opened = value * factor + term > 0.0
        g = tl.where(opened, g, 0.0)
    if WANTS_RESIDUAL:
        tl.store(of_residual + begin + place, g.to(of_residual.dtype.element_ty), mask=there)
    if WANTS_X:
        tl.store(of_x + begin + place, (g * factor).to(of_x.dtype.element_ty), mask=there)
    # sums over positions: [B, tiles of positions, C]
    if CHANNELS_LAST:
        sums = (sample * tl.num_programs(1) + tl.program_id(1)) * columns + column
        if WANTS_SCALE:
            tl.store(of_scale + sums, tl.sum(g * value, axis=0), mask=column < columns)
        if WANTS_SHIFT:
            tl.store(of_shift + sums, tl.sum(g, axis=0), mask=column < columns)
    else:
        sums = (sample * tl.num_programs(2) + tl.program_id(2)) * rows + row
        if WANTS_SCALE:
            tl.store(of_scale + sums, tl.sum(g * value, axis=1), mask=row < rows)
        if WANTS_SHIFT:
            tl.store(of_shift + sums, tl.sum(g, axis=1), mask=row < rows)


def forward(
    x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu: bool, keeps_bits: bool
) -> tuple[Tensor, Tensor | None]:
    """As `modulate_eager.forward`; computed in float32."""
    y = torch.empty_like(x)
    rows, columns, tile = _matrices(x)
    bits = torch.empty(len(x), rows, -(-columns // 8), dtype=torch.uint8, device=x.device) if keeps_bits else None
    _forward_kernel[_grid(x, rows, columns, tile)](
        x, scale, shift, residual, y, bits, scale.stride(0), shift.stride(0), rows, columns,
        **tile, RESIDUAL=residual is not None, RELU=relu, BITS=keeps_bits,
    )  # fmt: skip
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
    """As `modulate_eager.backward`; computed in float32."""
    rows, columns, tile = _matrices(gradient)
    grid = _grid(gradient, rows, columns, tile)
    of_x = torch.empty_like(gradient) if wants_x else None
    of_residual = torch.empty_like(gradient) if wants_residual else None
    tiles = grid[1] if tile["CHANNELS_LAST"] else grid[2]
    wanted = [wants_scale, wants_shift]
    sums = gradient.new_empty(sum(wanted), len(gradient), tiles, gradient.shape[1], dtype=torch.float32)
    parts = iter(sums)
    of_scale, of_shift = (next(parts) if wants else None for wants in wanted)
    strides = (0 if part is None else part.stride(0) for part in (scale, shift))
    _backward_kernel[grid](
        gradient, x, scale, shift, bits, of_x, of_scale, of_shift, of_residual, *strides, rows, columns,
        **tile, RELU=relu, BITS=bits is not None,
        WANTS_X=wants_x, WANTS_SCALE=wants_scale, WANTS_SHIFT=wants_shift, WANTS_RESIDUAL=wants_residual,
    )  # fmt: skip
    parts = iter(sums.sum(2))
    of_scale, of_shift = (next(parts) if wants else None for wants in wanted)
    return of_x, of_scale, of_shift, of_residual


def _matrices(x: Tensor) -> tuple[int, int, dict[str, int | bool]]:
    """Rows and columns of a sample's matrix, and the tile's."""
    _, channels, height, width = x.shape
    if x.is_contiguous():
        columns = min(512, max(8, triton.next_power_of_2(height * width)))
        return channels, height * width, {"ROWS": 4096 // columns, "COLUMNS": columns, "CHANNELS_LAST": False}
    columns = min(128, max(8, triton.next_power_of_2(channels)))
    return height * width, channels, {"ROWS": 4096 // columns, "COLUMNS": columns, "CHANNELS_LAST": True}


def _grid(x: Tensor, rows: int, columns: int, tile: dict[str, int | bool]) -> tuple[int, int, int]:
    return len(x), triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["COLUMNS"])
