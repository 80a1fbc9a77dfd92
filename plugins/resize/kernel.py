"""The Triton kernels: a thread makes single bytes, whose neighbours others of its row read as well."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def across(
    source,  # (rows, source_width, 3) uint8
    first,  # (width,) int32
    weights,  # (taps, width) int32
    out,  # (rows, width, 3) uint8
    rows,
    source_width,
    width,
    taps,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Grid: (ceil(3 * width / BYTES), ceil(rows / ROWS))."""
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)[None, :]
    column, channel = byte // 3, byte % 3
    inside = byte < 3 * width
    start = tl.load(first + column, mask=inside, other=0)
    total = tl.full([ROWS, BYTES], 1 << 21, tl.int32)
    for tap in range(taps):
        weight = tl.load(weights + tap * width + column, mask=inside, other=0)
        read = (row < rows) & inside & (start + tap < source_width)
        pixel = tl.load(source + row * source_width * 3 + (start + tap) * 3 + channel, mask=read, other=0)
        total += pixel.to(tl.int32) * weight
    tl.store(out + row * width * 3 + byte, _to_byte(total), mask=(row < rows) & inside)


@triton.jit
def down(
    source,  # (source_rows, width, 3) uint8
    first,  # (rows,) int32
    weights,  # (taps, rows) int32
    out,  # (rows, width, 3) uint8
    rows,
    source_rows,
    width,
    taps,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Grid: (ceil(3 * width / BYTES), ceil(rows / ROWS))."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)[None, :]
    inside = (row < rows) & (byte < 3 * width)
    start = tl.load(first + row, mask=row < rows, other=0)
    total = tl.full([ROWS, BYTES], 1 << 21, tl.int32)
    for tap in range(taps):
        weight = tl.load(weights + tap * rows + row, mask=row < rows, other=0)
        neighbour = start + tap
        pixel = tl.load(source + neighbour.to(tl.int64) * width * 3 + byte, mask=inside & (neighbour < source_rows), other=0)
        total += pixel.to(tl.int32) * weight
    tl.store(out + row.to(tl.int64) * width * 3 + byte, _to_byte(total), mask=inside)


@triton.jit
def _to_byte(total):
    """Weights of 22 bits: rounding was begun with."""
    return tl.minimum(tl.maximum(total >> 22, 0), 255).to(tl.uint8)
