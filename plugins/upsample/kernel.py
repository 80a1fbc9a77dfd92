"""The Triton kernel: each program makes a tile of TILE_H x TILE_W cells by BLOCK_C channels.

A cell is a block of ROWS x COLUMNS outputs that lie between the same four pixels of x, which a thread loads once for all of them. Of a map
enlarged to twice its size, the corners on each other, outputs 2k - 1 and 2k lie between k - 1 and k along either side, so that a cell has
2 x 2 outputs; the first and the last cell are partly outside. Where neighbours do not come in such pairs, a cell is one output.

It runs on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.kernel import elements


@triton.jit
def around(first, scale, size):
    """For cells whose first output along a side is `first`: the position in x below it, as a float32, and the rows (or columns) of x
    there and after it. A position before x's first, in the cell that is partly outside, has no share in any output."""
    below = tl.floor(first.to(tl.float32) * scale)
    row = below.to(tl.int32)
    return below, tl.maximum(tl.minimum(row, size - 1), 0), tl.minimum(row + 1, size - 1)


@triton.jit
def upsample(
    x,  # (groups, B, H, W, C) in any strides, the last one 1
    residual,  # (groups, B, Ho, Wo, C), likewise, or None; and so out and, if any, out_relu
    out,
    out_relu,
    height,  # of x
    width,
    out_height,
    out_width,
    scale_h,  # (H - 1) / (Ho - 1), float32; 0 with one row of output
    scale_w,
    x_group,  # strides in elements
    x_batch,
    x_row,
    x_column,
    residual_group,
    residual_batch,
    residual_row,
    residual_column,
    out_group,
    out_batch,
    out_row,
    out_column,
    out_relu_group,
    out_relu_batch,
    out_relu_row,
    out_relu_column,
    GROUPS: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (channel tiles x tiles along a row, rows of tiles, B x groups), the channel tiles of one tile of cells beside each other."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    group, batch = tl.program_id(2) % GROUPS, tl.program_id(2) // GROUPS
    cell, c = tl.arange(0, TILE_H * TILE_W), tl.program_id(0) % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)
    # Each cell's first output.
    row = (tl.program_id(1) * TILE_H + cell // TILE_W) * ROWS - (ROWS - 1)
    column = (tl.program_id(0) // TILES_C * TILE_W + cell % TILE_W) * COLUMNS - (COLUMNS - 1)
    above, top, bottom = around(row, scale_h, height)
    before, left, right = around(column, scale_w, width)

    x_place = (x, x_group, x_batch, x_row, x_column)
    residual_place = (residual, residual_group, residual_batch, residual_row, residual_column)
    out_place = (out, out_group, out_batch, out_row, out_column)
    out_relu_place = (out_relu, out_relu_group, out_relu_batch, out_relu_row, out_relu_column)
    channels = (c < C)[None, :]
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    # The four are in x even for cells beyond the last output.
    a = tl.load(elements(x_place, group, batch, top, left, c), mask=channels, other=0.0).to(tl.float32)
    b = tl.load(elements(x_place, group, batch, top, right, c), mask=channels, other=0.0).to(tl.float32)
    d = tl.load(elements(x_place, group, batch, bottom, left, c), mask=channels, other=0.0).to(tl.float32)
    e = tl.load(elements(x_place, group, batch, bottom, right, c), mask=channels, other=0.0).to(tl.float32)

    values = ()  # all outputs of the cells before the first store, after which no residual could be loaded early
    for i in tl.static_range(ROWS):
        share_h = ((row + i).to(tl.float32) * scale_h - above)[:, None]
        in_left, in_right = a + share_h * (d - a), b + share_h * (e - b)
        for j in tl.static_range(COLUMNS):
            share_w = ((column + j).to(tl.float32) * scale_w - before)[:, None]
            y = in_left + share_w * (in_right - in_left)
            if residual is not None:
                mask = inside(row + i, column + j, out_height, out_width)[:, None] & channels
                y += tl.load(elements(residual_place, group, batch, row + i, column + j, c), mask=mask, other=0.0).to(tl.float32)
            values += (y,)
    for i in tl.static_range(ROWS):
        for j in tl.static_range(COLUMNS):
            y = values[i * COLUMNS + j]
            mask = inside(row + i, column + j, out_height, out_width)[:, None] & channels
            tl.store(elements(out_place, group, batch, row + i, column + j, c), y.to(out.dtype.element_ty), mask=mask)
            if out_relu is not None:
                places = elements(out_relu_place, group, batch, row + i, column + j, c)
                tl.store(places, tl.maximum(y, 0.0).to(out_relu.dtype.element_ty), mask=mask)


@triton.jit
def inside(row, column, height, width):
    """Whether pixels are in an image."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)
