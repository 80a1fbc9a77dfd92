"""Triton kernels of FastNN-Lite.

They run on a GPU and, with TRITON_INTERPRET=1 set before triton is first imported, on the CPU.

Walks of both directions go in step. Those from image 1 are at a pixel of map 1 when those from image 2 are at one of map 2, so one
launch moves both. A half trip is two launches: `search` scores every walk's descriptor against all of the other map in float16 and
keeps the best score of each run of points, and `settle` scores the runs that could hold the nearest neighbour again, in float32,
and moves the walk there. A walk that did not move has closed: its two pixels are each other's nearest neighbours, so no two closed
walks share a pixel of image 1 without sharing the one of image 2. That is why one slot for each pixel of image 1 holds all matches,
whoever finds them and in whatever order, and why reading the slots in order gives the list unique and sorted. With a tolerance the
slots belong to the starting points, of which there is one for each pixel.

A walk that goes on is put into the queue of the next half trip. Queues and what is done with them do not depend on order.

The operand `options` holds the number of starting points in image 1 and in image 2; 1 for the batch that begins a list of matches, 0 for
those that add to it; 1 for walks of one round trip, 0 for those that go on until they close; and the tolerance, 0 for none, else walks
that come back to fewer than so many squared pixels from their start are kept. `status` holds the number of matches, and the bits
of the largest squared norm of a descriptor in map 1 and in map 2, which are those of infinity or more if one is not finite.
"""

# ruff: noqa: N803, N806  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

BIAS = tl.constexpr(1.5)
"""What the column after the descriptor holds in float16. Its square makes the score of two points positive, as descriptors are scaled
to norms of about 1 at most; the score with a padding row, all zeros, is then the smallest. Positive numbers have the order of their bits,
and the hardware takes the maximum of three integers in one instruction."""

MARGIN = tl.constexpr(2.0**-9 * 1.08)
"""Twice the most that a float16 score may be off: 2^-11 of either factor, for norms up to the root of 1.05, and what sums lose."""

FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _begin(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def _tile(map_, n, first, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rows `first` to `first` + ROWS of a map (n, SIZE), with zeros outside it."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    return tl.load(map_ + rows * SIZE + columns, mask=(rows < n) & (columns < SIZE), other=0.0)


@triton.jit
def _store_half(half, tile, n, first, SIZE: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """A tile of a map in float16, with the bias in the column after the descriptor; padding rows are all zeros."""
    rows = first + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    tile = tl.where((columns == SIZE) & (rows < n), BIAS, tile)
    tl.store(half + rows.to(tl.int64) * COLUMNS + columns, tile.to(tl.float16))


@triton.jit
def prepare(
    desc1,  # (n1, SIZE) float32
    desc2,  # (n2, SIZE) float32
    starts,  # (2, STARTS) int32: pixels of image 1, pixels of image 2
    options,  # (8,) int32
    half,  # out: (n1 and n2, each padded to whole runs of RUN, COLUMNS) float16
    norms,  # out: (2, PARTS) int32, bits of the largest squared norm that each program saw
    slots,  # out: (n1,) int32, -1: no match yet
    here,  # out: (2, STARTS) int32, the walks' pixels in their own image
    there,  # out: (2, STARTS) int32, and in the other; -1: none yet
    queue,  # out: (2 turns, 2, STARTS) int32, the walks to search for
    counts,  # out: (HALVES, 4) int32, walks in the queue of each half trip
    n1,
    n2,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    STARTS: tl.constexpr,
    PARTS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Everything as it is before the first half trip. Grid: one program a run of either map, and at least 2 * STARTS / RUN."""
    part = tl.program_id(0)
    runs1 = tl.cdiv(n1, RUN)
    runs = runs1 + tl.cdiv(n2, RUN)
    within = part * RUN + tl.arange(0, RUN)
    if part == 0:
        half_trips = tl.arange(0, HALVES * 4)
        first_counts = tl.load(options + half_trips, mask=half_trips < 2, other=0)
        tl.store(counts + half_trips, first_counts)
    if part * RUN < 2 * STARTS:
        pixels = tl.load(starts + within)
        tl.store(here + within, pixels)
        tl.store(there + within, tl.full((RUN,), -1, tl.int32))
        tl.store(queue + within, within % STARTS)
    if tl.load(options + 2) == 1:
        tl.store(slots + within, tl.full((RUN,), -1, tl.int32), mask=within < n1)
        if part < runs:
            if part < runs1:
                tile = _tile(desc1, n1, part * RUN, SIZE, COLUMNS, RUN)
                _store_half(half, tile, n1, part * RUN, SIZE, COLUMNS, RUN)
                norms_ = norms + part
            else:
                tile = _tile(desc2, n2, (part - runs1) * RUN, SIZE, COLUMNS, RUN)
                _store_half(half + runs1.to(tl.int64) * RUN * COLUMNS, tile, n2, (part - runs1) * RUN, SIZE, COLUMNS, RUN)
                norms_ = norms + PARTS + (part - runs1)
            # The bits of numbers that are not negative are in their order, with infinity and NaN last.
            norm = tl.sum(tile * tile, 1).to(tl.int32, bitcast=True) & 0x7FFFFFFF
            tl.store(norms_, tl.max(norm, 0))


@triton.jit
def rescale(
    desc1,  # (n1, SIZE) float32
    desc2,  # (n2, SIZE) float32
    options,  # (8,) int32
    norms,  # (2, PARTS) int32
    half,  # in and out: as `prepare` leaves it
    status,  # out: (4,) int32
    n1,
    n2,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Bring maps whose largest norm is not about 1 to one between 1/2 and 1, by a power of two. Grid: (any, 2 maps).

    Descriptors have unit norm, so there is nothing to do; but any others work.
    """
    _begin(OVERLAPS)
    if tl.load(options + 2) == 1:
        which = tl.program_id(1)
        n = tl.where(which == 0, n1, n2)
        parts = tl.arange(0, PARTS)
        norm = tl.max(tl.load(norms + which * PARTS + parts, mask=parts < tl.cdiv(n, RUN), other=0), 0)
        if tl.program_id(0) == 0:
            tl.store(status + 1 + which, norm)
        squared = norm.to(tl.float32, bitcast=True)
        if (squared < 0.25) | (squared > 1.05):
            # Below 2^((exponent + 1) / 2), with the exponent of the squared norm.
            power = ((norm >> 23) - 125) >> 1
            scale = ((127 - power) << 23).to(tl.float32, bitcast=True)
            runs1 = tl.cdiv(n1, RUN)
            for run in range(tl.program_id(0), tl.cdiv(n, RUN), tl.num_programs(0)):
                if which == 0:
                    tile = _tile(desc1, n1, run * RUN, SIZE, COLUMNS, RUN)
                    _store_half(half, tile * scale, n1, run * RUN, SIZE, COLUMNS, RUN)
                else:
                    tile = _tile(desc2, n2, run * RUN, SIZE, COLUMNS, RUN)
                    _store_half(half + runs1.to(tl.int64) * RUN * COLUMNS, tile * scale, n2, run * RUN, SIZE, COLUMNS, RUN)


@triton.jit
def _descriptors(half, pixels, queue, places, count, base, COLUMNS: tl.constexpr):
    """float16 descriptors (walks, COLUMNS) of the walks at `places` of a queue; of any one beyond its end."""
    walks = tl.load(queue + places, mask=places < count, other=0)
    rows = base + tl.load(pixels + walks, mask=places < count, other=0)
    return tl.load(half + rows.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])


@triton.jit
def _top(descriptors, points):
    """Bits of each descriptor's best score."""
    return tl.max(tl.dot(descriptors, points.T).to(tl.int32, bitcast=True), 1)


@triton.jit
def search(
    half,  # (runs * RUN, COLUMNS) float16, map 1 and after it map 2
    half_tiles,  # the same as a descriptor in blocks of (BLOCK_N, COLUMNS); None to load through pointers
    here,  # (2, STARTS) int32
    there,  # (2, STARTS) int32
    queue,  # (2 turns, 2, STARTS) int32
    counts,  # (4,) int32, this half trip's
    best,  # out: (2, STARTS, PITCH) float32, the best score in each run for each place in the queue
    n1,
    n2,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    STARTS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TWICE: tl.constexpr,  # whether each tile of points serves two times BLOCK_M walks, which halves the traffic from the L2 cache
    FORTH: tl.constexpr,  # whether walks look from their own image to the other, or back
    OVERLAPS: tl.constexpr,
):
    """Scores of all walks in the queue, run by run. Grid: any; the work is one block of walks against one run, and is cut evenly.

    A program's share is consecutive, so that it takes up other walks only now and then.
    """
    _begin(OVERLAPS)
    WALKS: tl.constexpr = 2 * BLOCK_M if TWICE else BLOCK_M
    runs1, runs2 = tl.cdiv(n1, RUN), tl.cdiv(n2, RUN)
    count0, count1 = tl.load(counts), tl.load(counts + 1)
    # Direction 0 has its own pixels in map 1, and looks for those of map 2 on the way forth.
    if FORTH:
        sought0, sought1, base0, base1, pixels = runs2, runs1, runs1, 0, here
    else:
        sought0, sought1, base0, base1, pixels = runs1, runs2, 0, runs1, there
        queue += 2 * STARTS
    units0 = tl.cdiv(count0, WALKS) * sought0
    units = units0 + tl.cdiv(count1, WALKS) * sought1
    share = tl.cdiv(units, tl.num_programs(0))
    unit = tl.program_id(0) * share
    last = tl.minimum(unit + share, units)
    while unit < last:
        direction = (unit >= units0).to(tl.int32)
        within = unit - direction * units0
        left = tl.where(direction == 0, tl.minimum(last, units0), last) - unit
        sought = tl.where(direction == 0, sought0, sought1)
        base = tl.where(direction == 0, base0, base1)
        own = tl.where(direction == 0, base1, base0) * RUN
        count = tl.where(direction == 0, count0, count1)
        first = within % sought
        end = tl.minimum(sought, first + left)
        side = direction * STARTS
        places = within // sought * WALKS + tl.arange(0, BLOCK_M)
        asked = _descriptors(half, pixels + side, queue + side, places, count, own, COLUMNS)
        out = best + (side + places) * PITCH
        if TWICE:
            asked2 = _descriptors(half, pixels + side, queue + side, places + BLOCK_M, count, own, COLUMNS)
        for run in range(first, end):
            top = tl.zeros((BLOCK_M,), tl.int32)
            top2 = top
            for piece in tl.static_range(RUN // BLOCK_N):
                row = (base + run) * RUN + piece * BLOCK_N
                if half_tiles is None:
                    rows = row + tl.arange(0, BLOCK_N)
                    points = tl.load(half + rows.to(tl.int64)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
                else:
                    points = half_tiles.load([row, 0])
                top = tl.maximum(top, _top(asked, points))
                if TWICE:
                    top2 = tl.maximum(top2, _top(asked2, points))
            tl.store(out + run, top.to(tl.float32, bitcast=True), mask=places < count)
            if TWICE:
                tl.store(out + BLOCK_M * PITCH + run, top2.to(tl.float32, bitcast=True), mask=places + BLOCK_M < count)
        unit += end - first


@triton.jit
def _nearest(query, map_, n, best, SIZE: tl.constexpr, COLUMNS: tl.constexpr, RUN: tl.constexpr, RUNS: tl.constexpr):
    """The point of a map with the largest float32 score for a descriptor (SIZE,); the first of equals.

    `best` is the row of the walk. No run without a float16 score close to the best one can hold the nearest neighbour.
    """
    columns = tl.arange(0, COLUMNS)
    asked = tl.load(query + columns, mask=columns < SIZE, other=0.0)
    runs = tl.arange(0, RUNS)
    scores = tl.load(best + runs, mask=runs < tl.cdiv(n, RUN), other=0.0)
    runs = tl.where(scores >= tl.max(scores, 0) - MARGIN, runs, FAR)
    run = tl.min(runs, 0)
    nearest, highest = 0, float("-inf")
    while run < FAR:
        rows = run * RUN + tl.arange(0, RUN)
        points = _tile(map_, n, run * RUN, SIZE, COLUMNS, RUN)
        exact = tl.where(rows < n, tl.sum(points * asked[None, :], 1), float("-inf"))
        high = tl.max(exact, 0)
        row = tl.min(tl.where(exact == high, rows, FAR), 0)
        nearest = tl.where(high > highest, row, nearest)
        highest = tl.maximum(highest, high)
        runs = tl.where(runs > run, runs, FAR)
        run = tl.min(runs, 0)
    return nearest


@triton.jit
def settle(
    desc1,  # (n1, SIZE) float32
    desc2,  # (n2, SIZE) float32
    options,  # (8,) int32
    best_scores,  # (2, STARTS, PITCH) float32
    here,  # in and out: (2, STARTS) int32
    there,  # in and out: (2, STARTS) int32
    queue,  # in and out: (2 turns, 2, STARTS) int32
    counts,  # in and out: (8,) int32, this half trip's and the next one's
    slots,  # out: (n1,) int32, each match's pixel in image 2 at its pixel in image 1
    n1,
    n2,
    width1,
    width2,
    SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    RUN: tl.constexpr,
    STARTS: tl.constexpr,
    PITCH: tl.constexpr,
    RUNS: tl.constexpr,  # power of two, of a map's runs at least as many
    FORTH: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Move the walks in the queue to their nearest neighbours, and sort them into matches and the next queue. Grid: any."""
    _begin(OVERLAPS)
    count0 = tl.load(counts)
    count = count0 + tl.load(counts + 1)
    one_trip = tl.load(options + 3)
    tolerance = tl.load(options + 4)
    for place in range(tl.program_id(0), count, tl.num_programs(0)):
        direction = (place >= count0).to(tl.int32)
        place -= direction * count0
        side = direction * STARTS
        turn = side if FORTH else 2 * STARTS + side
        walk = side + tl.load(queue + turn + place)
        own = tl.load(here + walk)
        other = tl.load(there + walk)
        best = best_scores + (side + place) * PITCH
        if FORTH:
            if direction == 0:
                nearest = _nearest(desc1 + own * SIZE, desc2, n2, best, SIZE, COLUMNS, RUN, RUNS)
            else:
                nearest = _nearest(desc2 + own * SIZE, desc1, n1, best, SIZE, COLUMNS, RUN, RUNS)
            closed = nearest == other
            goes_on = nearest != other
            other = nearest
            tl.store(there + walk, other)
        else:
            if direction == 0:
                nearest = _nearest(desc2 + other * SIZE, desc1, n1, best, SIZE, COLUMNS, RUN, RUNS)
                width = width1
            else:
                nearest = _nearest(desc1 + other * SIZE, desc2, n2, best, SIZE, COLUMNS, RUN, RUNS)
                width = width2
            x, y = nearest % width - own % width, nearest // width - own // width
            closed = tl.where(tolerance > 0, x * x + y * y < tolerance, nearest == own)
            goes_on = (nearest != own) & (one_trip == 0)
            own = tl.where(tolerance > 0, own, nearest)
            tl.store(here + walk, own)
        if closed:
            tl.store(slots + tl.where(direction == 0, own, other), tl.where(direction == 0, other, own))
        if goes_on:
            next_place = tl.atomic_add(counts + 4 + direction, 1)
            next_turn = 2 * STARTS + side if FORTH else side
            tl.store(queue + next_turn + next_place, walk - side)


@triton.jit
def tally(
    slots,  # (n1,) int32
    tallies,  # out: (programs,) int32, matches in each program's piece
    n1,
    PIECE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Count the matches of each PIECE pixels of image 1. Grid: ceil(n1 / PIECE)."""
    _begin(OVERLAPS)
    pixels = tl.program_id(0) * PIECE + tl.arange(0, PIECE)
    found = tl.load(slots + pixels, mask=pixels < n1, other=-1) >= 0
    tl.store(tallies + tl.program_id(0), tl.sum(found.to(tl.int32), 0))


@triton.jit
def emit(
    slots,  # (n1,) int32
    tallies,  # (programs,) int32
    conf1,  # (n1,) float32
    conf2,  # (n2,) float32
    xy1,  # out: (n1, 2) int64, the matches' pixels in image 1 as x, y, in row-major order
    xy2,  # out: (n1, 2) int64, and in image 2
    confidence,  # out: (n1,) float32, the smaller of the two pixels'
    status,  # out: (4,) int32
    n1,
    width1,
    width2,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,  # power of two, programs at most
    OVERLAPS: tl.constexpr,
):
    """Write the list of matches. Grid: ceil(n1 / PIECE)."""
    _begin(OVERLAPS)
    piece = tl.program_id(0)
    pieces = tl.arange(0, PIECES)
    before = tl.sum(tl.load(tallies + pieces, mask=pieces < piece, other=0), 0)
    pixels = piece * PIECE + tl.arange(0, PIECE)
    found2 = tl.load(slots + pixels, mask=pixels < n1, other=-1)
    found = found2 >= 0
    place = before + tl.cumsum(found.to(tl.int32), 0) - 1
    low = tl.load(conf1 + pixels, mask=found, other=0.0)
    low = tl.minimum(low, tl.load(conf2 + found2, mask=found, other=0.0), propagate_nan=tl.PropagateNan.ALL)
    tl.store(xy1 + 2 * place, (pixels % width1).to(tl.int64), mask=found)
    tl.store(xy1 + 2 * place + 1, (pixels // width1).to(tl.int64), mask=found)
    tl.store(xy2 + 2 * place, (found2 % width2).to(tl.int64), mask=found)
    tl.store(xy2 + 2 * place + 1, (found2 // width2).to(tl.int64), mask=found)
    tl.store(confidence + place, low, mask=found)
    if piece == tl.num_programs(0) - 1:
        tl.store(status, before + tl.sum(found.to(tl.int32), 0))
