"""What to launch for a bilinear enlargement, and how its work may be cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smc.plugins.conv.launches import map_arguments, power_of_two
from smc.plugins.launch import Address, Launch, Value, launch
from smc.plugins.upsample.specification import Upsample

KERNEL = "smc.plugins.upsample.kernel:upsample"


@dataclass(frozen=True)
class Tile:
    """How the work is cut: pixels of a program along each side, its channels (powers of two), and its warps."""

    height: int
    width: int
    channels: int
    warps: int


def tiles(op: Upsample, sm: int) -> list[Tile]:
    """Candidates worth timing, the default first."""
    first, channels = default_tile(op, sm), power_of_two(op.channels)
    found = [
        Tile(2, 4, channels, 4),
        Tile(2, 8, min(channels, 128), 4),
        Tile(2, 8, channels, 8),
        Tile(2, 8, min(channels, 128), 2),
        Tile(4, 8, min(channels, 64), 4),
    ]
    return [first, *(tile for tile in dict.fromkeys(found) if tile != first)]


def default_tile(op: Upsample, sm: int) -> Tile:
    """16 elements a thread, in runs of 8 channels, and all channels of a pixel in one program."""
    channels = min(256, power_of_two(op.channels))
    return Tile(256 // channels, 8, channels, warps=4)


def launches(op: Upsample, tile: Tile, sm: int) -> list[Launch]:
    """The launch, alone in its list. Operands: those of `specification`."""
    addresses, strides, constants = map_arguments({"residual": op.residual, "out": op.out, "out_relu": op.out_relu})
    overlaps = sm >= 90
    sizes: dict[str, Value] = {
        "height": op.height,
        "width": op.width,
        "out_height": op.out_height,
        "out_width": op.out_width,
        "scale_h": (op.height - 1) / max(op.out_height - 1, 1),
        "scale_w": (op.width - 1) / max(op.out_width - 1, 1),
    }
    x: dict[str, Value] = {"x_group": op.x.group, "x_batch": op.x.batch, "x_row": op.x.row, "x_column": op.x.column}
    tile_count = math.ceil(op.out_height / tile.height) * math.ceil(op.out_width / tile.width) * math.ceil(op.channels / tile.channels)
    return [
        launch(
            KERNEL,
            (tile_count, op.batch, op.groups),
            {"x": Address("x", op.x.dtype, op.x.offset), **addresses, **sizes, **x, **strides},
            {
                **constants,
                "C": op.channels,
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
