"""The Triton kernel: one program makes a tile (BLOCK_M, BLOCK_N) of one group's output, going once over k, BLOCK_K at a time.

It runs on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.

Operands come by the tensor memory accelerator (TMA, sm 9.0 and newer), which fills in zeros beyond their ends, or by pointers, whose
rows and columns beyond the end repeat the last ones: what is made of them is never stored.
"""

# ruff: noqa: N803, N806, SIM102  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_of_program(program, m, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SWATH: tl.constexpr):
    """Row and column of a program's tile. Programs go down SWATH tiles, then one to the right, so that those that run at
    the same time share rows of a and columns of weight in the second-level cache."""
    tiles_m = tl.cdiv(m, BLOCK_M)
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    swath = program // (SWATH * tiles_n)
    height = tl.minimum(tiles_m - swath * SWATH, SWATH)
    within = program % (SWATH * tiles_n)
    return swath * SWATH + within % height, within // height


@triton.jit
def gelu(x, EXACT: tl.constexpr):
    """Finite x times the normal distribution's integral Phi, by erf if EXACT. Else as max(x, 0) - |x| Phi(-|x|), in eight instructions
    and with an error below 7e-7: log2(Phi(-|x|)) is a polynomial in |x|, fitted up to |x| = 6 for the least largest error of
    |x| Phi(-|x|). It falls on beyond, where both go to 0.
    """
    if EXACT:
        return x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    a = tl.abs(x)
    p = a * -0.000473294075551638 + 0.007084461740958913
    p = p * a - 0.05182717036466858
    p = p * a - 0.45999264285471825
    p = p * a - 1.1507877714660155
    p = p * a - 1.0000376320984292
    return tl.maximum(x, 0.0) - a * tl.exp2(p)


@triton.jit
def rotate(x, first_row, first_column, cos, sin, tokens, COLUMNS: tl.constexpr, HALF: tl.constexpr):
    """The tile x at (first_row, first_column) with the pairs of its columns below COLUMNS rotated."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    x1, x2 = tl.split(x.reshape(ROWS, PAIRS, 2))
    pairs = first_column // 2 + tl.arange(0, PAIRS)[None, :]
    rows = (first_row + tl.arange(0, ROWS)[:, None]) % tokens
    places = rows * HALF + pairs % HALF
    c = tl.load(cos + places, mask=pairs < COLUMNS // 2, other=1.0).to(tl.float32)
    s = tl.load(sin + places, mask=pairs < COLUMNS // 2, other=0.0).to(tl.float32)
    return tl.join(x1 * c - x2 * s, x1 * s + x2 * c).reshape(ROWS, 2 * PAIRS)


@triton.jit
def epilogue(
    x, group, first_row, first_column, m, bias, cos, sin, tokens, residual, r_row, r_group, out, out_relu, out_row, out_group, width,
    N: tl.constexpr, ROTARY: tl.constexpr, HALF: tl.constexpr, ACTIVATION: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """From the sums x, float32, of the tile at (first_row, first_column) to the stored outputs; bias (BLOCK_N,) is float32."""
    rows = first_row + tl.arange(0, x.shape[0])[:, None]
    columns = first_column + tl.arange(0, x.shape[1])[None, :]
    inside = (rows < m) & (columns < N)
    if bias is not None:
        x += bias[None, :]
    if cos is not None:
        if first_column < ROTARY:
            x = rotate(x, first_row, first_column, cos, sin, tokens, ROTARY, HALF)
    if ACTIVATION == "gelu":
        x = gelu(x, out.dtype.element_ty == tl.float32)
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    if SCALE > 0:
        CHANNELS: tl.constexpr = N // (SCALE * SCALE)
        down, right, columns = columns // (SCALE * CHANNELS), columns // CHANNELS % SCALE, columns % CHANNELS
        rows = ((rows // width * SCALE + down) * width + rows % width) * SCALE + right
    rows = rows.to(tl.int64)
    if residual is not None:
        x += tl.load(residual + group.to(tl.int64) * r_group + (rows * r_row + columns), mask=inside, other=0.0).to(tl.float32)
    places = group.to(tl.int64) * out_group + (rows * out_row + columns)
    tl.store(out + places, x.to(out.dtype.element_ty), mask=inside)
    if out_relu is not None:
        tl.store(out_relu + places, tl.maximum(x, 0.0).to(out_relu.dtype.element_ty), mask=inside)


@triton.jit
def gemm(
    a,  # rows of k elements; a descriptor (groups, m, k) of blocks (1, BLOCK_M, BLOCK_K) if TMA
    weight,  # (groups or 1, k, n) contiguous; a descriptor of blocks (1, BLOCK_K, BLOCK_N) if TMA
    bias,  # (groups or 1, n); None without
    cos,  # (tokens, half); None without, and so sin
    sin,
    residual,  # None without
    out,
    out_relu,  # None without
    m,
    a_row,  # strides in elements
    a_group,
    r_row,
    r_group,
    out_row,
    out_group,
    tokens,
    width,  # of the images whose pixels are rows; for SCALE > 0
    N: tl.constexpr,
    K: tl.constexpr,
    A_ORDER: tl.constexpr,  # with TMA: 1 where the descriptor's groups are in order, -1 in reverse, 0 where it has but one
    W_SHARED: tl.constexpr,
    BIAS_SHARED: tl.constexpr,
    ROTARY: tl.constexpr,  # columns
    HALF: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALE: tl.constexpr,  # of the scatter; 0 without
    PRECISION: tl.constexpr,  # of products of float32 operands
    TMA: tl.constexpr,
    OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWATH: tl.constexpr,
):
    """Grid: (tiles of a group, groups, 1)."""
    group = tl.program_id(1)
    tile_m, tile_n = tile_of_program(tl.program_id(0), m, N, BLOCK_M, BLOCK_N, SWATH)
    first_row, first_column = tile_m * BLOCK_M, tile_n * BLOCK_N
    w_group = 0 if W_SHARED else group
    if bias is not None:
        # Here, and not where it is added: it comes from far away.
        columns = first_column + tl.arange(0, BLOCK_N)
        if not BIAS_SHARED:
            bias += group * N
        bias = tl.load(bias + columns, mask=columns < N, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if TMA:
        if A_ORDER == 0:
            a_index = 0
        elif A_ORDER == 1:
            a_index = group
        else:
            a_index = tl.num_programs(1) - 1 - group
        for start in range(0, K, BLOCK_K):
            a_tile = a.load([a_index, first_row, start]).reshape(BLOCK_M, BLOCK_K)
            w_tile = weight.load([w_group, start, first_column]).reshape(BLOCK_K, BLOCK_N)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
    else:
        rows = tl.minimum(first_row + tl.arange(0, BLOCK_M), m - 1)
        columns = tl.minimum(first_column + tl.arange(0, BLOCK_N), N - 1)
        if N % BLOCK_N == 0:
            columns = first_column + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        a_tiles = a + group.to(tl.int64) * a_group + rows.to(tl.int64)[:, None] * a_row + inner[None, :]
        w_tiles = weight + tl.cast(w_group, tl.int64) * (K * N) + (inner[:, None] * N + columns[None, :])
        for start in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                a_tile = tl.load(a_tiles)
                w_tile = tl.load(w_tiles)
            else:
                a_tile = tl.load(a_tiles, mask=inner[None, :] < K - start, other=0.0)
                w_tile = tl.load(w_tiles, mask=inner[:, None] < K - start, other=0.0)
            acc = tl.dot(a_tile, w_tile, acc, input_precision=PRECISION)
            a_tiles += BLOCK_K
            w_tiles += BLOCK_K * N
    epilogue(
        acc, group, first_row, first_column, m, bias, cos, sin, tokens, residual, r_row, r_group, out, out_relu, out_row, out_group, width,
        N, ROTARY, HALF, ACTIVATION, SCALE,
    )  # fmt: skip
