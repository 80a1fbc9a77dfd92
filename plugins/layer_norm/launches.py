"""LayerNorm as launches. Operands: x, scale, bias, out."""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.launch import Address, Constant, Launch, Value, launch
from smc.plugins.layer_norm.specification import LayerNorm


@dataclass(frozen=True)
class Tile:
    """How the work is cut: rows a program, and warps a program. With as many warps as rows, no row is spread over warps."""

    rows: int
    warps: int


def tiles(operation: LayerNorm, sm: int) -> list[Tile]:
    """Worth timing; the default first."""
    default = default_tile(operation, sm)
    return [default, *(tile for tile in (Tile(2, 2), Tile(4, 4), Tile(1, 4), Tile(1, 1), Tile(1, 2), Tile(8, 8)) if tile != default)]


def default_tile(operation: LayerNorm, sm: int) -> Tile:
    """Two rows a program, each of one warp's for up to 2048 channels: the fastest on the H200, but for few rows the same as others."""
    return Tile(2, min(16, 2 * max(1, _block(operation.channels) // 2048)))


def launches(operation: LayerNorm, tile: Tile, sm: int) -> list[Launch]:
    """The one launch."""
    overlaps = sm >= 90
    values: dict[str, Value] = {"x": Address("x", operation.dtype, operation.x_offset)}
    constants: dict[str, Constant] = {
        "EPS": operation.eps,
        "C": operation.channels,
        "WEIGHT_GROUP": 0 if operation.shared else operation.channels,
        "ROWS": tile.rows,
        "BLOCK": _block(operation.channels),
        "OVERLAPS": overlaps,
    }
    for name, dtype in (("scale", operation.scale), ("bias", operation.bias)):
        if dtype is None:
            constants[name] = None
        else:
            values[name] = Address(name, dtype)
    values["out"] = Address("out", operation.out_dtype, operation.out_offset)
    values |= {
        "rows": operation.rows,
        "x_row": operation.x_row,
        "x_group": operation.x_group,
        "out_row": operation.out_row,
        "out_group": operation.out_group,
    }
    grid = (-(-operation.rows // tile.rows), operation.groups, 1)
    return [launch("smc.plugins.layer_norm.kernel:layer_norm", grid, values, constants, warps=tile.warps, stages=1, overlaps=overlaps)]


def _block(channels: int) -> int:
    return 1 << (channels - 1).bit_length()
