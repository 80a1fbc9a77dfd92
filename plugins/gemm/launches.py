"""From a matrix product to its launch: how it is cut into tiles, which cuts are worth timing, and the arguments."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smc.plugins.gemm.specification import Gemm
from smc.plugins.launch import ITEMSIZES, Address, Constant, Descriptor, Launch, Value, launch

_KERNEL = "smc.plugins.gemm.kernel:gemm"
_HOPPER = "smc.plugins.gemm.hopper:gemm"


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        block_m, block_n: outputs of a tile; powers of two, but for the Hopper kernel, whose consumers have a power of two of its rows each.
        block_k: elements of k a step; a power of two.
        warps: a program; a consumer, of the Hopper kernel, which has but one if that has 8.
        stages: steps whose operands are on their way at a time.
        tma: operands come by the tensor memory accelerator.
        swath: tiles down before the next column of tiles.
        consumers: of the Hopper kernel, groups of warps that multiply, at most 3; 0 for the plain kernel.
        block_n2: of the Hopper kernel, further columns of a tile, as a second power of two.
        producer: of the Hopper kernel, a warp for loads alone, which 3 consumers leave no registers for.
        programs: of the Hopper kernel, how many take turns with the tiles; 0: one a tile.
        turns: of the Hopper kernel, its two consumers have whole tiles in turns, not parts of each.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False
    swath: int = 8
    consumers: int = 0
    block_n2: int = 0
    producer: bool = True
    programs: int = 0
    turns: bool = False

    @property
    def rows(self) -> int:
        """Rows of a that one TMA load brings."""
        return self.block_m // (1 if self.turns else max(1, self.consumers))


_POINTERS = tuple(
    (block_m, block_n, block_k, warps, stages)
    for block_m, block_n, warps in ((64, 32, 4), (64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
    for block_k, stages in ((32, 3), (32, 4), (64, 2), (64, 3))
)
"""Rows, columns, elements of k, warps and stages of tiles worth timing for operands by pointers."""

_TMA = (
    (64, 32, 128, 4, 4),
    (64, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 128, 64, 4, 4),
    (128, 128, 64, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
)
"""The same for operands by TMA: for every product of the public model, one of these or of the next was within 2 % of the best of many
more on the H200."""

_HOPPER_TILES = (
    (1, 64, 0, 6, True),
    (1, 128, 0, 3, True),
    (1, 128, 0, 4, True),
    (2, 64, 32, 6, True),
    (2, 128, 0, 4, True),
    (2, 128, 64, 4, True),
    (2, 128, 64, 4, True, 132),
    (2, 256, 0, 3, True, 132),
    (3, 128, 64, 4, False),
    (3, 256, 0, 3, False),
    (3, 256, 0, 3, False, 132),
    (2, 128, 0, 5, True, 132, 4, 128),
    (2, 128, 64, 4, True, 132, 4, 128),
)
"""What `hopper_tile` takes for those of the Hopper kernel's tiles that are worth timing, all with 64 elements of k."""


def tiles(op: Gemm, sm: int) -> list[Tile]:
    """Cuts worth timing on compute capability `sm` (90 is 9.0), the default one among them. Some may not fit its shared memory."""
    size = ITEMSIZES[op.dtype]
    found = [default_tile(op, sm)]
    if sm >= 90 and _tma_reaches(op):
        found += [Tile(m, n, 2 * k // size, warps, stages, tma=True) for m, n, k, warps, stages in _TMA]
        if sm == 90 and size == 2:
            found += [hopper_tile(*cut) for cut in _HOPPER_TILES]
    else:
        found += [Tile(m, n, 2 * k // size, warps, stages) for m, n, k, warps, stages in _POINTERS]
    return [tile for tile in dict.fromkeys(found) if tile.block_m <= max(64, _power(op.m)) and tile.block_n <= max(64, _power(op.n))]


def hopper_tile(
    consumers: int, block_n: int, block_n2: int, stages: int, producer: bool, programs: int = 0, warps: int = 4, turns: int = 0
) -> Tile:
    """A tile of the Hopper kernel, with 16 rows a warp; `turns`: rows of the tiles that consumers take in turns."""
    rows = turns or 16 * warps * consumers
    return Tile(rows, block_n, 64, warps, stages, True, 8, consumers, block_n2, producer, programs, turns > 0)


def default_tile(op: Gemm, sm: int) -> Tile:
    """For GPUs where nothing was timed: the largest of three tiles that still gives every multiprocessor of a large card work."""
    size = ITEMSIZES[op.dtype]
    tma = sm >= 90 and _tma_reaches(op)
    block_k = 128 // size if tma else 32
    if size == 4:
        return Tile(64, 64, block_k, 4, 3, tma)
    for block_m, block_n, warps in ((128, 128, 8), (64, 128, 4)):
        if op.groups * math.ceil(op.m / block_m) * math.ceil(op.n / block_n) >= 96:
            return Tile(block_m, block_n, block_k, warps, 4 if tma else 3, tma)
    return Tile(64, 64, block_k, 4, 4, tma)


def launches(op: Gemm, tile: Tile, sm: int) -> list[Launch]:
    """The launch that computes `op`. Operands: a, weight, bias, cos, sin, residual, out, out_relu, those of them that there are.

    Raises:
        ValueError: the tile takes operands by TMA, which cannot reach them, or the Hopper kernel knows no such tile.
    """
    if (tile.turns and not (tile.consumers == 2 and tile.producer)) or (tile.consumers > 1 and tile.warps != 4):
        raise ValueError(f"turns are for two consumers and a producer, and 8 warps for one consumer: {tile}")
    overlaps = sm >= 90
    rotary, scatter = op.rotary, op.scatter
    values: dict[str, Value] = {}
    constants: dict[str, Constant] = {
        "N": op.n,
        "K": op.k,
        "A_ORDER": (op.a_group > 0) - (op.a_group < 0),
        "W_SHARED": op.w_shared,
        "BIAS_SHARED": op.bias_shared,
        "ROTARY": rotary.columns if rotary else 0,
        "HALF": rotary.half if rotary else 1,
        "ACTIVATION": op.activation,
        "SCALE": scatter.scale if scatter else 0,
        "OVERLAPS": overlaps,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "SWATH": tile.swath,
    }
    sizes: dict[str, Value] = {
        "r_row": op.r_row,
        "r_group": op.r_group,
        "out_row": op.out_row,
        "out_group": op.out_group,
        "tokens": rotary.tokens if rotary else 1,
        "width": scatter.width if scatter else 1,
    }

    def give(name: str, value: Value | None) -> None:
        if value is None:
            constants[name] = None
        else:
            values[name] = value

    def optional(name: str, dtype: str | None, offset: int = 0) -> None:
        give(name, None if dtype is None else Address(name, dtype, offset))

    if tile.tma:
        values["a"] = _a(op, tile.rows, tile.block_k)
        values["weight"] = _weight(op, tile.block_k, tile.block_n)
    else:
        values |= {"a": Address("a", op.dtype, op.a_offset), "weight": Address("weight", op.dtype)}
    if tile.consumers:
        give("weight2", _weight(op, tile.block_k, tile.block_n2) if tile.block_n2 else None)
    optional("bias", op.bias)
    optional("cos", rotary.dtype if rotary else None)
    optional("sin", rotary.dtype if rotary else None)
    staged = _stages_outputs(op, tile)
    residual_staged = staged > 0 and _stages_residual(op, tile)
    if residual_staged:
        staged = (tile.block_n + tile.block_n2) // _piece(op, tile)
        values["residual"] = _rows_of("residual", op, op.r_offset, op.r_group, op.r_row, tile)
    else:
        optional("residual", op.residual, op.r_offset)
    values["out"] = (
        _rows_of("out", op, op.out_offset, op.out_group, op.out_row, tile) if staged else Address("out", op.out_dtype, op.out_offset)
    )
    optional("out_relu", op.out_dtype if op.out_relu else None, op.out_offset)
    count = math.ceil(op.m / tile.block_m) * math.ceil(op.n / (tile.block_n + tile.block_n2))
    if tile.consumers:
        values |= {"m": op.m, "groups": op.groups, **sizes}
        constants |= {
            "CONSUMERS": tile.consumers,
            "WARPS": tile.warps,
            "ROWS": tile.rows,
            "TURNS": tile.turns,
            "BLOCK_N2": tile.block_n2,
            "STAGES": tile.stages,
            "STAGED": staged,
            "PRODUCER": tile.producer,
        }
        piece = _piece(op, tile)
        registers = _registers(tile)
        roomy = tile.block_n + tile.block_n2 < 256 and _sums(tile) <= 128  # the tables stay in registers beside the sums
        tables = rotary is not None and piece == 2 * rotary.half and rotary.columns % piece == 0 and roomy
        constants |= {
            "RESIDUAL_STAGED": residual_staged,
            "TABLES": tables,
            "EXACT": op.out_dtype == "float32",
            "PIECE": piece,
            "REGISTERS": registers,
        }
        programs = min(op.groups * count, tile.programs or op.groups * count)
        return [launch(_HOPPER, (programs, 1, 1), values, constants, warps=tile.warps, stages=1, registers=registers, overlaps=overlaps)]
    values |= {"m": op.m, "a_row": op.a_row, "a_group": op.a_group, **sizes}
    constants |= {"TMA": tile.tma, "BLOCK_M": tile.block_m, "PRECISION": "tf32x3" if op.dtype == "float32" else "ieee"}
    return [launch(_KERNEL, (count, op.groups, 1), values, constants, warps=tile.warps, stages=tile.stages, overlaps=overlaps)]


def _a(op: Gemm, rows: int, columns: int) -> Descriptor:
    """Strides of a tensor map are not negative: groups that go back are described from the last one on."""
    if not _tma_reaches(op):
        raise ValueError(f"TMA needs rows at multiples of 16 bytes: {op}")
    first = op.a_offset + min(0, (op.groups - 1) * op.a_group)
    if op.a_group:
        shape, strides = (op.groups, op.m, op.k), (abs(op.a_group), op.a_row, 1)
    else:
        shape, strides = (1, op.m, op.k), (op.a_row, op.a_row, 1)
    return Descriptor("a", op.dtype, shape, strides, (1, rows, columns), first)


def _weight(op: Gemm, rows: int, columns: int) -> Descriptor:
    groups = 1 if op.w_shared else op.groups
    return Descriptor("weight", op.dtype, (groups, op.k, op.n), (op.k * op.n, op.n, 1), (1, rows, columns))


def _stages_outputs(op: Gemm, tile: Tile) -> int:
    """Buffers a consumer for outputs that go through shared memory: those of the Hopper kernel in rows that a tensor map reaches."""
    if not tile.consumers or op.scatter or op.out_relu or not _map_reaches(op.out_dtype, op.groups, op.out_group, op.out_row):
        return 0
    return 2 if tile.producer and not tile.turns else 1


def _stages_residual(op: Gemm, tile: Tile) -> bool:
    """Whether the residual comes into the buffers of the outputs: it must be like them, and a program have one tile of modest size."""
    small = (tile.block_n + tile.block_n2) * tile.block_m * ITEMSIZES[op.out_dtype] <= 64 << 10
    return op.residual == op.out_dtype and _map_reaches(op.out_dtype, op.groups, op.r_group, op.r_row) and small and not tile.programs


def _map_reaches(dtype: str, groups: int, group: int, row: int) -> bool:
    """Whether a tensor map can describe rows of n elements: its strides are positive multiples of 16 bytes."""
    whole = 16 // ITEMSIZES[dtype]
    return row > 0 and row % whole == 0 and (groups == 1 or (group > 0 and group % whole == 0))


def _rows_of(name: str, op: Gemm, offset: int, group: int, row: int, tile: Tile) -> Descriptor:
    """Of out or residual."""
    strides = (group if op.groups > 1 else row, row, 1)
    return Descriptor(name, op.out_dtype, (op.groups, op.m, op.n), strides, (1, tile.rows, _piece(op, tile)), offset)


def _registers(tile: Tile) -> int:
    """A thread of the Hopper kernel. Where sums and threads are few enough, there is room beside the program for those of small kernels
    before and after it."""
    return 168 if tile.consumers == 3 or _sums(tile) > 96 else 128


def _sums(tile: Tile) -> int:
    """Of a thread of the Hopper kernel's consumers."""
    return tile.rows * (tile.block_n + tile.block_n2) // (32 * tile.warps)


def _piece(op: Gemm, tile: Tile) -> int:
    """Columns that are finished at a time: at most what a tensor map moves of a row in one swizzled block, 128 bytes."""
    return min(128 // ITEMSIZES[op.out_dtype], tile.block_n, tile.block_n2 or tile.block_n)


def _tma_reaches(op: Gemm) -> bool:
    size = ITEMSIZES[op.dtype]
    return all(stride * size % 16 == 0 for stride in (op.a_row, op.a_group, op.n))


def _power(x: int) -> int:
    """The power of two that is not below x."""
    return 1 << (x - 1).bit_length()
