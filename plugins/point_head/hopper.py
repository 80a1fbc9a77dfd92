"""The Gluon kernel for sm 9.0: the main loop of smc.plugins.conv.hopper over all output channels at once."""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.hopper import DEPTH, PIXELS, end, fetch_first, multiply, sums


@gluon.jit
def points(
    acc,  # of one row of pixels, with the bias
    weight_out,  # (BLOCK_N, 16) in shared memory
    bias_out,
    pts3d,  # of one group
    conf,
    group,
    batch,
    row,
    column,
    height,
    width,
    NORM_FLOOR: gl.constexpr,
    CONF_FLOOR: gl.constexpr,
):
    """From sums to points and confidences, and the stores."""
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 16, 16])
    h = gl.convert_layout(gl.maximum(acc, 0.0).to(weight_out.dtype), gl.DotOperandLayout(0, narrow, 2))
    y = warpgroup_mma(h, weight_out, gl.zeros((PIXELS, 16), gl.float32, narrow))
    k = gl.arange(0, 16, gl.SliceLayout(0, narrow))
    y += gl.load(bias_out + group * 4 + k, mask=k < 4, other=0.0).to(gl.float32)[None, :]
    norm = gl.sqrt(gl.sum(gl.where((k < 3)[None, :], y * y, 0.0), 1))
    stretch = (gl.exp(norm) - 1.0) / gl.maximum(norm, NORM_FLOOR)
    columns = column + gl.arange(0, PIXELS, gl.SliceLayout(1, narrow))
    pixel = (batch * height + row) * width + columns
    inside = ((columns < width) & (row < height))[:, None]
    gl.store(pts3d + (pixel * 3)[:, None] + k[None, :], y * stretch[:, None], mask=inside & (k < 3)[None, :])
    gl.store(conf + pixel[:, None] + (k - 3)[None, :], CONF_FLOOR + gl.exp(y), mask=inside & (k == 3)[None, :])


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
    bias,
    last_weight,
    bias_out,
    pts3d,
    conf,
    group,
    batch,
    row,
    column,
    height,
    width,
    C_OUT: gl.constexpr,
    STEPS: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    ROWS: gl.constexpr,
    X_ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    NORM_FLOOR: gl.constexpr,
    CONF_FLOOR: gl.constexpr,
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
            0,
            0,
            STEPS,
            SIZE,
            SIZE // 2,
            X_ROWS,
            X_STAGES,
            WEIGHT_STAGES,
            OVERLAPS,
        )
    elif OVERLAPS:
        gdc_wait()
    acc = sums(bias, group, 0, C_OUT, BLOCK_N)
    other = sums(bias, group, 0, C_OUT, BLOCK_N) if ROWS == 2 else acc
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
        0,
        0,
        STEPS,
        SIZE,
        SIZE // 2,
        ROWS,
        X_ROWS,
        X_STAGES,
        WEIGHT_STAGES,
    )
    if OVERLAPS:
        gdc_launch_dependents()
    row += part * ROWS
    points(acc, last_weight, bias_out, pts3d, conf, group, batch, row, column, height, width, NORM_FLOOR, CONF_FLOOR)
    if ROWS == 2:
        row += 1
        points(other, last_weight, bias_out, pts3d, conf, group, batch, row, column, height, width, NORM_FLOOR, CONF_FLOOR)
    end(part)


@gluon.jit
def point_head(
    x,  # a descriptor of (groups, B, H, W, Cin) with blocks (1, 1, BOX, 64, 64); float16 or bfloat16
    weight,  # a descriptor of (groups x taps, Cin, C) with blocks (1, 64, BLOCK_N)
    bias,  # (groups, C)
    weight_out,  # (groups, C, 4)
    bias_out,  # (groups, 4)
    pts3d,  # (B, H, W, 3) float32 for each group
    conf,  # (B, H, W) float32 for each group
    height,
    width,
    pts3d_group,  # in elements
    conf_group,
    C_IN: gl.constexpr,
    C_OUT: gl.constexpr,
    SIZE: gl.constexpr,
    BLOCK_N: gl.constexpr,  # C or more
    GROUPS: gl.constexpr,
    ROWS: gl.constexpr,
    X_STAGES: gl.constexpr,
    WEIGHT_STAGES: gl.constexpr,
    NORM_FLOOR: gl.constexpr,
    CONF_FLOOR: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """Grid: (pixel tiles, B, groups)."""
    STEPS: gl.constexpr = SIZE * ((C_IN + DEPTH - 1) // DEPTH)
    X_ROWS: gl.constexpr = GROUPS * ROWS + SIZE - 1
    tiles_w = gl.cdiv(width, PIXELS)
    pid, batch, group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    row, column = pid // tiles_w * (GROUPS * ROWS), pid % tiles_w * PIXELS
    pts3d += group.to(gl.int64) * pts3d_group
    conf += group.to(gl.int64) * conf_group

    BOX: gl.constexpr = x.block_shape[2]
    boxed: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    x_rows = gl.allocate_shared_memory(x.dtype, [X_STAGES * (X_ROWS // BOX), BOX, PIXELS, DEPTH], boxed)
    weights = gl.allocate_shared_memory(x.dtype, [WEIGHT_STAGES, DEPTH, BLOCK_N], swizzled)
    x_full = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    x_empty = gl.allocate_shared_memory(gl.int64, [X_STAGES, 1], mbarrier.MBarrierLayout())
    weight_full = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    weight_empty = gl.allocate_shared_memory(gl.int64, [WEIGHT_STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(X_STAGES):
        mbarrier.init(x_full.index(stage), count=1)
        mbarrier.init(x_empty.index(stage), count=GROUPS)
    for stage in gl.static_range(WEIGHT_STAGES):
        mbarrier.init(weight_full.index(stage), count=1)
        mbarrier.init(weight_empty.index(stage), count=GROUPS)

    # The fewest columns that tensor cores take here are 16; four are real.
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, rows))
    k = gl.arange(0, 16, gl.SliceLayout(0, rows))
    places = (group * C_OUT + n)[:, None] * 4 + k[None, :]
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    last_weight = gl.allocate_shared_memory(x.dtype, [BLOCK_N, 16], wide)
    last_weight.store(gl.load(weight_out + places, mask=(n < C_OUT)[:, None] & (k < 4)[None, :], other=0.0))
    fence_async_shared()

    # fmt: off
    if GROUPS == 3:
        gl.warp_specialize(
            [
                (work, (
                    0, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, bias, last_weight, bias_out, pts3d,
                    conf, group, batch, row, column, height, width, C_OUT, STEPS, SIZE, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, NORM_FLOOR, CONF_FLOOR, OVERLAPS,
                )),
                (work, (
                    1, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, bias, last_weight, bias_out, pts3d,
                    conf, group, batch, row, column, height, width, C_OUT, STEPS, SIZE, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, NORM_FLOOR, CONF_FLOOR, OVERLAPS,
                )),
                (work, (
                    2, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, bias, last_weight, bias_out, pts3d,
                    conf, group, batch, row, column, height, width, C_OUT, STEPS, SIZE, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, NORM_FLOOR, CONF_FLOOR, OVERLAPS,
                )),
            ],
            [4, 4],
        )
    else:
        gl.warp_specialize(
            [
                (work, (
                    0, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, bias, last_weight, bias_out, pts3d,
                    conf, group, batch, row, column, height, width, C_OUT, STEPS, SIZE, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, NORM_FLOOR, CONF_FLOOR, OVERLAPS,
                )),
                (work, (
                    1, x, weight, x_rows, weights, x_full, x_empty, weight_full, weight_empty, bias, last_weight, bias_out, pts3d,
                    conf, group, batch, row, column, height, width, C_OUT, STEPS, SIZE, BLOCK_N, ROWS, X_ROWS, X_STAGES,
                    WEIGHT_STAGES, NORM_FLOOR, CONF_FLOOR, OVERLAPS,
                )),
            ],
            [4],
        )
    # fmt: on
