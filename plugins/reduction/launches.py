"""Reduction as launches. Operands: x, out."""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.launch import Address, Constant, Launch, Value, launch
from smc.plugins.reduction.specification import Reduction


@dataclass(frozen=True)
class Tile:
    """How the work is cut: elements at a time (a power of two), and warps a program."""

    elements: int
    warps: int


def tiles(operation: Reduction, sm: int) -> list[Tile]:
    """Worth timing."""
    return [Tile(1024, 4), Tile(2048, 4), Tile(512, 4)]


def default_tile(operation: Reduction, sm: int) -> Tile:
    """8 elements a thread."""
    return Tile(1024, 4)


def launches(operation: Reduction, tile: Tile, sm: int) -> list[Launch]:
    """The one launch."""
    overlaps = sm >= 90
    columns = min(tile.elements, 1 << max(operation.columns - 1, 0).bit_length())
    rows = tile.elements // columns
    beyond = operation.x_offset % 16  # an address is a multiple of 16 bytes
    values: dict[str, Value] = {
        "x": Address("x", operation.dtype, operation.x_offset - beyond),
        "out": Address("out", operation.out_dtype),
        "x_offset": beyond,
        "rows": operation.rows,
        "columns": operation.columns,
        "x_row": operation.x_row,
    }
    constants: dict[str, Constant] = {"NORM": operation.function == "l2", "ROWS": rows, "COLUMNS": columns, "OVERLAPS": overlaps}
    if operation.x_column == 1:
        constants["x_column"] = 1
    else:
        values["x_column"] = operation.x_column
    grid = (-(-operation.rows // rows), 1, 1)
    return [launch("smc.plugins.reduction.kernel:reduction", grid, values, constants, warps=tile.warps, stages=1, overlaps=overlaps)]
