"""The Triton kernel: FlashAttention-2's tiling and online softmax (Dao, 2023, algorithm 1), with the rotation of q and k fused in.

It runs on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.

One program makes BLOCK_M rows of one head's output. It goes once over the keys and values, BLOCK_N at a time, and keeps for each
row the running maximum, the running sum and the weighted sum of values, all float32. The exponentials are powers of two, which
is what the hardware has. Only the last, partial tile of keys is masked.
"""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tile:
    """How the work is cut: query rows a program, keys a step, warps a program, buffers for keys and values, and the most
    registers a thread, which is what decides how many programs a multiprocessor holds (None: the compiler's choice)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    registers: int | None = None


TILES = (
    Tile(64, 128, num_warps=4, num_stages=2, registers=168),
    Tile(64, 64, num_warps=4, num_stages=3),
    Tile(64, 64, num_warps=4, num_stages=2),
    Tile(128, 64, num_warps=8, num_stages=3),
    Tile(64, 32, num_warps=4, num_stages=3),
)
"""Worth timing. On the H200, at head size 64 and 768 tokens, the first is the fastest, with rotation by float16 tables the second,
and by float32 tables the last (benchmarks/results/flash_attention_h200.md)."""


@triton.jit
def _load(base, row_stride, count, ROWS: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr):
    """The tile (ROWS, COLUMNS) at `base`; with MASKED, rows from `count` on read as zeros."""
    rows = tl.arange(0, ROWS)[:, None]
    pointers = base + (rows * row_stride + tl.arange(0, COLUMNS)[None, :])
    if MASKED:
        return tl.load(pointers, mask=rows < count, other=0.0)
    return tl.load(pointers)


@triton.jit
def _load_rotated(base, row_stride, cos, sin, count, ROWS: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """The tile (ROWS, D) at `base`, rotated in float32 by the tables' rows at `cos` and `sin` if there are any.

    The rotated halves come back interleaved. q and k are so alike, which leaves their products as they are, and it is free:
    the two halves of a pair are in one thread.
    """
    if cos is None:
        tile = _load(base, row_stride, count, ROWS, D, MASKED)
    else:
        x1 = _load(base, row_stride, count, ROWS, D // 2, MASKED).to(tl.float32)
        x2 = _load(base + D // 2, row_stride, count, ROWS, D // 2, MASKED).to(tl.float32)
        c = _load(cos, D // 2, count, ROWS, D // 2, MASKED).to(tl.float32)
        s = _load(sin, D // 2, count, ROWS, D // 2, MASKED).to(tl.float32)
        tile = tl.join(x1 * c - x2 * s, x1 * s + x2 * c).reshape((ROWS, D)).to(base.dtype.element_ty)
    return tile


@triton.jit
def _step(acc, total, peak, q, k, k_row, v, v_row, cos_k, sin_k, left, SCALE, D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED):
    """One tile of keys and values into the running sums; `left` keys are left with it, `peak` is in units of log2."""
    # Of float32 operands as well as float32 allows on matrix units: each is three TensorFloat-32 numbers.
    precision: tl.constexpr = "tf32x3" if q.dtype == tl.float32 else "tf32"
    keys = _load_rotated(k, k_row, cos_k, sin_k, left, BLOCK_N, D, MASKED)
    scores = tl.dot(q, tl.trans(keys), input_precision=precision)
    if MASKED:
        scores = tl.where(tl.arange(0, BLOCK_N)[None, :] < left, scores, float("-inf"))
    values = _load(v, v_row, left, BLOCK_N, D, MASKED)
    higher = tl.maximum(peak, tl.max(scores, 1) * SCALE)
    weights = tl.exp2(scores * SCALE - higher[:, None])
    rescale = tl.exp2(peak - higher)
    total = total * rescale + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * rescale[:, None], input_precision=precision)
    return acc, total, higher


@triton.jit
def flash_attention(
    q,  # (B, N, H, D) in any strides, the last one 1; float16, bfloat16 or float32
    k,  # (B, M, H, D), likewise
    v,  # (B, M, H, D), likewise
    cos_q,  # (N, D/2) contiguous, float32 or float16; None without rotation, and so the next three
    sin_q,
    cos_k,  # (M, D/2)
    sin_k,
    n,
    m,
    q_batch,  # strides in elements
    q_row,
    q_head,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    out_batch,
    out_row,
    out_head,
    out,  # (B, N, H, D), strided likewise, q's type
    SCALE: tl.constexpr,  # log2(e) times the scores' scale
    D: tl.constexpr,
    Q_OFFSET: tl.constexpr,  # elements from the pointer to head 0's first, and so the next two
    K_OFFSET: tl.constexpr,
    V_OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    OVERLAPS: tl.constexpr = False,  # programmatic dependent launch, sm 9.0 and newer
    KV_SHIFT: tl.constexpr = 0,  # image b reads the keys and values of image (b + KV_SHIFT) % B
):
    """Grid: (ceil(N / BLOCK_M), H, B). The inputs come first and the output last because TensorRT passes them so."""
    first_row = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    q += Q_OFFSET + batch * q_batch + head * q_head + first_row * q_row
    other = (batch + KV_SHIFT) % tl.num_programs(2)
    k += K_OFFSET + other * k_batch + head * k_head
    v += V_OFFSET + other * v_batch + head * v_head
    out += batch * out_batch + head * out_head + first_row * out_row
    if cos_q is not None:
        cos_q += first_row * (D // 2)
        sin_q += first_row * (D // 2)

    if OVERLAPS:
        gdc_wait()
    queries = _load_rotated(q, q_row, cos_q, sin_q, n - first_row, BLOCK_M, D, True)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    for start in range(0, m // BLOCK_N * BLOCK_N, BLOCK_N):
        acc, total, peak = _step(acc, total, peak, queries, k, k_row, v, v_row, cos_k, sin_k, m - start, SCALE, D, BLOCK_N, False)
        k += BLOCK_N * k_row
        v += BLOCK_N * v_row
        if cos_k is not None:
            cos_k += BLOCK_N * (D // 2)
            sin_k += BLOCK_N * (D // 2)
    left = m % BLOCK_N
    if left > 0:
        acc, total, peak = _step(acc, total, peak, queries, k, k_row, v, v_row, cos_k, sin_k, left, SCALE, D, BLOCK_N, True)

    if OVERLAPS:
        gdc_launch_dependents()
    normalizer = 1.0 / total  # one division a row, not one an element
    rows = tl.arange(0, BLOCK_M)[:, None]
    pointers = out + (rows * out_row + tl.arange(0, D)[None, :])
    tl.store(pointers, (acc * normalizer[:, None]).to(queries.dtype), mask=rows < n - first_row)


def attend(q: Any, k: Any, v: Any, out: Any, scale: float, tile: Tile, tables: tuple[Any, Any, Any, Any] = (None,) * 4) -> None:
    """Launch the kernel on torch tensors of one GPU, or under Triton's interpreter on the CPU.

    Args:
        q: (B, N, H, D), k, v: (B, M, H, D), in any strides but a last one of 1; float16, bfloat16 or float32.
        out: (B, N, H * D) contiguous, q's type; written whole.
        scale: of the scores, positive.
        tables: cos_q, sin_q (N, D/2), cos_k, sin_k (M, D/2), contiguous float32 or float16; or all None.
    """
    batch, n, heads, head_size = q.shape
    flash_attention[(triton.cdiv(n, tile.block_m), heads, batch)](
        q,
        k,
        v,
        *tables,
        n,
        k.shape[1],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        out.stride(0),
        out.stride(1),
        head_size,
        out,
        SCALE=scale * LOG2_E,
        D=head_size,
        Q_OFFSET=0,
        K_OFFSET=0,
        V_OFFSET=0,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        maxnreg=tile.registers,
    )
