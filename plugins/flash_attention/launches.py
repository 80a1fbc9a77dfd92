"""Attention as launches. Operands: q, k, v, out, and with rotation cos_q, sin_q, cos_k, sin_k."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from smc.plugins.flash_attention.kernel import LOG2_E, TILES, Tile
from smc.plugins.launch import Address, Constant, Descriptor, Launch, Value, launch

_FLOAT32_TILES = (
    Tile(32, 32, num_warps=4, num_stages=2),
    Tile(32, 16, num_warps=4, num_stages=2),
    Tile(64, 32, num_warps=4, num_stages=2),
)
_MULTIPROCESSORS = 132
"""Of the H100 and H200 (SXM), each of which holds one program of `hopper` at a time."""

TABLES = ("cos_q", "sin_q", "cos_k", "sin_k")


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Where an operand's heads lie, in elements: a head's channels are contiguous.

    Attributes:
        batch, row, head: from one to the next; 0 or negative, too.
        offset: of the first one; a multiple of 16 bytes.
    """

    batch: int
    row: int
    head: int
    offset: int = 0


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The operation of `specification` on operands in any strides.

    Attributes:
        batch, heads, n, m, head_size: q and out are (batch, n, heads, head_size), k and v (batch, m, heads, head_size).
        scale: of the scores, positive.
        dtype: of q, k, v and out: float16, bfloat16 or float32.
        q, k, v, out: where they lie; q, k and v may be parts of one buffer.
        tables: type of cos_q, sin_q (n, head_size / 2), cos_k and sin_k (m, head_size / 2), contiguous; None without rotation.
        kv_shift: image b attends to the keys and values of image (b + kv_shift) % batch: of the other view, where both are in one batch.
    """

    batch: int
    heads: int
    n: int
    m: int
    head_size: int
    scale: float
    dtype: str
    q: Heads
    k: Heads
    v: Heads
    out: Heads
    tables: Literal["float32", "float16"] | None = None
    kv_shift: int = 0


@dataclass(frozen=True)
class HopperTile:
    """How `hopper` cuts the work: groups of 64 query rows a program (2 or 3), keys a step, and buffers for keys and values."""

    groups: int
    block_n: int
    stages: int


def tiles(operation: Attention, sm: int) -> list[Tile | HopperTile]:
    """Worth timing."""
    if operation.dtype == "float32":
        return list(_FLOAT32_TILES)
    hopper = [HopperTile(3, 128, 3), HopperTile(2, 128, 3)] if _suits_hopper(operation, sm) else []
    return [*hopper, *TILES]


def default_tile(operation: Attention, sm: int) -> Tile | HopperTile:
    """The fastest on the H200 for compute capability 9.0, elsewhere one whose shared memory and registers every GPU has."""
    if operation.dtype == "float32":
        return _FLOAT32_TILES[0 if operation.head_size <= 64 else 1]
    if _suits_hopper(operation, sm):
        return min((HopperTile(3, 128, 3), HopperTile(2, 128, 3)), key=lambda tile: _rounds(operation, tile) * tile.groups)
    return TILES[2] if operation.head_size <= 64 else TILES[4]


def _rounds(operation: Attention, tile: HopperTile) -> int:
    """How many programs one after the other a multiprocessor has."""
    programs = math.prod(_hopper_grid(operation, tile))
    return -(-programs // _MULTIPROCESSORS)


def _hopper_grid(operation: Attention, tile: HopperTile) -> tuple[int, int, int]:
    return -(-operation.n // (64 * tile.groups)), operation.heads, operation.batch


def launches(operation: Attention, tile: Tile | HopperTile, sm: int) -> list[Launch]:
    """The one launch. Raises ValueError for a HopperTile that does not suit the operation or the GPU."""
    if isinstance(tile, HopperTile):
        if not _suits_hopper(operation, sm):
            raise ValueError(f"{tile} is for sm 9.0, 16-bit types, heads of at most 64 channels, no rotation, and strides that TMA takes")
        return [_hopper_launch(operation, tile)]
    return [_launch(operation, tile, overlaps=sm >= 90)]


def _launch(operation: Attention, tile: Tile, overlaps: bool) -> Launch:
    values: dict[str, Value] = {name: Address(name, operation.dtype, getattr(operation, name).offset) for name in ("q", "k", "v")}
    constants: dict[str, Constant] = {
        "SCALE": operation.scale * LOG2_E,
        "D": operation.head_size,
        "Q_OFFSET": 0,
        "K_OFFSET": 0,
        "V_OFFSET": 0,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "KV_SHIFT": operation.kv_shift,
        "OVERLAPS": overlaps,
    }
    if operation.tables is None:
        constants |= dict.fromkeys(TABLES)
    else:
        values |= {name: Address(name, operation.tables) for name in TABLES}
    values |= {"n": operation.n, "m": operation.m}
    for name in ("q", "k", "v", "out"):
        heads: Heads = getattr(operation, name)
        values |= {f"{name}_batch": heads.batch, f"{name}_row": heads.row, f"{name}_head": heads.head}
    values["out"] = Address("out", operation.dtype, operation.out.offset)
    grid = (-(-operation.n // tile.block_m), operation.heads, operation.batch)
    return launch(
        "smc.plugins.flash_attention.kernel:flash_attention",
        grid,
        values,
        constants,
        warps=tile.num_warps,
        stages=tile.num_stages,
        registers=tile.registers,
        overlaps=overlaps,
    )


def _hopper_launch(operation: Attention, tile: HopperTile) -> Launch:
    def operand(name: str, rows: int, block: int) -> Descriptor:
        shape = (operation.batch, operation.heads, rows, operation.head_size)
        offset = getattr(operation, name).offset
        return Descriptor(name, operation.dtype, shape, (*_strides(operation, name), 1), (1, 1, block, operation.head_size), offset)

    values: dict[str, Value] = {
        "q": operand("q", operation.n, 64),
        "k": operand("k", operation.m, tile.block_n),
        "v": operand("v", operation.m, tile.block_n),
        "out": operand("out", operation.n, 64),
        "m": operation.m,
    }
    constants: dict[str, Constant] = {
        "SCALE": operation.scale * LOG2_E,
        "D": operation.head_size,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.stages,
        "CONSUMERS": tile.groups,
        "MASKED": operation.m % tile.block_n != 0,
        "KV_SHIFT": operation.kv_shift,
        "OVERLAPS": True,
    }
    function = "smc.plugins.flash_attention.hopper:flash_attention"
    return launch(function, _hopper_grid(operation, tile), values, constants, warps=4, stages=1, overlaps=True)


def _suits_hopper(operation: Attention, sm: int) -> bool:
    return (
        sm == 90
        and operation.dtype in ("float16", "bfloat16")
        and operation.head_size in (32, 64)
        and operation.tables is None
        and all(stride > 0 and stride % 8 == 0 for name in ("q", "k", "v", "out") for stride in _strides(operation, name))
    )


def _strides(operation: Attention, name: str) -> tuple[int, int, int]:
    """Of batch, heads and rows of q, k, v or out. Where there is but one of them, its stride is never used: any will do."""
    heads: Heads = getattr(operation, name)
    rows = operation.n if name in ("q", "out") else operation.m
    counts = ((operation.batch, heads.batch), (operation.heads, heads.head), (rows, heads.row))
    batch, head, row = (stride if count > 1 else operation.head_size for count, stride in counts)
    return batch, head, row
