"""What to launch for a bilinear enlargement, and how its work may be cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from smc.plugins.conv.launches import map_arguments, power_of_two
from smc.plugins.launch import Address, Launch, Value, launch
from smc.plugins.upsample.specification import Upsample

KERNEL = "smc.plugins.upsample.kernel:upsample"


@dataclass(frozen=True)
class Tile:
    """How the work is cut: cells (see `kernel`) of a program along each side, its channels (powers of two), and its warps."""

    height: int
    width: int
    channels: int
    warps: int


def tiles(op: Upsample, sm: int) -> list[Tile]:
    """Candidates worth timing, the default first."""
    first, channels = default_tile(op, sm), min(128, power_of_two(op.channels))
    found = [
        Tile(1, 4, channels, 2),
        Tile(1, 8, channels, 4),
        Tile(2, 8, channels, 4),
        Tile(2, 8, channels, 8),
        Tile(4, 4, channels, 8),
        Tile(4, 8, min(channels, 64), 8),
    ]
    return [first, *(tile for tile in dict.fromkeys(found) if tile != first)]


def default_tile(op: Upsample, sm: int) -> Tile:
    """One cell a thread, in runs of 8 channels, and all channels of a pixel in one program."""
    channels = min(256, power_of_two(op.channels))
    return Tile(256 // channels, 4, channels, warps=4)


def cell_of(size: int, out_size: int) -> int:
    """How many outputs along a side a cell has: 2 if 2k - 1 and 2k lie between the same two of x for every k, else 1."""
    positions = np.floor(np.arange(out_size, dtype=np.float32) * np.float32(_scale(size, out_size)))  # as the kernel has them
    return 2 if size <= out_size and np.array_equal(positions[1:-1:2], positions[2::2]) else 1


def _scale(size: int, out_size: int) -> float:
    return (size - 1) / max(out_size - 1, 1)


def launches(op: Upsample, tile: Tile, sm: int) -> list[Launch]:
    """The launch, alone in its list. Operands: those of `specification`."""
    addresses, strides, constants = map_arguments({"residual": op.residual, "out": op.out, "out_relu": op.out_relu})
    overlaps = sm >= 90
    rows, columns = cell_of(op.height, op.out_height), cell_of(op.width, op.out_width)
    sizes: dict[str, Value] = {
        "height": op.height,
        "width": op.width,
        "out_height": op.out_height,
        "out_width": op.out_width,
        "scale_h": _scale(op.height, op.out_height),
        "scale_w": _scale(op.width, op.out_width),
    }
    x: dict[str, Value] = {"x_group": op.x.group, "x_batch": op.x.batch, "x_row": op.x.row, "x_column": op.x.column}
    # Output y is in cell (y + rows - 1) // rows.
    tiles_h = (op.out_height + rows - 2) // rows // tile.height + 1
    tiles_w = (op.out_width + columns - 2) // columns // tile.width + 1
    return [
        launch(
            KERNEL,
            (tiles_w * math.ceil(op.channels / tile.channels), tiles_h, op.batch * op.groups),
            {"x": Address("x", op.x.dtype, op.x.offset), **addresses, **sizes, **x, **strides},
            {
                **constants,
                "GROUPS": op.groups,
                "C": op.channels,
                "ROWS": rows,
                "COLUMNS": columns,
                "TILE_H": tile.height,
                "TILE_W": tile.width,
                "BLOCK_C": tile.channels,
                "OVERLAPS": overlaps,
            },
            warps=tile.warps,
            stages=1,
            overlaps=overlaps,
        )
    ]


def operand_shapes(op: Upsample) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Operands of the operation, name -> (dtype, shape), where every map fills its operand."""
    large = (op.groups, op.batch, op.out_height, op.out_width, op.channels)
    maps = (("out", op.out), ("residual", op.residual), ("out_relu", op.out_relu))
    return {
        "x": (op.x.dtype, (op.groups, op.batch, op.height, op.width, op.channels)),
        **{name: (place.dtype, large) for name, place in maps if place},
    }
