"""The Triton kernels: convolution as a matrix product (pixels, taps x channels) @ (taps x channels, channels), taps gathered on the way.

They run on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.

One program makes a tile of TILE_H x TILE_W pixels by BLOCK_N channels of one image. It goes over the taps of the kernel and, in each,
over the channels of x, BLOCK_K at a time. With TMA the copy engine fetches the window of x that a tap sees as one block, and what lies
outside the image is zero by itself; else each thread masks its own part. A program may do a part of the steps alone (splits > 1): it
then leaves a float32 sum, and `reduce` adds these up.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_of(pid, tiles_h, tiles_w, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """The first row and column of tile `pid`; tiles are numbered along rows."""
    return pid // tiles_w % tiles_h * TILE_H, pid % tiles_w * TILE_W


@triton.jit
def pixels_of(row, column, height, width, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    """Rows and columns of a tile's pixels, flat, and which of them are in the image."""
    pixel = tl.arange(0, TILE_H * TILE_W)
    rows, columns = row + pixel // TILE_W, column + pixel % TILE_W
    return rows, columns, (rows < height) & (columns < width)


@triton.jit
def convolve(
    x,  # a descriptor of (groups, B, H, W, Cin) with blocks (1, 1, TILE_H, TILE_W, BLOCK_K); without TMA the pointer to one image
    weight,  # (groups x taps, Cin, Cout): a descriptor with blocks (1, BLOCK_K, BLOCK_N); without TMA a pointer
    group,
    batch,
    row,  # of the tile's first pixel in the output, and so `column`
    column,
    channel,  # the tile's first
    height,  # of x
    width,
    x_row,
    x_column,
    first,  # steps to do: first to last - 1
    last,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the convolution's sums, (TILE_H x TILE_W, BLOCK_N) in float32, of some of the steps."""
    STEPS: tl.constexpr = (C_IN + BLOCK_K - 1) // BLOCK_K
    acc = tl.zeros((TILE_H * TILE_W, BLOCK_N), tl.float32)
    if not TMA:
        rows, columns, _ = pixels_of(row, column, height, width, TILE_H, TILE_W)
        rows, columns = rows * STRIDE - PADDING, columns * STRIDE - PADDING
        k = tl.arange(0, BLOCK_K)
        n = channel + tl.arange(0, BLOCK_N)
        n_inside = n < C_OUT
        weight += group.to(tl.int64) * (SIZE * SIZE * C_IN * C_OUT)
    for step in range(first, last):
        tap, start = step // STEPS, step % STEPS * BLOCK_K
        i, j = tap // SIZE, tap % SIZE
        if TMA:
            a = x.load([group, batch, row + i - PADDING, column + j - PADDING, start]).reshape((TILE_H * TILE_W, BLOCK_K))
            b = weight.load([group * (SIZE * SIZE) + tap, start, channel]).reshape((BLOCK_K, BLOCK_N))
        else:
            inside = (rows + i >= 0) & (rows + i < height) & (columns + j >= 0) & (columns + j < width)
            places = (rows + i) * x_row + (columns + j) * x_column + start
            a = tl.load(x + places[:, None] + k[None, :], mask=inside[:, None] & (start + k < C_IN)[None, :], other=0.0)
            places = (tap * C_IN + start + k) * C_OUT
            b = tl.load(weight + places[:, None] + n[None, :], mask=(start + k < C_IN)[:, None] & n_inside[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def elements(place, group, batch, rows, columns, n):
    """Pointers to channels `n` of pixels of an image, (pixels, channels). `place` is a map's pointer and its strides in elements, from
    group to group, image to image, row to row and pixel to pixel."""
    pointer, group_stride, batch_stride, row_stride, column_stride = place
    pointer += group.to(tl.int64) * group_stride + batch.to(tl.int64) * batch_stride
    return pointer + (rows * row_stride + columns * column_stride)[:, None] + n[None, :]


@triton.jit
def finish(
    acc,  # (pixels, BLOCK_N), float32
    bias,
    residual,  # as `elements` takes it, and so out and out_relu; the pointer is None without
    out,
    out_relu,
    group,
    batch,
    rows,
    columns,
    inside,
    n,
    C_OUT: tl.constexpr,
    RELU: tl.constexpr,
):
    """Bias, residual and activation, and the stores."""
    mask = inside[:, None] & (n < C_OUT)[None, :]
    if bias is not None:
        acc += tl.load(bias + group * C_OUT + n, mask=n < C_OUT, other=0.0).to(tl.float32)[None, :]
    if residual[0] is not None:
        acc += tl.load(elements(residual, group, batch, rows, columns, n), mask=mask, other=0.0).to(tl.float32)
    if RELU:
        acc = tl.maximum(acc, 0.0)
    tl.store(elements(out, group, batch, rows, columns, n), acc.to(out[0].dtype.element_ty), mask=mask)
    if out_relu[0] is not None:
        places = elements(out_relu, group, batch, rows, columns, n)
        tl.store(places, tl.maximum(acc, 0.0).to(out_relu[0].dtype.element_ty), mask=mask)


@triton.jit
def conv(
    x,  # as for `convolve`; without TMA the pointer to (groups, B, H, W, Cin) in any strides, the last one 1
    weight,
    bias,  # (groups, Cout) or None
    residual,  # (groups, B, Ho, Wo, Cout) in any strides, the last one 1, or None; likewise out and, if any, out_relu
    out,
    out_relu,
    partial,  # (splits, groups, B, Ho, Wo, Cout) float32 contiguous: what is written instead of out when splits > 1; else None
    height,  # of x
    width,
    out_height,
    out_width,
    batches,
    splits,
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
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    SIZE: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    RELU: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,  # whether splits > 1
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (channel tiles x pixel tiles x splits, B, groups), the channel tiles of one pixel tile beside each other."""
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = SIZE * SIZE * ((C_IN + BLOCK_K - 1) // BLOCK_K)
    tiles_h, tiles_w = tl.cdiv(out_height, TILE_H), tl.cdiv(out_width, TILE_W)
    pid, batch, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    channel = pid % TILES_N * BLOCK_N
    row, column = tile_of(pid // TILES_N, tiles_h, tiles_w, TILE_H, TILE_W)
    split = pid // (TILES_N * tiles_h * tiles_w)
    first, last = split * STEPS // splits, (split + 1) * STEPS // splits
    if not TMA:
        x += group.to(tl.int64) * x_group + batch.to(tl.int64) * x_batch
    if OVERLAPS:
        gdc_wait()
    acc = convolve(
        x, weight, group, batch, row, column, channel, height, width, x_row, x_column, first, last,
        C_IN, C_OUT, SIZE, STRIDE, PADDING, TILE_H, TILE_W, BLOCK_N, BLOCK_K, TMA, PRECISION,
    )  # fmt: skip
    if OVERLAPS:
        gdc_launch_dependents()
    rows, columns, inside = pixels_of(row, column, out_height, out_width, TILE_H, TILE_W)
    n = channel + tl.arange(0, BLOCK_N)
    if SPLIT:
        image = (split * tl.num_programs(2) + group) * batches + batch
        partial += image.to(tl.int64) * out_height * out_width * C_OUT
        places = (rows * out_width + columns) * C_OUT
        tl.store(partial + places[:, None] + n[None, :], acc, mask=inside[:, None] & (n < C_OUT)[None, :])
    else:
        finish(
            acc,
            bias,
            (residual, residual_group, residual_batch, residual_row, residual_column),
            (out, out_group, out_batch, out_row, out_column),
            (out_relu, out_relu_group, out_relu_batch, out_relu_row, out_relu_column),
            group,
            batch,
            rows,
            columns,
            inside,
            n,
            C_OUT,
            RELU,
        )


@triton.jit
def reduce(
    partial,  # (SPLITS, groups, B, Ho, Wo, Cout) float32 contiguous
    bias,  # this and the rest as for `conv`
    residual,
    out,
    out_relu,
    out_height,
    out_width,
    batches,
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
    C_OUT: tl.constexpr,
    RELU: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(Ho x Wo / PIXELS) x ceil(Cout / BLOCK_N), B, groups)."""
    TILES_N: tl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    pid, batch, group = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    pixel = pid // TILES_N * PIXELS + tl.arange(0, PIXELS)
    n = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    size = out_height * out_width
    inside = pixel < size
    mask = inside[:, None] & (n < C_OUT)[None, :]
    partial += ((group * batches + batch).to(tl.int64) * size + pixel[:, None]) * C_OUT + n[None, :]
    between = (tl.num_programs(2) * batches).to(tl.int64) * size * C_OUT
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros((PIXELS, BLOCK_N), tl.float32)
    for _ in tl.static_range(SPLITS):
        acc += tl.load(partial, mask=mask, other=0.0)
        partial += between
    finish(
        acc,
        bias,
        (residual, residual_group, residual_batch, residual_row, residual_column),
        (out, out_group, out_batch, out_row, out_column),
        (out_relu, out_relu_group, out_relu_batch, out_relu_row, out_relu_column),
        group,
        batch,
        pixel // out_width,
        pixel % out_width,
        inside,
        n,
        C_OUT,
        RELU,
    )
