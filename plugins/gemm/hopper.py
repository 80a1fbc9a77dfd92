"""The same operation for sm 9.0, in Gluon: one warp brings tiles of a and weight, and up to three consumers, groups of warps, multiply
them.

Each consumer has ROWS rows of an output tile, and both its column parts. Consumers share a tile, of PARTS * ROWS rows and
BLOCK_N + BLOCK_N2 columns: neither need be a power of two, so that the tiles of a product can be as many as the GPU has
multiprocessors. Or they take turns (TURNS): each of two has whole tiles, and while one finishes its sums (activation, stores) the
other multiplies. The producer goes STAGES steps ahead, across the end of an output tile too. It brings weights before it waits for
the kernel before this one, whose outputs may be the rows of a.

Taking turns: the program's tiles 0, 2, 4, .. are the first consumer's and 1, 3, 5, .. the second's, and steps are numbered through all
of them. A consumer waits for no stage of its tile before the other one has found its last stage full: a barrier tells only the parity of
its phase, so that a wait that is two phases early would return at once.
"""

# ruff: noqa: N803, N806, SIM102  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator, call-arg"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import aggregate
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from smc.plugins.gemm.kernel import gelu


@aggregate
class Operands:
    """Descriptors of what is multiplied, and of the residual; weight2 is weight where BLOCK_N2 is 0."""

    a: tma.tensor_descriptor
    weight: tma.tensor_descriptor
    weight2: tma.tensor_descriptor
    residual: tma.tensor_descriptor | gl.tensor | gl.constexpr


@aggregate
class Buffers:
    """Shared memory: operands, a bias for each consumer, outputs (and, before them, the residual), and the barriers that say which
    stages are full, which are free, that the residual is there, and whose turn it is."""

    a: gl.shared_memory_descriptor
    weight: gl.shared_memory_descriptor
    weight2: gl.shared_memory_descriptor
    bias: gl.shared_memory_descriptor
    bias2: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    turn: gl.shared_memory_descriptor


@aggregate
class Work:
    """Which tiles there are, and of which parts."""

    m: gl.tensor
    groups: gl.tensor
    N: gl.constexpr
    STEPS: gl.constexpr
    PARTS: gl.constexpr
    ROWS: gl.constexpr
    WARPS: gl.constexpr
    BLOCK_N: gl.constexpr
    BLOCK_N2: gl.constexpr
    BLOCK_K: gl.constexpr
    STAGES: gl.constexpr
    SWATH: gl.constexpr
    A_ORDER: gl.constexpr
    W_SHARED: gl.constexpr

    @gluon.jit
    def count(self):
        return self.groups * gl.cdiv(self.m, self.PARTS * self.ROWS) * gl.cdiv(self.N, self.BLOCK_N + self.BLOCK_N2)

    @gluon.jit
    def steps(self):
        """Of all tiles of this program."""
        return gl.cdiv(self.count() - gl.program_id(0), gl.num_programs(0)) * self.STEPS

    @gluon.jit
    def tile(self, index):
        """Group, first row and first column of a tile. Tiles go down SWATH, then one to the right, as in `kernel`."""
        tiles_m = gl.cdiv(self.m, self.PARTS * self.ROWS)
        tiles_n = gl.cdiv(self.N, self.BLOCK_N + self.BLOCK_N2)
        group = index // (tiles_m * tiles_n)
        index = index % (tiles_m * tiles_n)
        swath = index // (self.SWATH * tiles_n)
        height = gl.minimum(tiles_m - swath * self.SWATH, self.SWATH)
        within = index % (self.SWATH * tiles_n)
        row = (swath * self.SWATH + within % height) * (self.PARTS * self.ROWS)
        return group, row, within // height * (self.BLOCK_N + self.BLOCK_N2)


@aggregate
class Epilogue:
    """What follows the sums; names are those of `kernel.gemm`."""

    bias: gl.tensor | gl.constexpr
    cos: gl.tensor | gl.constexpr
    sin: gl.tensor | gl.constexpr
    residual: tma.tensor_descriptor | gl.tensor | gl.constexpr
    out: gl.tensor | tma.tensor_descriptor
    out_relu: gl.tensor | gl.constexpr
    r_row: gl.tensor
    r_group: gl.tensor
    out_row: gl.tensor
    out_group: gl.tensor
    tokens: gl.tensor
    width: gl.tensor
    BIAS_SHARED: gl.constexpr
    ROTARY: gl.constexpr
    HALF: gl.constexpr
    ACTIVATION: gl.constexpr
    SCALE: gl.constexpr
    STAGED: gl.constexpr
    RESIDUAL_STAGED: gl.constexpr
    TABLES: gl.constexpr
    EXACT: gl.constexpr
    PIECE: gl.constexpr


@gluon.constexpr_function
def _sums(columns, warps):
    """How a consumer's warps hold sums: rows 16 to a warp, as the instruction leaves them."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon.jit
def _load_weight(p: Operands, w: Buffers, work: Work, number, wanted):
    """Weights of this program's step `number` on their way; the barrier expects a's tile as well."""
    group, _, column = work.tile(gl.program_id(0) + number // work.STEPS * gl.num_programs(0))
    k = number % work.STEPS * work.BLOCK_K
    stage = number % work.STAGES
    full = w.full.index(stage)
    BYTES: gl.constexpr = (work.PARTS * work.ROWS + work.BLOCK_N + work.BLOCK_N2) * work.BLOCK_K * 2
    mbarrier.expect(full, BYTES, pred=wanted)
    if work.W_SHARED:
        group = 0
    tma.async_load(p.weight, [group, k, column], full, w.weight.index(stage), pred=wanted)
    if work.BLOCK_N2 > 0:
        tma.async_load(p.weight2, [group, k, column + work.BLOCK_N], full, w.weight2.index(stage), pred=wanted)


@gluon.jit
def _load_a(p: Operands, w: Buffers, work: Work, number, wanted):
    group, row, _ = work.tile(gl.program_id(0) + number // work.STEPS * gl.num_programs(0))
    stage = number % work.STAGES
    if work.A_ORDER == 0:
        group = 0
    elif work.A_ORDER < 0:
        group = work.groups - 1 - group
    for part in gl.static_range(work.PARTS):
        place = [group, row + part * work.ROWS, number % work.STEPS * work.BLOCK_K]
        tma.async_load(p.a, place, w.full.index(stage), w.a.index(stage * work.PARTS + part), pred=wanted)


@gluon.jit
def _load_first(p: Operands, w: Buffers, work: Work, e: Epilogue, OVERLAPS: gl.constexpr):
    """The first STAGES steps, into free stages: weights before the wait for the kernel before this one, the rest after it. Then the
    residual, if it comes so: only where a program has one tile."""
    AHEAD: gl.constexpr = min(work.STAGES, work.STEPS)
    for number in gl.static_range(AHEAD):
        _load_weight(p, w, work, gl.to_tensor(number), True)
    if OVERLAPS:
        gdc_wait()
    for number2 in gl.static_range(AHEAD):
        _load_a(p, w, work, gl.to_tensor(number2), True)
    if e.RESIDUAL_STAGED:
        group, row, column = work.tile(gl.program_id(0))
        mbarrier.expect(w.ready, work.PARTS * e.STAGED * work.ROWS * e.PIECE * w.out.dtype.primitive_bitwidth // 8)
        for piece in gl.static_range(work.PARTS * e.STAGED):
            place = [group, row + piece // e.STAGED * work.ROWS, column + piece % e.STAGED * e.PIECE]
            tma.async_load(p.residual, place, w.ready, w.out.index(piece))


@gluon.jit
def _load_next(p: Operands, w: Buffers, work: Work, number, wanted):
    """Step `number`, if wanted, once its stage is free. A branch here would make the compiler wait for products that are under way."""
    mbarrier.wait(w.free.index(number % work.STAGES), (number // work.STAGES & 1) ^ 1, pred=wanted)
    _load_weight(p, w, work, number, wanted)
    _load_a(p, w, work, number, wanted)


@gluon.jit
def _produce(p: Operands, w: Buffers, work: Work, e: Epilogue, OVERLAPS: gl.constexpr):
    _load_first(p, w, work, e, OVERLAPS)
    for number in range(min(work.STAGES, work.STEPS), work.steps()):
        _load_next(p, w, work, number, True)


@gluon.jit
def _finish(x, group, row, column, m, N: gl.constexpr, e: Epilogue, tables, buffers, CONSUMER: gl.constexpr, NUMBER: gl.constexpr):
    """From the sums x, float32, of the part at (row, column) to the stored outputs, PIECE columns at a time.

    Pieces, of which NUMBER is the first's, take turns with the consumer's buffers.
    """
    COLUMNS: gl.constexpr = x.shape[1]
    if COLUMNS > e.PIECE:
        HALF: gl.constexpr = COLUMNS // 2
        left, right = x.reshape(x.shape[0], 2, HALF).permute(0, 2, 1).split()
        layout: gl.constexpr = _sums(HALF, x.type.layout.warps_per_cta[0])
        left, right = gl.convert_layout(left, layout), gl.convert_layout(right, layout)
        _finish(left, group, row, column, m, N, e, tables, buffers, CONSUMER, NUMBER)
        _finish(right, group, row, column + HALF, m, N, e, tables, buffers, CONSUMER, NUMBER + HALF // e.PIECE)
    else:
        _finish_piece(x, group, row, column, m, N, e, tables, buffers, CONSUMER, NUMBER)


@gluon.jit
def _finish_piece(x, group, row, column, m, N: gl.constexpr, e: Epilogue, tables, buffers, CONSUMER: gl.constexpr, NUMBER: gl.constexpr):
    layout: gl.constexpr = x.type.layout
    ROWS: gl.constexpr = x.shape[0]
    COLUMNS: gl.constexpr = x.shape[1]
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))[:, None]
    columns = column + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))[None, :]
    if e.cos is not None:
        if column < e.ROTARY:
            if e.TABLES:
                c, s = tables
            else:
                c, s = _tables(row, column, e, ROWS, layout)
            x1, x2 = x.reshape(ROWS, COLUMNS // 2, 2).split()
            x = gl.convert_layout(gl.join(x1 * c - x2 * s, x1 * s + x2 * c).reshape(ROWS, COLUMNS), layout)
    if e.ACTIVATION == "gelu":
        x = gelu(x, e.EXACT)
    elif e.ACTIVATION == "relu":
        x = gl.maximum(x, 0.0)
    inside = (rows < m) & (columns < N)
    if e.SCALE > 0:
        CHANNELS: gl.constexpr = N // (e.SCALE * e.SCALE)
        down = columns // (e.SCALE * CHANNELS)
        right = columns // CHANNELS % e.SCALE
        columns = columns % CHANNELS
        rows = ((rows // e.width * e.SCALE + down) * e.width + rows % e.width) * e.SCALE + right
    rows = rows.to(gl.int64)
    if e.RESIDUAL_STAGED:
        x += buffers.index(CONSUMER * e.STAGED + NUMBER).load(layout).to(gl.float32)
    elif e.residual is not None:
        x += gl.load(e.residual + group.to(gl.int64) * e.r_group + (rows * e.r_row + columns), mask=inside, other=0.0).to(gl.float32)
    if e.STAGED > 0:
        buffer = buffers.index(CONSUMER * e.STAGED + NUMBER % e.STAGED)
        tma.store_wait(e.STAGED - 1)
        buffer.store(x.to(buffer.dtype))
        fence_async_shared()
        tma.async_store(e.out, [group, row, column], buffer)
    else:
        places = group.to(gl.int64) * e.out_group + (rows * e.out_row + columns)
        gl.store(e.out + places, x.to(e.out.dtype.element_ty), mask=inside)
        if e.out_relu is not None:
            gl.store(e.out_relu + places, gl.maximum(x, 0.0).to(e.out_relu.dtype.element_ty), mask=inside)


@gluon.jit
def _tables(row, column, e: Epilogue, ROWS: gl.constexpr, layout: gl.constexpr):
    """Cosines and sines for the piece at (row, column), which has this layout; 1 and 0 from column ROTARY on."""
    PAIRS: gl.constexpr = e.PIECE // 2
    x1, _ = gl.zeros((ROWS, e.PIECE), gl.float32, layout).reshape(ROWS, PAIRS, 2).split()
    half: gl.constexpr = x1.type.layout
    rows = (row + gl.arange(0, ROWS, gl.SliceLayout(1, half))[:, None]) % e.tokens
    pairs = column // 2 + gl.arange(0, PAIRS, gl.SliceLayout(0, half))[None, :]
    places = rows * e.HALF + pairs % e.HALF
    if e.ROTARY % e.PIECE == 0:
        c = gl.load(e.cos + places).to(gl.float32)
        s = gl.load(e.sin + places).to(gl.float32)
    else:
        c = gl.load(e.cos + places, mask=pairs < e.ROTARY // 2, other=1.0).to(gl.float32)
        s = gl.load(e.sin + places, mask=pairs < e.ROTARY // 2, other=0.0).to(gl.float32)
    return c, s


@gluon.jit
def _start(group, column, e: Epilogue, buffer, work: Work, COLUMNS: gl.constexpr):
    """What a part's sums start from: the bias, which a consumer's threads bring into shared memory for one another, or nothing."""
    layout: gl.constexpr = _sums(COLUMNS, work.WARPS)
    sums = gl.zeros((work.ROWS, COLUMNS), gl.float32, layout)
    if e.bias is not None:
        columns = column + gl.arange(0, COLUMNS, gl.BlockedLayout([1], [32], [work.WARPS], [0]))
        base = e.bias
        if not e.BIAS_SHARED:
            base += group * work.N
        buffer.store(gl.load(base + columns, mask=columns < work.N, other=0.0).to(gl.float32))
        sums = buffer.load(gl.SliceLayout(0, layout))[None, :].broadcast_to(work.ROWS, COLUMNS)
    return sums


@gluon.jit
def _consume(
    p: Operands,
    w: Buffers,
    work: Work,
    e: Epilogue,
    CONSUMER: gl.constexpr,
    TURNS: gl.constexpr,
    PRODUCES: gl.constexpr,
    OVERLAPS: gl.constexpr,
):
    """ROWS rows of each tile, or all of every other one. PRODUCES: this consumer also brings the operands, where there is no producer."""
    AHEAD: gl.constexpr = min(work.STAGES, work.STEPS)
    PART: gl.constexpr = 0 if TURNS else CONSUMER
    FIRST: gl.constexpr = CONSUMER if TURNS else 0
    EVERY: gl.constexpr = 2 if TURNS else 1
    if PRODUCES:
        _load_first(p, w, work, e, OVERLAPS)
        steps = work.steps()
    done = gl.to_tensor(FIRST * work.STEPS)
    turns = gl.to_tensor(0)
    for index in range(gl.program_id(0) + FIRST * gl.num_programs(0), work.count(), EVERY * gl.num_programs(0)):
        group, row, column = work.tile(index)
        row += PART * work.ROWS
        acc = _start(group, column, e, w.bias.index(CONSUMER), work, work.BLOCK_N)
        if work.BLOCK_N2 > 0:
            acc2 = _start(group, column + work.BLOCK_N, e, w.bias2.index(CONSUMER), work, work.BLOCK_N2)
        if OVERLAPS:
            gdc_wait()
        tables = (column, column)
        if e.TABLES:
            tables = _tables(row, 0, e, work.ROWS, _sums(e.PIECE, work.WARPS))
        if TURNS:
            # The first consumer has its first turn at once: nothing but the phase before a barrier's first one is over from the start.
            mbarrier.wait(w.turn.index(CONSUMER), (turns + 1 + CONSUMER) & 1)
        for step in range(work.STEPS):
            stage = done % work.STAGES
            mbarrier.wait(w.full.index(stage), done // work.STAGES & 1)
            a_tile = w.a.index(stage * work.PARTS + PART)
            acc = warpgroup_mma(a_tile, w.weight.index(stage), acc, is_async=True)
            if work.BLOCK_N2 > 0:
                acc2 = warpgroup_mma(a_tile, w.weight2.index(stage), acc2, is_async=True)
                acc, acc2 = warpgroup_mma_wait(2, deps=(acc, acc2))
            else:
                acc = warpgroup_mma_wait(1, deps=(acc,))
            # What this step multiplies is still being read; the step before it is over.
            mbarrier.arrive(w.free.index((done + work.STAGES - 1) % work.STAGES), pred=step > 0)
            if PRODUCES:
                _load_next(p, w, work, done - 1 + AHEAD, (step > 0) & (done - 1 + AHEAD < steps))
            done += 1
        if TURNS:
            mbarrier.arrive(w.turn.index(1 - CONSUMER))
        if work.BLOCK_N2 > 0:
            acc, acc2 = warpgroup_mma_wait(0, deps=(acc, acc2))
        else:
            acc = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(w.free.index((done + work.STAGES - 1) % work.STAGES))
        if PRODUCES:
            _load_next(p, w, work, done - 1 + AHEAD, done - 1 + AHEAD < steps)
        if e.RESIDUAL_STAGED:
            mbarrier.wait(w.ready, 0)
        _finish(acc, group, row, column, work.m, work.N, e, tables, w.out, CONSUMER, 0)
        if work.BLOCK_N2 > 0:
            PIECES: gl.constexpr = work.BLOCK_N // e.PIECE
            _finish(acc2, group, row, column + work.BLOCK_N, work.m, work.N, e, tables, w.out, CONSUMER, PIECES)
        done += (EVERY - 1) * work.STEPS
        turns += 1
    if e.STAGED > 0:
        tma.store_wait(0)


@gluon.jit
def gemm(
    a,  # descriptor (groups, m, k) of blocks (1, ROWS, BLOCK_K)
    weight,  # descriptor (groups or 1, k, n) of blocks (1, BLOCK_K, BLOCK_N)
    weight2,  # the same of blocks (1, BLOCK_K, BLOCK_N2); None where BLOCK_N2 is 0
    bias,  # these, down to width, as in `kernel.gemm`
    cos,
    sin,
    residual,  # likewise if RESIDUAL_STAGED
    out,  # a descriptor (groups, m, n) of blocks (1, ROWS, PIECE) if STAGED
    out_relu,
    m,
    groups,
    r_row,
    r_group,
    out_row,
    out_group,
    tokens,
    width,
    N: gl.constexpr,
    K: gl.constexpr,
    A_ORDER: gl.constexpr,
    W_SHARED: gl.constexpr,
    BIAS_SHARED: gl.constexpr,
    ROTARY: gl.constexpr,
    HALF: gl.constexpr,
    ACTIVATION: gl.constexpr,
    SCALE: gl.constexpr,
    STAGED: gl.constexpr,  # buffers a consumer for outputs that go through shared memory and TMA; 0 where they are stored directly
    RESIDUAL_STAGED: gl.constexpr,  # the residual comes by TMA, into these buffers
    TABLES: gl.constexpr,  # a piece is a head, so that all pieces take the same cosines and sines
    EXACT: gl.constexpr,  # gelu to float32's precision
    PIECE: gl.constexpr,  # columns that are finished at a time
    OVERLAPS: gl.constexpr,
    CONSUMERS: gl.constexpr,
    WARPS: gl.constexpr,  # a consumer: 4, or 8 of an only one
    ROWS: gl.constexpr,  # a consumer; a multiple of 16 * WARPS
    TURNS: gl.constexpr,  # two consumers take turns with tiles; else all share each
    PRODUCER: gl.constexpr,  # whether there is one; else the first consumer is it as well
    BLOCK_N: gl.constexpr,
    BLOCK_N2: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    SWATH: gl.constexpr,
    REGISTERS: gl.constexpr,  # a thread, at the start: the launch's
):
    """Grid: (programs, 1, 1), which take turns with the tiles."""
    dtype: gl.constexpr = a.dtype
    PARTS: gl.constexpr = 1 if TURNS else CONSUMERS
    k_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_K], dtype)
    n_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_N], dtype)
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES * PARTS, ROWS, BLOCK_K], k_layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], n_layout)
    if BLOCK_N2 > 0:
        n2_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, BLOCK_N2], dtype)
        w2_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N2], n2_layout)
    else:
        w2_tiles = w_tiles
        weight2 = weight
    if STAGED > 0:
        o_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, PIECE], out.dtype)
        o_tiles = gl.allocate_shared_memory(out.dtype, [CONSUMERS * STAGED, ROWS, PIECE], o_layout)
    else:
        o_tiles = a_tiles
    if bias is not None:
        b_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        b_tile = gl.allocate_shared_memory(gl.float32, [CONSUMERS, BLOCK_N], b_layout)
        b2_tile = gl.allocate_shared_memory(gl.float32, [CONSUMERS, BLOCK_N2 if BLOCK_N2 > 0 else 1], b_layout)
    else:
        b_tile = w_tiles
        b2_tile = w_tiles
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(ready, count=1)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=PARTS)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for consumer in gl.static_range(2):
        mbarrier.init(turn.index(consumer), count=1)
    fence_async_shared()
    w = Buffers(a_tiles, w_tiles, w2_tiles, b_tile, b2_tile, o_tiles, ready, full, free, turn)
    steps: gl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    work = Work(
        gl.to_tensor(m), gl.to_tensor(groups), N, steps, PARTS, ROWS, WARPS, BLOCK_N, BLOCK_N2, BLOCK_K, STAGES, SWATH, A_ORDER, W_SHARED
    )  # fmt: skip
    e = Epilogue(
        bias, cos, sin, residual, out, out_relu, gl.to_tensor(r_row), gl.to_tensor(r_group), gl.to_tensor(out_row), gl.to_tensor(out_group),
        gl.to_tensor(tokens), gl.to_tensor(width), BIAS_SHARED, ROTARY, HALF, ACTIVATION, SCALE, STAGED,
        RESIDUAL_STAGED, TABLES, EXACT, PIECE,
    )  # fmt: skip
    p = Operands(a, weight, weight2, residual)
    if OVERLAPS:
        gdc_launch_dependents()
    # Registers a thread: what the workers leave of what all threads together start with is the first's.
    if PRODUCER:
        if CONSUMERS == 1:
            gl.warp_specialize(
                [(_consume, (p, w, work, e, 0, TURNS, not PRODUCER, OVERLAPS)), (_produce, (p, w, work, e, OVERLAPS))], [1], [24]
            )
        else:
            gl.warp_specialize(
                [
                    (_consume, (p, w, work, e, 0, TURNS, not PRODUCER, OVERLAPS)),
                    (_consume, (p, w, work, e, 1, TURNS, False, OVERLAPS)),
                    (_produce, (p, w, work, e, OVERLAPS)),
                ],
                [4, 1],
                [(3 * REGISTERS - 24) // 16 * 8, 24],
            )
    elif CONSUMERS == 1:
        _consume(p, w, work, e, 0, TURNS, True, OVERLAPS)
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [(_consume, (p, w, work, e, 0, TURNS, not PRODUCER, OVERLAPS)), (_consume, (p, w, work, e, 1, TURNS, False, OVERLAPS))],
            [4],
            [REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (p, w, work, e, 0, TURNS, not PRODUCER, OVERLAPS)),
                (_consume, (p, w, work, e, 1, TURNS, False, OVERLAPS)),
                (_consume, (p, w, work, e, 2, TURNS, False, OVERLAPS)),
            ],
            [4, 4],
            [REGISTERS, REGISTERS],
        )
