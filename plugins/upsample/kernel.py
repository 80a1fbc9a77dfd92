"""The Triton kernel: each program makes a tile of TILE_H x TILE_W pixels by BLOCK_C channels, from four neighbours of each pixel.

It runs on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.kernel import finish, pixels_of, tile_of


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
    C: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (channel tiles x pixel tiles, B, groups), the channel tiles of one pixel tile beside each other."""
    TILES_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid, batch, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tile_of(pid // TILES_C, tl.cdiv(out_height, TILE_H), tl.cdiv(out_width, TILE_W), TILE_H, TILE_W)
    rows, columns, inside = pixels_of(row, column, out_height, out_width, TILE_H, TILE_W)
    c = pid % TILES_C * BLOCK_C + tl.arange(0, BLOCK_C)

    place_h, place_w = rows.to(tl.float32) * scale_h, columns.to(tl.float32) * scale_w
    # Rounding may put the last pixel's place a little beyond the last row or column.
    top, left = tl.minimum(place_h.to(tl.int32), height - 1), tl.minimum(place_w.to(tl.int32), width - 1)
    bottom, right = tl.minimum(top + 1, height - 1), tl.minimum(left + 1, width - 1)
    share_h, share_w = tl.minimum(place_h - top, 1.0)[:, None], tl.minimum(place_w - left, 1.0)[:, None]

    x += group.to(tl.int64) * x_group + batch.to(tl.int64) * x_batch
    mask = inside[:, None] & (c < C)[None, :]
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    a = tl.load(x + (top * x_row + left * x_column)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + (top * x_row + right * x_column)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    d = tl.load(x + (bottom * x_row + left * x_column)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    e = tl.load(x + (bottom * x_row + right * x_column)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = a * ((1 - share_h) * (1 - share_w)) + b * ((1 - share_h) * share_w) + d * (share_h * (1 - share_w)) + e * (share_h * share_w)
    finish(
        y,
        None,
        (residual, residual_group, residual_batch, residual_row, residual_column),
        (out, out_group, out_batch, out_row, out_column),
        (out_relu, out_relu_group, out_relu_batch, out_relu_row, out_relu_column),
        group,
        batch,
        rows,
        columns,
        inside,
        c,
        C,
        False,
    )
