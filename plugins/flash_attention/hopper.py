"""The same operation for sm 9.0, in Gluon, without rotation: one warp brings tiles, groups of four warps have 64 rows of queries each.

All groups of a program work on the same keys and values, which are brought from the second-level cache once for all of them, ahead of
their use. 768 rows of 32 heads are 128 programs of three groups: one for each of the H200's 132 multiprocessors.

Groups take turns at the matrix units: a group that has issued its two products of a step gives the turn to the next one, and weighs its
scores while the others multiply. Without turns all come to weigh at the same time: 12.7 us instead of 11.8. Smaller tiles of keys,
two groups, a part of the exponentials by polynomials, and leaving out rescaling by little were no faster.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import aggregate
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

ROWS = gl.constexpr(64)


@aggregate
class Shared:
    """Shared memory: tiles, and the barriers that say which are full, which are free, and whose turn it is. q is where outputs are
    staged at the end."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_free: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_free: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


@gluon.jit
def _produce(
    q,
    k,
    v,
    m,
    w: Shared,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    KV_SHIFT: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    head, batch = gl.program_id(1), gl.program_id(2)
    other = (batch + KV_SHIFT) % gl.num_programs(2)
    first_row = gl.program_id(0) * (CONSUMERS * ROWS)
    D: gl.constexpr = w.q.shape[2]
    BYTES: gl.constexpr = BLOCK_N * D * 2
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    mbarrier.expect(w.q_full, CONSUMERS * ROWS * D * 2)
    for consumer in gl.static_range(CONSUMERS):
        tma.async_load(q, [batch, head, first_row + consumer * ROWS, 0], w.q_full, w.q.index(consumer))
    for step in range(gl.cdiv(m, BLOCK_N)):
        stage = step % STAGES
        phase = (step // STAGES & 1) ^ 1
        mbarrier.wait(w.k_free.index(stage), phase)
        mbarrier.expect(w.k_full.index(stage), BYTES)
        tma.async_load(k, [other, head, step * BLOCK_N, 0], w.k_full.index(stage), w.k.index(stage))
        mbarrier.wait(w.v_free.index(stage), phase)
        mbarrier.expect(w.v_full.index(stage), BYTES)
        tma.async_load(v, [other, head, step * BLOCK_N, 0], w.v_full.index(stage), w.v.index(stage))


@gluon.jit
def _scores(queries, step, w: Shared, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """The product of queries and a tile of keys, which is there, on its way."""
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    stage = step % STAGES
    nothing = gl.zeros((ROWS, BLOCK_N), gl.float32, layout)
    return warpgroup_mma(queries, w.k.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _weigh(scores, total, peak, left, SCALE: gl.constexpr, MASKED: gl.constexpr):
    """Numerators of the softmax of a tile that has `left` keys, the new sum and peak, and what earlier sums are to be multiplied by."""
    if MASKED:
        column = gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        scores = gl.where(column[None, :] < left, scores, float("-inf"))
    higher = gl.maximum(peak, gl.max(scores, 1) * SCALE)
    weights = gl.exp2(scores * SCALE - higher[:, None])
    rescale = gl.exp2(peak - higher)
    return weights, total * rescale + gl.sum(weights, 1), higher, rescale


@gluon.jit
def _operand(weights, dtype: gl.constexpr, layout: gl.constexpr):
    """Weights as the second product takes them: from registers. Two numbers are rounded by one instruction into the order that the
    product has them in; Triton's own conversion swaps them, and ptxas swaps them back."""
    if dtype == gl.float16:
        rounded = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [weights], gl.float16, True, 2)
    else:
        rounded = gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [weights], gl.bfloat16, True, 2)
    return gl.convert_layout(rounded, gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def _rescaled(acc, rescale, layout: gl.constexpr):
    return acc * gl.convert_layout(rescale, gl.SliceLayout(1, layout))[:, None]


@gluon.jit
def _take_turn(w: Shared, step, CONSUMER: gl.constexpr):
    """Group 0 begins; nothing but the phase before a barrier's first one is over from the start."""
    mbarrier.wait(w.turn.index(CONSUMER), (step & 1) ^ (1 if CONSUMER == 0 else 0))


@gluon.jit
def _consume(
    out,
    m,
    w: Shared,
    SCALE: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr,
    CONSUMER: gl.constexpr,
):
    D: gl.constexpr = w.q.shape[2]
    dtype: gl.constexpr = w.q.dtype
    row: gl.constexpr = gl.SliceLayout(1, gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16]))
    layout: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    total = gl.zeros((ROWS,), gl.float32, row)
    peak = gl.full((ROWS,), float("-inf"), gl.float32, row)
    acc = gl.zeros((ROWS, D), gl.float32, layout)
    queries, next_turn = w.q.index(CONSUMER), w.turn.index((CONSUMER + 1) % CONSUMERS)
    steps = gl.cdiv(m, BLOCK_N)
    mbarrier.wait(w.q_full, 0)
    mbarrier.wait(w.k_full.index(0), 0)
    _take_turn(w, 0, CONSUMER)
    scores = _scores(queries, 0, w, BLOCK_N, STAGES)
    mbarrier.arrive(next_turn)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    mbarrier.arrive(w.k_free.index(0))
    weights, total, peak, rescale = _weigh(scores, total, peak, m, SCALE, MASKED)
    operand = _operand(weights, dtype, layout)
    for step in range(1, steps):
        before = (step - 1) % STAGES
        mbarrier.wait(w.v_full.index(before), (step - 1) // STAGES & 1)
        mbarrier.wait(w.k_full.index(step % STAGES), step // STAGES & 1)
        _take_turn(w, step, CONSUMER)
        scores = _scores(queries, step, w, BLOCK_N, STAGES)
        acc = warpgroup_mma(operand, w.v.index(before), acc, is_async=True)
        mbarrier.arrive(next_turn)
        scores = warpgroup_mma_wait(1, deps=(scores,))
        mbarrier.arrive(w.k_free.index(step % STAGES))
        weights, total, peak, rescale = _weigh(scores, total, peak, m - step * BLOCK_N, SCALE, MASKED)
        acc, operand = warpgroup_mma_wait(0, deps=(acc, operand))
        mbarrier.arrive(w.v_free.index(before))
        acc = _rescaled(acc, rescale, layout)
        operand = _operand(weights, dtype, layout)
    last = (steps - 1) % STAGES
    mbarrier.wait(w.v_full.index(last), (steps - 1) // STAGES & 1)
    acc = warpgroup_mma(operand, w.v.index(last), acc, is_async=True)
    acc, operand = warpgroup_mma_wait(0, deps=(acc, operand))
    queries.store(_rescaled(acc, 1.0 / total, layout).to(dtype))
    fence_async_shared()
    tma.async_store(out, [gl.program_id(2), gl.program_id(1), (gl.program_id(0) * CONSUMERS + CONSUMER) * ROWS, 0], queries)
    tma.store_wait(0)


@gluon.jit
def flash_attention(
    q,  # descriptor (B, H, N, D) of blocks (1, 1, 64, D)
    k,  # descriptor (B, H, M, D) of blocks (1, 1, BLOCK_N, D)
    v,  # likewise
    out,  # descriptor (B, H, N, D) of blocks (1, 1, 64, D)
    m,
    SCALE: gl.constexpr,  # log2(e) times the scores' scale
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMERS: gl.constexpr,
    MASKED: gl.constexpr,  # whether M is no multiple of BLOCK_N
    KV_SHIFT: gl.constexpr,  # image b reads the keys and values of image (b + KV_SHIFT) % B
    OVERLAPS: gl.constexpr,
):
    """Grid: (ceil(N / (64 * CONSUMERS)), H, B)."""
    dtype: gl.constexpr = q.dtype
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D], dtype)
    w = Shared(
        gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, D], q_layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], k_layout),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(w.q_full, count=1)
    for consumer in gl.static_range(CONSUMERS):
        mbarrier.init(w.turn.index(consumer), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(w.k_full.index(stage), count=1)
        mbarrier.init(w.v_full.index(stage), count=1)
        mbarrier.init(w.k_free.index(stage), count=CONSUMERS)
        mbarrier.init(w.v_free.index(stage), count=CONSUMERS)
    fence_async_shared()
    m = gl.to_tensor(m)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (out, m, w, SCALE, BLOCK_N, STAGES, CONSUMERS, MASKED, 0)),
                (_consume, (out, m, w, SCALE, BLOCK_N, STAGES, CONSUMERS, MASKED, 1)),
                (_produce, (q, k, v, m, w, BLOCK_N, STAGES, CONSUMERS, KV_SHIFT, OVERLAPS)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (out, m, w, SCALE, BLOCK_N, STAGES, CONSUMERS, MASKED, 0)),
                (_consume, (out, m, w, SCALE, BLOCK_N, STAGES, CONSUMERS, MASKED, 1)),
                (_consume, (out, m, w, SCALE, BLOCK_N, STAGES, CONSUMERS, MASKED, 2)),
                (_produce, (q, k, v, m, w, BLOCK_N, STAGES, CONSUMERS, KV_SHIFT, OVERLAPS)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )
