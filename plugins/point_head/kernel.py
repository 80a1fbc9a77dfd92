"""The Triton kernel: `conv`'s main loop over all output channels at once, so that a pixel's channels are in one program to go on with.

It runs on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.kernel import convolve, pixels_of, tile_of


@triton.jit
def points(
    acc,  # (pixels, BLOCK_N), float32: the convolution's sums
    bias,
    weight_out,
    bias_out,
    pts3d,  # of one group
    conf,
    group,
    pixel,  # each row's number in the outputs
    inside,
    C_OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NORM_FLOOR: tl.constexpr,
    CONF_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """From a tile's sums to its points and confidences, and the stores."""
    n = tl.arange(0, BLOCK_N)
    acc += tl.load(bias + group * C_OUT + n, mask=n < C_OUT, other=0.0).to(tl.float32)[None, :]
    h = tl.maximum(acc, 0.0).to(weight_out.dtype.element_ty)
    column = tl.arange(0, 16)  # the fewest that tensor cores take; four are real
    places = (group * C_OUT + n)[:, None] * 4 + column[None, :]
    w = tl.load(weight_out + places, mask=(n < C_OUT)[:, None] & (column < 4)[None, :], other=0.0)
    y = tl.dot(h, w, input_precision=PRECISION)
    y += tl.load(bias_out + group * 4 + column, mask=column < 4, other=0.0).to(tl.float32)[None, :]
    norm = tl.sqrt(tl.sum(tl.where(column < 3, y * y, 0.0), 1))
    stretch = (tl.exp(norm) - 1.0) / tl.maximum(norm, NORM_FLOOR)
    tl.store(pts3d + (pixel * 3)[:, None] + column[None, :], y * stretch[:, None], mask=inside[:, None] & (column < 3)[None, :])
    confidence = CONF_FLOOR + tl.exp(y)
    tl.store(conf + pixel[:, None] + (column - 3)[None, :], confidence, mask=inside[:, None] & (column == 3)[None, :])


@triton.jit
def point_head(
    x,  # as for smc.plugins.conv.kernel.convolve; without TMA the pointer to (groups, B, H, W, Cin) in any strides, the last one 1
    weight,
    bias,  # (groups, C)
    weight_out,  # (groups, C, 4)
    bias_out,  # (groups, 4)
    pts3d,  # (B, H, W, 3) float32 for each group
    conf,  # (B, H, W) float32 for each group
    height,
    width,
    x_group,  # strides in elements
    x_batch,
    x_row,
    x_column,
    pts3d_group,
    conf_group,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,  # C or more
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    NORM_FLOOR: tl.constexpr,
    CONF_FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (pixel tiles, B, groups)."""
    STEPS: tl.constexpr = SIZE * SIZE * ((C_IN + BLOCK_K - 1) // BLOCK_K)
    pid, batch, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, column = tile_of(pid, tl.cdiv(height, TILE_H), tl.cdiv(width, TILE_W), TILE_H, TILE_W)
    if not TMA:
        x += group.to(tl.int64) * x_group + batch.to(tl.int64) * x_batch
    if OVERLAPS:
        gdc_wait()
    acc = convolve(
        x, weight, group, batch, row, column, 0, height, width, x_row, x_column, 0, STEPS,
        C_IN, C_OUT, SIZE, STRIDE, PADDING, TILE_H, TILE_W, BLOCK_N, BLOCK_K, TMA, PRECISION,
    )  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
    rows, columns, inside = pixels_of(row, column, height, width, TILE_H, TILE_W)
    pixel = (batch * height + rows) * width + columns
    pts3d += group.to(tl.int64) * pts3d_group
    conf += group.to(tl.int64) * conf_group
    points(acc, bias, weight_out, bias_out, pts3d, conf, group, pixel, inside, C_OUT, BLOCK_N, NORM_FLOOR, CONF_FLOOR, PRECISION)
