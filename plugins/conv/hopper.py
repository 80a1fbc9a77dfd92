"""The Gluon kernel for sm 9.0: each row of x in shared memory serves all rows of the kernel, and products wait for no copies.

A program makes GROUPS x ROWS rows of 64 pixels by BLOCK_N channels of one image; each group of four warps has ROWS of these rows, whose
sums stay in its registers. In a step (64 channels of x by one column of the kernel) the copy engine fetches the rows of x that the tile
sees through this column, SIZE - 1 more than the tile has, and for each row of the kernel the weights. What lies outside the image is
zero by itself. Warp group 0 starts the copies; barriers in shared memory say what has come ("full") and what all have read ("empty").

Three groups are for the H200's registers: 64 x 256 sums of each, and no warp that only copies, which would take a fourth group's share.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

PIXELS = gl.constexpr(64)
DEPTH = gl.constexpr(64)


@gluon.jit
def fetch_weights(weight, weights, weight_full, group, channel, first, last, n, wanted, SIZE: gl.constexpr, WEIGHT_STAGES: gl.constexpr):
    """Start copying the weights of the n-th product, if there are so many."""
    step, i = first + n // SIZE, n % SIZE
    stage = n % WEIGHT_STAGES
    there = (step < last) & wanted
    mbarrier.expect(weight_full.index(stage), weight.nbytes_per_cta, pred=there)
    place = [group * (SIZE * SIZE) + i * SIZE + step % SIZE, step // SIZE * DEPTH, channel]
    tma.async_load(weight, place, weight_full.index(stage), weights.index(stage), pred=there)


@gluon.jit
def fetch_x(
    x,
    x_rows,
    x_full,
    group,
    batch,
    row,
    column,
    first,
    last,
    m,
    wanted,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    X_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
):
    """Start copying the rows of x of the m-th step, if there are so many."""
    BOX: gl.constexpr = x.block_shape[2]
    step, stage = first + m, m % X_STAGES
    there = (step < last) & wanted
    mbarrier.expect(x_full.index(stage), X_ROWS // BOX * x.nbytes_per_cta, pred=there)
    for k in gl.static_range(X_ROWS // BOX):
        place = [group, batch, row - PADDING + k * BOX, column - PADDING + step % SIZE, step // SIZE * DEPTH]
        tma.async_load(x, place, x_full.index(stage), x_rows.index(stage * (X_ROWS // BOX) + k), pred=there)


@gluon.jit
def fetch_first(
    x,
    weight,
    x_rows,
    weights,
    x_full,
    weight_full,
    group,
    batch,
    row,
    column,
    channel,
    first,
    last,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    X_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """Fill all buffers. Weights do not depend on the kernel before this one: they are fetched before it ends."""
    for k in gl.static_range(WEIGHT_STAGES):
        fetch_weights(weight, weights, weight_full, group, channel, first, last, k, True, SIZE, WEIGHT_STAGES)
    if OVERLAPS:
        gdc_wait()
    for k in gl.static_range(X_STAGES):
        fetch_x(x, x_rows, x_full, group, batch, row, column, first, last, k, True, SIZE, PADDING, X_ROWS, X_STAGES)


@gluon.jit
def sums(bias, group, channel, C_OUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """What the sums of one row of pixels start from: (64, BLOCK_N) in float32, the bias if there is one."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    acc = gl.zeros((PIXELS, BLOCK_N), gl.float32, layout)
    if bias is not None:
        n = channel + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        acc += gl.load(bias + group * C_OUT + n, mask=n < C_OUT, other=0.0).to(gl.float32)[None, :]
    return acc


@gluon.jit
def pixels_of(x_rows, box, row: gl.constexpr):
    """Row `row` of those that begin with a box, as products take it."""
    flat: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    BOX: gl.constexpr = x_rows.shape[1]
    rows = x_rows.index(box + row // BOX)
    return rows.reinterpret(rows.dtype, [BOX, PIXELS, DEPTH], flat).index(row % BOX)


@gluon.jit
def multiply(
    part: gl.constexpr,
    acc,  # `sums` of the warp group's first row and, with ROWS = 2, in `other` of its second
    other,
    x,
    weight,
    x_rows,
    weights,
    x_full,
    x_empty,
    weight_full,
    weight_empty,
    group,
    batch,
    row,
    column,
    channel,
    first,
    last,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    ROWS: gl.constexpr,
    X_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
):
    """Add all products to the sums of warp group `part`.

    Warp group 0 also starts the copies: what a product frees is filled again two products later, so that it seldom waits for others.
    """
    BOX: gl.constexpr = x.block_shape[2]
    for step in range(first, last):
        m = step - first
        x_stage = m % X_STAGES
        mbarrier.wait(x_full.index(x_stage), m // X_STAGES & 1)
        for i in gl.static_range(SIZE):
            n = m * SIZE + i
            stage = n % WEIGHT_STAGES
            mbarrier.wait(weight_full.index(stage), n // WEIGHT_STAGES & 1)
            box = x_stage * (X_ROWS // BOX)
            acc = warpgroup_mma(pixels_of(x_rows, box, part * ROWS + i), weights.index(stage), acc, is_async=True)
            if ROWS == 2:
                other = warpgroup_mma(pixels_of(x_rows, box, part * ROWS + i + 1), weights.index(stage), other, is_async=True)
                acc, other = warpgroup_mma_wait(2, deps=[acc, other])
            else:
                acc = warpgroup_mma_wait(1, deps=[acc])
            # Now the products before these are done, and what they read is free.
            mbarrier.arrive(weight_empty.index((n + WEIGHT_STAGES - 1) % WEIGHT_STAGES), pred=n > 0)
            if i == 0:
                mbarrier.arrive(x_empty.index((m + X_STAGES - 1) % X_STAGES), pred=m > 0)
            if part == 0:
                freed = n - 2
                mbarrier.wait(weight_empty.index((freed + WEIGHT_STAGES) % WEIGHT_STAGES), freed // WEIGHT_STAGES & 1, pred=freed >= 0)
                fetch_weights(
                    weight, weights, weight_full, group, channel, first, last, freed + WEIGHT_STAGES, freed >= 0, SIZE, WEIGHT_STAGES
                )
                if i == SIZE // 2:
                    mbarrier.wait(x_empty.index((m - 1 + X_STAGES) % X_STAGES), (m - 1) // X_STAGES & 1, pred=m > 0)
                    fetch_x(
                        x,
                        x_rows,
                        x_full,
                        group,
                        batch,
                        row,
                        column,
                        first,
                        last,
                        m - 1 + X_STAGES,
                        m > 0,
                        SIZE,
                        PADDING,
                        X_ROWS,
                        X_STAGES,
                    )
    if ROWS == 2:
        acc, other = warpgroup_mma_wait(0, deps=[acc, other])
    else:
        acc = warpgroup_mma_wait(0, deps=[acc])
        other = acc
    return acc, other


@gluon.jit
def end(part: gl.constexpr):
    """What a warp group does last. Unless they end differently, LLVM joins the last parts of warp groups 1 and 2, and the moves of their
    sums between registers that this takes make ptxas wait for each product."""
    if part == 1:
        gl.inline_asm_elementwise("mov.u32 $0, 1;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    elif part == 2:
        gl.inline_asm_elementwise("mov.u32 $0, 2;", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def with_residual(
    acc,  # of one row of pixels
    residual,
    group,
    batch,
    row,
    column,
    channel,
    out_height,
    out_width,
    residual_group,
    residual_batch,
    residual_row,
    residual_column,
    C_OUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
):
    """The sums and the residual."""
    columns = column + gl.arange(0, PIXELS, gl.SliceLayout(1, acc.type.layout))
    n = channel + gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc.type.layout))
    mask = ((columns < out_width) & (row < out_height))[:, None] & (n < C_OUT)[None, :]
    residual += group.to(gl.int64) * residual_group + batch.to(gl.int64) * residual_batch + row * residual_row
    return acc + gl.load(residual + (columns * residual_column)[:, None] + n[None, :], mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def finish(
    acc,  # of one row of pixels
    out,
    out_relu,
    partial,
    staging,  # (64, BLOCK_N) in shared memory, of out's type
    group,
    batch,
    row,
    column,
    channel,
    split,
    out_height,
    out_width,
    batches,
    C_OUT: gl.constexpr,
    BLOCK_N: gl.constexpr,
    SPLIT: gl.constexpr,
    RELU: gl.constexpr,
):
    """The activation and the stores."""
    if SPLIT:
        columns = column + gl.arange(0, PIXELS, gl.SliceLayout(1, acc.type.layout))
        n = channel + gl.arange(0, BLOCK_N, gl.SliceLayout(0, acc.type.layout))
        mask = ((columns < out_width) & (row < out_height))[:, None] & (n < C_OUT)[None, :]
        image = (split * gl.num_programs(2) + group) * batches + batch
        partial += image.to(gl.int64) * out_height * out_width * C_OUT
        gl.store(partial + ((row * out_width + columns) * C_OUT)[:, None] + n[None, :], acc, mask=mask)
    else:
        if RELU:
            acc = gl.maximum(acc, 0.0)
        staging.store(acc.to(out.dtype))
        fence_async_shared()
        tma.async_store(out, [group, batch, row, column, channel], staging)
        tma.store_wait(0)
        if out_relu is not None:
            staging.store(gl.maximum(acc, 0.0).to(out_relu.dtype))
            fence_async_shared()
            tma.async_store(out_relu, [group, batch, row, column, channel], staging)
            tma.store_wait(0)


@gluon.jit
def work(
    part: gl.constexpr,
    x,
    weight,
    x_rows,
    weights,
    x_full,
    x_empty,
    weight_full,
    weight_empty,
    done,
    bias,
    residual,
    out,
    out_relu,
    partial,
    group,
    batch,
    row,
    column,
    channel,
    split,
    first,
    last,
    out_height,
    out_width,
    batches,
    residual_group,
    residual_batch,
    residual_row,
    residual_column,
    C_OUT: gl.constexpr,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    X_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    RELU: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """A warp group."""
    if part == 0:
        fetch_first(
            x,
            weight,
            x_rows,
            weights,
            x_full,
            weight_full,
            group,
            batch,
            row,
            column,
            channel,
            first,
            last,
            SIZE,
            PADDING,
            X_ROWS,
            X_STAGES,
            WEIGHT_STAGES,
            OVERLAPS,
        )
    elif OVERLAPS:
        gdc_wait()
    # Bias and residual come first: while they are fetched, so is what the first products take.
    acc = sums(bias, group, channel, C_OUT, BLOCK_N)
    other = sums(bias, group, channel, C_OUT, BLOCK_N) if ROWS == 2 else acc
    if residual is not None:
        acc = with_residual(
            acc,
            residual,
            group,
            batch,
            row + part * ROWS,
            column,
            channel,
            out_height,
            out_width,
            residual_group,
            residual_batch,
            residual_row,
            residual_column,
            C_OUT,
            BLOCK_N,
        )
        if ROWS == 2:
            other = with_residual(
                other,
                residual,
                group,
                batch,
                row + part * ROWS + 1,
                column,
                channel,
                out_height,
                out_width,
                residual_group,
                residual_batch,
                residual_row,
                residual_column,
                C_OUT,
                BLOCK_N,
            )
    acc, other = multiply(
        part,
        acc,
        other,
        x,
        weight,
        x_rows,
        weights,
        x_full,
        x_empty,
        weight_full,
        weight_empty,
        group,
        batch,
        row,
        column,
        channel,
        first,
        last,
        SIZE,
        PADDING,
        ROWS,
        X_ROWS,
        X_STAGES,
        WEIGHT_STAGES,
    )
    if OVERLAPS:
        gdc_launch_dependents()
    # Once no warp group reads weights any more, their memory takes the results on their way out.
    mbarrier.arrive(done)
    mbarrier.wait(done, 0)
    staging = weights.index(part)
    for r in gl.static_range(ROWS):
        finish(
            other if r else acc,
            out,
            out_relu,
            partial,
            staging,
            group,
            batch,
            row + part * ROWS + r,
            column,
            channel,
            split,
            out_height,
            out_width,
            batches,
            C_OUT,
            BLOCK_N,
            SPLIT,
            RELU,
        )
    end(part)


@gluon.jit
def conv(
    x,  # a descriptor of (groups, B, H, W, Cin) with blocks (1, 1, BOX, 64, 64); float16 or bfloat16
    weight,  # a descriptor of (groups x taps, Cin, Cout) with blocks (1, 64, BLOCK_N)
    bias,  # (groups, Cout) or None
    residual,  # (groups, B, Ho, Wo, Cout) in any strides, the last one 1, or None
    out,  # a descriptor of (groups, B, Ho, Wo, Cout) with blocks (1, 1, 1, 64, BLOCK_N); likewise out_relu, if any
    out_relu,
    partial,  # (splits, groups, B, Ho, Wo, Cout) float32 contiguous: what is written instead of out when splits > 1; else None
    out_height,
    out_width,
    batches,
    splits,
    residual_group,  # strides in elements
    residual_batch,
    residual_row,
    residual_column,
    C_IN: gl.constexpr,
    C_OUT: gl.constexpr,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    RELU: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    SPLIT: gl.constexpr,  # whether splits > 1
    OVERLAPS: gl.constexpr,
):
    """Grid: (channel tiles x pixel tiles x splits, B, groups), the channel tiles of one pixel tile beside each other."""
    TILES_N: gl.constexpr = (C_OUT + BLOCK_N - 1) // BLOCK_N
    STEPS: gl.constexpr = SIZE * ((C_IN + DEPTH - 1) // DEPTH)
    X_ROWS: gl.constexpr = GROUPS * ROWS + SIZE - 1
    tiles_h, tiles_w = gl.cdiv(out_height, GROUPS * ROWS), gl.cdiv(out_width, PIXELS)
    pid, batch, group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    channel = pid % TILES_N * BLOCK_N
    tile = pid // TILES_N
    row, column = tile // tiles_w % tiles_h * (GROUPS * ROWS), tile % tiles_w * PIXELS
    split = tile // (tiles_h * tiles_w)
    first, last = split * STEPS // splits, (split + 1) * STEPS // splits

    BOX: gl.constexpr = x.block_shape[2]
    boxed: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_rows = gl.allocate_shared_memory(x.dtype, [X_STAGES * (X_ROWS // BOX), BOX, PIXELS, DEPTH], boxed)
    weights = gl.allocate_shared_memory(x.dtype, [WEIGHT_STAGES, DEPTH, BLOCK_N], swizzled)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(stage), count=1)
        mbarrier.init(x_empty.index(stage), count=GROUPS)
    for stage in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(weight_full.index(stage), count=1)
        mbarrier.init(weight_empty.index(stage), count=GROUPS)
    mbarrier.init(done, count=GROUPS)
    fence_async_shared()

    # fmt: off
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (work, (
                    0, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, done, bias, residual, out, out_relu,
                    partial, group, batch, row, column, channel, split, first, last, out_height, out_width, batches, residual_group,
                    residual_batch, residual_row, residual_column, C_OUT, SIZE, PADDING, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, SPLIT, RELU, OVERLAPS,
                )),
                (work, (
                    1, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, done, bias, residual, out, out_relu,
                    partial, group, batch, row, column, channel, split, first, last, out_height, out_width, batches, residual_group,
                    residual_batch, residual_row, residual_column, C_OUT, SIZE, PADDING, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, SPLIT, RELU, OVERLAPS,
                )),
                (work, (
                    2, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, done, bias, residual, out, out_relu,
                    partial, group, batch, row, column, channel, split, first, last, out_height, out_width, batches, residual_group,
                    residual_batch, residual_row, residual_column, C_OUT, SIZE, PADDING, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, SPLIT, RELU, OVERLAPS,
                )),
            ],
            [4, 4],
        )
    else:
        gl.warp_specialize(
            [
                (work, (
                    0, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, done, bias, residual, out, out_relu,
                    partial, group, batch, row, column, channel, split, first, last, out_height, out_width, batches, residual_group,
                    residual_batch, residual_row, residual_column, C_OUT, SIZE, PADDING, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, SPLIT, RELU, OVERLAPS,
                )),
                (work, (
                    1, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, done, bias, residual, out, out_relu,
                    partial, group, batch, row, column, channel, split, first, last, out_height, out_width, batches, residual_group,
                    residual_batch, residual_row, residual_column, C_OUT, SIZE, PADDING, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, SPLIT, RELU, OVERLAPS,
                )),
            ],
            [4],
        )
    # fmt: on
