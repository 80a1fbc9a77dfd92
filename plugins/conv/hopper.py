"""The Gluon kernel for sm 9.0: each row of x in shared memory serves all rows of the kernel, and products wait for no copies.

A program makes GROUPS x ROWS rows of 64 pixels by BLOCK_N channels of one image; each group of four warps has ROWS of these rows, whose
sums stay in its registers. In a step (64 channels of x by one column of the kernel) the copy engine fetches the rows of x that the tile
sees through this column, SIZE - 1 more than the tile has, and for each row of the kernel the weights. What lies outside the image is
zero by itself. Warp group 0 starts the copies; barriers in shared memory say what has come ("full") and what all have read ("empty").

Three groups are for the H200's registers: 64 x 256 sums of each, and no warp that only copies, which would take a fourth group's share.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg, misc"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import aggregate
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.kernel import tile_of

PIXELS = gl.constexpr(64)
DEPTH = gl.constexpr(64)


@aggregate
class Pipeline:
    """Descriptors of x and the weights, where they are copied to in shared memory, the barriers of each stage, and constants of `conv`;
    X_ROWS are the rows of x that a program sees in one step."""

    x: tma.tensor_descriptor
    weight: tma.tensor_descriptor
    x_rows: gl.shared_memory_descriptor
    weights: gl.shared_memory_descriptor
    x_full: gl.shared_memory_descriptor
    x_empty: gl.shared_memory_descriptor
    weight_full: gl.shared_memory_descriptor
    weight_empty: gl.shared_memory_descriptor
    SIZE: gl.constexpr
    PADDING: gl.constexpr
    BLOCK_N: gl.constexpr
    ROWS: gl.constexpr
    X_ROWS: gl.constexpr
    X_STAGES: gl.constexpr
    WEIGHT_STAGES: gl.constexpr


@aggregate
class Tile:
    """What a program makes: the first pixel and channel of its tile, and its steps, `first` to `last` - 1."""

    group: gl.tensor
    batch: gl.tensor
    row: gl.tensor
    column: gl.tensor
    channel: gl.tensor | gl.constexpr
    first: gl.tensor | gl.constexpr
    last: gl.tensor | gl.constexpr


@aggregate
class Epilogue:
    """What follows the sums; names are those of `conv`."""

    bias: gl.tensor | gl.constexpr
    residual: gl.tensor | gl.constexpr
    out: tma.tensor_descriptor | gl.constexpr
    out_relu: tma.tensor_descriptor | gl.constexpr
    partial: gl.tensor | gl.constexpr
    out_height: gl.tensor
    out_width: gl.tensor
    batches: gl.tensor
    residual_group: gl.tensor
    residual_batch: gl.tensor
    residual_row: gl.tensor
    residual_column: gl.tensor
    C_OUT: gl.constexpr
    SPLIT: gl.constexpr
    RELU: gl.constexpr


@gluon.jit
def pipeline(
    x,
    weight,
    SIZE: gl.constexpr,
    PADDING: gl.constexpr,
    BLOCK_N: gl.constexpr,
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
):
    """Shared memory and barriers for the copies. A fence must follow before the first."""
    X_ROWS: gl.constexpr = GROUPS * ROWS + SIZE - 1
    BOX: gl.constexpr = x.block_shape[2]
    boxed: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    p = Pipeline(
        x,
        weight,
        gl.allocate_shared_memory(x.dtype, [X_STAGES * (X_ROWS // BOX), BOX, PIXELS, DEPTH], boxed),
        gl.allocate_shared_memory(x.dtype, [WEIGHT_STAGES, DEPTH, BLOCK_N], swizzled),
        gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout()),
        SIZE,
        PADDING,
        BLOCK_N,
        ROWS,
        X_ROWS,
        X_STAGES,
        WEIGHT_STAGES,
    )
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(p.x_full.index(stage), count=1)
        mbarrier.init(p.x_empty.index(stage), count=GROUPS)
    for stage in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(p.weight_full.index(stage), count=1)
        mbarrier.init(p.weight_empty.index(stage), count=GROUPS)
    return p


@gluon.jit
def fetch_weights(p: Pipeline, tile: Tile, n, wanted):
    """Start copying the weights of the n-th product, if there are so many."""
    step, i = tile.first + n // p.SIZE, n % p.SIZE
    stage = n % p.WEIGHT_STAGES
    full = p.weight_full.index(stage)
    there = (step < tile.last) & wanted
    mbarrier.expect(full, p.weight.nbytes_per_cta, pred=there)
    place = [tile.group * (p.SIZE * p.SIZE) + i * p.SIZE + step % p.SIZE, step // p.SIZE * DEPTH, tile.channel]
    tma.async_load(p.weight, place, full, p.weights.index(stage), pred=there)


@gluon.jit
def fetch_x(p: Pipeline, tile: Tile, m, wanted):
    """Start copying the rows of x of the m-th step, if there are so many."""
    BOX: gl.constexpr = p.x.block_shape[2]
    step, stage = tile.first + m, m % p.X_STAGES
    full = p.x_full.index(stage)
    there = (step < tile.last) & wanted
    mbarrier.expect(full, p.X_ROWS // BOX * p.x.nbytes_per_cta, pred=there)
    for k in gl.static_range(p.X_ROWS // BOX):
        row, column = tile.row - p.PADDING + k * BOX, tile.column - p.PADDING + step % p.SIZE
        place = [tile.group, tile.batch, row, column, step // p.SIZE * DEPTH]
        tma.async_load(p.x, place, full, p.x_rows.index(stage * (p.X_ROWS // BOX) + k), pred=there)


@gluon.jit
def fetch_first(p: Pipeline, tile: Tile, OVERLAPS: gl.constexpr):
    """Fill all buffers. Weights do not depend on the kernel before this one: they are fetched before it ends."""
    for k in gl.static_range(p.WEIGHT_STAGES):
        fetch_weights(p, tile, k, True)
    if OVERLAPS:
        gdc_wait()
    for k in gl.static_range(p.X_STAGES):
        fetch_x(p, tile, k, True)


@gluon.jit
def sums(bias, tile: Tile, C_OUT: gl.constexpr, BLOCK_N: gl.constexpr):
    """What the sums of one row of pixels start from: (64, BLOCK_N) in float32, the bias if there is one."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    acc = gl.zeros((PIXELS, BLOCK_N), gl.float32, layout)
    if bias is not None:
        n = tile.channel + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        acc += gl.load(bias + tile.group * C_OUT + n, mask=n < C_OUT, other=0.0).to(gl.float32)[None, :]
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
    p: Pipeline,
    tile: Tile,
):
    """Add all products to the sums of warp group `part`.

    Warp group 0 also starts the copies: what a product frees is filled again two products later, so that it seldom waits for others.
    """
    BOX: gl.constexpr = p.x.block_shape[2]
    for step in range(tile.first, tile.last):
        m = step - tile.first
        x_stage = m % p.X_STAGES
        mbarrier.wait(p.x_full.index(x_stage), m // p.X_STAGES & 1)
        for i in gl.static_range(p.SIZE):
            n = m * p.SIZE + i
            stage = n % p.WEIGHT_STAGES
            mbarrier.wait(p.weight_full.index(stage), n // p.WEIGHT_STAGES & 1)
            box = x_stage * (p.X_ROWS // BOX)
            acc = warpgroup_mma(pixels_of(p.x_rows, box, part * p.ROWS + i), p.weights.index(stage), acc, is_async=True)
            if p.ROWS == 2:
                other = warpgroup_mma(pixels_of(p.x_rows, box, part * p.ROWS + i + 1), p.weights.index(stage), other, is_async=True)
                acc, other = warpgroup_mma_wait(2, deps=[acc, other])
            else:
                acc = warpgroup_mma_wait(1, deps=[acc])
            # Now the products before these are done, and what they read is free.
            mbarrier.arrive(p.weight_empty.index((n + p.WEIGHT_STAGES - 1) % p.WEIGHT_STAGES), pred=n > 0)
            if i == 0:
                mbarrier.arrive(p.x_empty.index((m + p.X_STAGES - 1) % p.X_STAGES), pred=m > 0)
            if part == 0:
                freed = n - 2
                empty = p.weight_empty.index((freed + p.WEIGHT_STAGES) % p.WEIGHT_STAGES)
                mbarrier.wait(empty, freed // p.WEIGHT_STAGES & 1, pred=freed >= 0)
                fetch_weights(p, tile, freed + p.WEIGHT_STAGES, freed >= 0)
                if i == p.SIZE // 2:
                    mbarrier.wait(p.x_empty.index((m - 1 + p.X_STAGES) % p.X_STAGES), (m - 1) // p.X_STAGES & 1, pred=m > 0)
                    fetch_x(p, tile, m - 1 + p.X_STAGES, m > 0)
    if p.ROWS == 2:
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
def inside(acc, row, tile: Tile, e: Epilogue):
    """Columns and channels of the sums of one row of pixels, and which of them are in the image."""
    columns = tile.column + gl.arange(0, PIXELS, gl.SliceLayout(1, acc.type.layout))
    n = tile.channel + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    return columns, n, ((columns < e.out_width) & (row < e.out_height))[:, None] & (n < e.C_OUT)[None, :]


@gluon.jit
def with_residual(acc, row, tile: Tile, e: Epilogue):
    """The sums of one row of pixels and the residual."""
    columns, n, mask = inside(acc, row, tile, e)
    residual = e.residual + (tile.group.to(gl.int64) * e.residual_group + tile.batch.to(gl.int64) * e.residual_batch + row * e.residual_row)
    return acc + gl.load(residual + (columns * e.residual_column)[:, None] + n[None, :], mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def finish(
    acc,  # of one row of pixels
    staging,  # (64, BLOCK_N) in shared memory, of out's type
    row,
    split,
    tile: Tile,
    e: Epilogue,
):
    """The activation and the stores."""
    if e.SPLIT:
        columns, n, mask = inside(acc, row, tile, e)
        image = (split * gl.num_programs(2) + tile.group) * e.batches + tile.batch
        partial = e.partial + image.to(gl.int64) * e.out_height * e.out_width * e.C_OUT
        gl.store(partial + ((row * e.out_width + columns) * e.C_OUT)[:, None] + n[None, :], acc, mask=mask)
    else:
        if e.RELU:
            acc = gl.maximum(acc, 0.0)
        place = [tile.group, tile.batch, row, tile.column, tile.channel]
        staging.store(acc.to(e.out.dtype))
        fence_async_shared()
        tma.async_store(e.out, place, staging)
        tma.store_wait(0)
        if e.out_relu is not None:
            staging.store(gl.maximum(acc, 0.0).to(e.out_relu.dtype))
            fence_async_shared()
            tma.async_store(e.out_relu, place, staging)
            tma.store_wait(0)


@gluon.jit
def work(part: gl.constexpr, p: Pipeline, done, tile: Tile, split, e: Epilogue, OVERLAPS: gl.constexpr):
    """A warp group."""
    if part == 0:
        fetch_first(p, tile, OVERLAPS)
    elif OVERLAPS:
        gdc_wait()
    # Bias and residual come first: while they are fetched, so is what the first products take.
    row = tile.row + part * p.ROWS
    acc = sums(e.bias, tile, e.C_OUT, p.BLOCK_N)
    other = sums(e.bias, tile, e.C_OUT, p.BLOCK_N) if p.ROWS == 2 else acc
    if e.residual is not None:
        acc = with_residual(acc, row, tile, e)
        if p.ROWS == 2:
            other = with_residual(other, row + 1, tile, e)
    acc, other = multiply(part, acc, other, p, tile)
    if OVERLAPS:
        gdc_launch_dependents()
    # Once no warp group reads weights any more, their memory takes the results on their way out.
    mbarrier.arrive(done)
    mbarrier.wait(done, 0)
    staging = p.weights.index(part)
    for r in gl.static_range(p.ROWS):
        finish(other if r else acc, staging, row + r, split, tile, e)
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
    tiles_h, tiles_w = gl.cdiv(out_height, GROUPS * ROWS), gl.cdiv(out_width, PIXELS)
    pid, batch, group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    channel = pid % TILES_N * BLOCK_N
    row, column = tile_of(pid // TILES_N, tiles_h, tiles_w, GROUPS * ROWS, PIXELS)
    split = pid // TILES_N // (tiles_h * tiles_w)
    first, last = split * STEPS // splits, (split + 1) * STEPS // splits

    tile = Tile(group, batch, row, column, channel, first, last)
    e = Epilogue(
        bias, residual, out, out_relu, partial, out_height, out_width, batches,
        residual_group, residual_batch, residual_row, residual_column, C_OUT, SPLIT, RELU,
    )  # fmt: skip

    p = pipeline(x, weight, SIZE, PADDING, BLOCK_N, GROUPS, ROWS, X_STAGES, WEIGHT_STAGES)
    done = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(done, count=GROUPS)
    fence_async_shared()
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (work, (0, p, done, tile, split, e, OVERLAPS)),
                (work, (1, p, done, tile, split, e, OVERLAPS)),
                (work, (2, p, done, tile, split, e, OVERLAPS)),
            ],
            [4, 4],
        )
    else:
        gl.warp_specialize([(work, (0, p, done, tile, split, e, OVERLAPS)), (work, (1, p, done, tile, split, e, OVERLAPS))], [4])
