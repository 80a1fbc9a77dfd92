"""How matching is launched: one program for a pair of map shapes, whatever the starting points and the tolerance."""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.launch import Address, Constant, Descriptor, Launch, Value, launch
from smc.plugins.matching.specification import MAX_WALK, Matching

_KERNELS = "smc.plugins.matching.kernel:"

PIECE = 1024
"""Pixels of image 1 whose matches one program writes."""

INPUTS = ("desc1", "desc2", "conf1", "conf2", "starts", "options")
OUTPUTS = ("status", "xy1", "xy2", "confidence")

_OPTIONS, _STATUS = 8, 4  # values of `options` and `status`; the kernels say which
_HALVES = 32  # rows of `counts`: a power of two above 2 * MAX_WALK, as the last half trip writes a row that nothing reads


@dataclass(frozen=True)
class Tile:
    """How the search is cut.

    Attributes:
        block_m: walks whose scores a program holds at once.
        block_n: points likewise.
        twice: whether it goes through the points with two times block_m walks.
        run: points of which only the best score is kept; a multiple of block_n, a power of two.
        warps, stages, registers: of `search`.
        programs, settlers: of `search` and of `settle`: any number is right, as many as the GPU holds at once is fast.
    """

    block_m: int
    block_n: int
    run: int
    twice: bool
    warps: int
    stages: int
    registers: int | None = None
    programs: int = 396
    settlers: int = 660


def tiles(op: Matching, sm: int) -> list[Tile]:
    """Worth timing. On the H200 at 512x384, step 8, the first is the fastest: 62 us a search of all starting points."""
    return [
        Tile(64, 256, 256, twice=True, warps=4, stages=3),
        Tile(64, 256, 256, twice=True, warps=4, stages=2),
        Tile(64, 128, 256, twice=True, warps=4, stages=3, programs=528),
        Tile(128, 128, 256, twice=True, warps=4, stages=3),
        Tile(128, 128, 256, twice=False, warps=4, stages=3),
        Tile(128, 64, 256, twice=False, warps=4, stages=3, programs=528),
    ]


def default_tile(op: Matching, sm: int) -> Tile:
    """The fastest on the H200; older GPUs, whose products keep both factors in registers, get smaller pieces."""
    return tiles(op, sm)[0] if sm >= 90 else Tile(128, 64, 256, twice=False, warps=4, stages=3)


def operand_shapes(op: Matching) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The inputs and outputs, name -> (dtype, shape). `smc.plugins.matching.kernel` says what `options` and `status` hold."""
    return {
        "desc1": ("float32", (*op.shape1, op.size)),
        "desc2": ("float32", (*op.shape2, op.size)),
        "conf1": ("float32", op.shape1),
        "conf2": ("float32", op.shape2),
        "starts": ("int32", (2, op.starts)),
        "options": ("int32", (_OPTIONS,)),
        "status": ("int32", (_STATUS,)),
        "xy1": ("int64", (op.points1, 2)),
        "xy2": ("int64", (op.points1, 2)),
        "confidence": ("float32", (op.points1,)),
    }


def workspace(op: Matching, tile: Tile) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Operands beyond the operation's own, name -> (dtype, shape). They may hold anything before the first run with options[2] = 1, and
    belong to the launches until the last run of that list of matches."""
    runs1, runs2 = _runs(op, tile)
    starts = op.starts
    return {
        "half": ("float16", ((runs1 + runs2) * tile.run, _columns(op))),
        "norms": ("int32", (2, _power_of_two(max(runs1, runs2)))),
        "slots": ("int32", (op.points1,)),
        "here": ("int32", (2, starts)),
        "there": ("int32", (2, starts)),
        "queue": ("int32", (2, 2, starts)),
        "counts": ("int32", (_HALVES, 4)),
        "best": ("float32", (2, starts, _pitch(op, tile))),
        "tallies": ("int32", (-(-op.points1 // PIECE),)),
    }


def launches(op: Matching, tile: Tile, sm: int, walk: int = MAX_WALK) -> list[Launch]:
    """The whole of it, in order; `walk` round trips at most. Operands: those of `operand_shapes`, and those of `workspace`."""
    overlaps = sm >= 90
    runs1, runs2 = _runs(op, tile)
    parts, starts, columns = _power_of_two(max(runs1, runs2)), op.starts, _columns(op)
    shapes: dict[str, Value] = {"n1": op.points1, "n2": op.points2}
    sizes: dict[str, Constant] = {"SIZE": op.size, "COLUMNS": columns, "RUN": tile.run}
    memory = operand_shapes(op) | workspace(op, tile)

    def at(*names: str) -> dict[str, Value]:
        return {name: Address(name, memory[name][0]) for name in names}

    def call(
        function: str,
        grid: tuple[int, int, int],
        values: dict[str, Value],
        constants: dict[str, Constant],
        warps: int = 4,
        stages: int = 1,
        registers: int | None = None,
    ) -> Launch:
        return launch(
            _KERNELS + function,
            grid,
            values,
            constants | {"OVERLAPS": overlaps},
            warps=warps,
            stages=stages,
            registers=registers,
            overlaps=overlaps,
        )

    prepare = launch(
        _KERNELS + "prepare",
        (max(runs1 + runs2, 2 * starts // tile.run), 1, 1),
        at("desc1", "desc2", "starts", "options", "half", "norms", "slots", "here", "there", "queue", "counts") | shapes,
        sizes | {"STARTS": starts, "PARTS": parts, "HALVES": _HALVES},
        warps=4,
        stages=1,
    )
    rescale_grid = (min(64, max(runs1, runs2)), 2, 1)
    rescale = call("rescale", rescale_grid, at("desc1", "desc2", "options", "norms", "half", "status") | shapes, sizes | {"PARTS": parts})

    half_tiles = Descriptor("half", "float16", memory["half"][1], (columns, 1), (tile.block_n, columns))
    searched = at("half") | ({"half_tiles": half_tiles} if sm >= 90 else {}) | at("here", "there", "queue")
    search_constants: dict[str, Constant] = {
        "COLUMNS": columns,
        "RUN": tile.run,
        "STARTS": starts,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PITCH": _pitch(op, tile),
        "TWICE": tile.twice,
    }
    if sm < 90:
        search_constants["half_tiles"] = None
    scores: dict[str, Value] = {"best_scores": Address("best", "float32")}
    widths: dict[str, Value] = {"width1": op.shape1[1], "width2": op.shape2[1]}
    halves = []
    for half in range(2 * walk):
        forth = half % 2 == 0
        counts = {"counts": Address("counts", "int32", 4 * half)}
        halves += [
            call(
                "search",
                (tile.programs, 1, 1),
                searched | counts | at("best") | shapes,
                search_constants | {"FORTH": forth},
                tile.warps,
                tile.stages,
                tile.registers,
            ),
            call(
                "settle",
                (tile.settlers, 1, 1),
                at("desc1", "desc2", "options") | scores | at("here", "there", "queue") | counts | at("slots") | shapes | widths,
                sizes | {"STARTS": starts, "PITCH": _pitch(op, tile), "RUNS": parts, "FORTH": forth},
            ),
        ]

    pieces = -(-op.points1 // PIECE)
    tally = call("tally", (pieces, 1, 1), at("slots", "tallies") | {"n1": op.points1}, {"PIECE": PIECE})
    emit = call(
        "emit",
        (pieces, 1, 1),
        at("slots", "tallies", "conf1", "conf2", "xy1", "xy2", "confidence", "status") | {"n1": op.points1} | widths,
        {"PIECE": PIECE, "PIECES": _power_of_two(pieces)},
    )
    return [prepare, rescale, *halves, tally, emit]


def _runs(op: Matching, tile: Tile) -> tuple[int, int]:
    return -(-op.points1 // tile.run), -(-op.points2 // tile.run)


def _pitch(op: Matching, tile: Tile) -> int:
    """Values from one walk's best scores to the next one's: whole cache sectors."""
    return -(-max(_runs(op, tile)) // 8) * 8


def _columns(op: Matching) -> int:
    """Columns of the float16 maps: the descriptor, the bias, and zeros up to a power of two that the matrix units take."""
    return max(16, _power_of_two(op.size + 1))


def _power_of_two(count: int) -> int:
    """The smallest power of two that is not below."""
    return 1 << (count - 1).bit_length()
