"""The Gluon kernel for sm 9.0: the main loop of smc.plugins.conv.hopper over all output channels at once."""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.conv.hopper import DEPTH, PIXELS, Pipeline, Tile, end, fetch_first, multiply, pipeline, sums


@gluon.jit
def points(
    acc,  # of one row of pixels, with the bias
    weight_out,  # (BLOCK_N, 16) in shared memory
    bias_out,
    pts3d,  # of one group
    conf,
    row,
    tile: Tile,
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
    y += gl.load(bias_out + tile.group * 4 + k, mask=k < 4, other=0.0).to(gl.float32)[None, :]
    norm = gl.sqrt(gl.sum(gl.where((k < 3)[None, :], y * y, 0.0), 1))
    stretch = (gl.exp(norm) - 1.0) / gl.maximum(norm, NORM_FLOOR)
    columns = tile.column + gl.arange(0, PIXELS, gl.SliceLayout(1, narrow))
    pixel = (tile.batch * height + row) * width + columns
    inside = ((columns < width) & (row < height))[:, None]
    gl.store(pts3d + (pixel * 3)[:, None] + k[None, :], y * stretch[:, None], mask=inside & (k < 3)[None, :])
    gl.store(conf + pixel[:, None] + (k - 3)[None, :], CONF_FLOOR + gl.exp(y), mask=inside & (k == 3)[None, :])


@gluon.jit
def work(
    part: gl.constexpr,
    p: Pipeline,
    tile: Tile,
    bias,
    last_weight,
    bias_out,
    pts3d,
    conf,
    height,
    width,
    C_OUT: gl.constexpr,
    NORM_FLOOR: gl.constexpr,
    CONF_FLOOR: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """A warp group."""
    if part == 0:
        fetch_first(p, tile, OVERLAPS)
    elif OVERLAPS:
        gdc_wait()
    acc = sums(bias, tile, C_OUT, p.BLOCK_N)
    other = sums(bias, tile, C_OUT, p.BLOCK_N) if p.ROWS == 2 else acc
    acc, other = multiply(part, acc, other, p, tile)
    if OVERLAPS:
        gdc_launch_dependents()
    row = tile.row + part * p.ROWS
    for r in gl.static_range(p.ROWS):
        points(other if r else acc, last_weight, bias_out, pts3d, conf, row + r, tile, height, width, NORM_FLOOR, CONF_FLOOR)
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
    pid, batch, group = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    tiles_w = gl.cdiv(width, PIXELS)
    tile = Tile(group, batch, pid // tiles_w * (GROUPS * ROWS), pid % tiles_w * PIXELS, 0, 0, STEPS)
    pts3d += group.to(gl.int64) * pts3d_group
    conf += group.to(gl.int64) * conf_group
    p = pipeline(x, weight, SIZE, SIZE // 2, BLOCK_N, GROUPS, ROWS, X_STAGES, WEIGHT_STAGES)

    # The fewest columns that tensor cores take here are 16; four are real.
    rows: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, rows))
    k = gl.arange(0, 16, gl.SliceLayout(0, rows))
    places = (group * C_OUT + n)[:, None] * 4 + k[None, :]
    wide: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=32, element_bitwidth=16, rank=2)
    last_weight = gl.allocate_shared_memory(x.dtype, [BLOCK_N, 16], wide)
    last_weight.store(gl.load(weight_out + places, mask=(n < C_OUT)[:, None] & (k < 4)[None, :], other=0.0))
    fence_async_shared()

    if GROUPS == 3:
        gl.warp_specialize(
            [
                (work, (0, p, tile, bias, last_weight, bias_out, pts3d, conf, height, width, C_OUT, NORM_FLOOR, CONF_FLOOR, OVERLAPS)),
                (work, (1, p, tile, bias, last_weight, bias_out, pts3d, conf, height, width, C_OUT, NORM_FLOOR, CONF_FLOOR, OVERLAPS)),
                (work, (2, p, tile, bias, last_weight, bias_out, pts3d, conf, height, width, C_OUT, NORM_FLOOR, CONF_FLOOR, OVERLAPS)),
            ],
            [4, 4],
        )
    else:
        gl.warp_specialize(
            [
                (work, (0, p, tile, bias, last_weight, bias_out, pts3d, conf, height, width, C_OUT, NORM_FLOOR, CONF_FLOOR, OVERLAPS)),
                (work, (1, p, tile, bias, last_weight, bias_out, pts3d, conf, height, width, C_OUT, NORM_FLOOR, CONF_FLOOR, OVERLAPS)),
            ],
            [4],
        )
