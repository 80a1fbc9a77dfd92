"""Patches as launches. Operands: image, out."""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.launch import Address, Constant, Launch, Value, launch
from smc.plugins.patches.specification import Patches


@dataclass(frozen=True)
class Tile:
    """How the work is cut: patches a program, and warps a program."""

    patches: int
    warps: int


def tiles(operation: Patches, sm: int) -> list[Tile]:
    """Worth timing."""
    return [Tile(1, 8), Tile(2, 4), Tile(1, 4), Tile(2, 8), Tile(1, 2)]


def default_tile(operation: Patches, sm: int) -> Tile:
    """The fastest on the H200: more threads where each reads single bytes."""
    return Tile(1, 8) if operation.layout == "nhwc" else Tile(2, 4)


def launches(operation: Patches, tile: Tile, sm: int) -> list[Launch]:
    """The one launch."""
    overlaps = sm >= 90
    h, w = operation.grid
    rows, _ = operation.shape
    pixels = operation.height * operation.width
    values: dict[str, Value] = {
        "image": Address("image", operation.dtype),
        "out": Address("out", operation.out_dtype),
        "count": rows,
        "h": h,
        "w": w,
        "image_batch": pixels * operation.channels,
    }
    constants: dict[str, Constant] = {
        "SUBTRACT": operation.subtract,
        "MULTIPLY": operation.multiply,
        "C": operation.channels,
        "SIZE": operation.patch,
        "PATCHES": tile.patches,
        "BLOCK": _block(operation),
        "OVERLAPS": overlaps,
    }
    if operation.layout == "nhwc":
        values["image_row"] = operation.width * operation.channels
        constants |= {"image_channel": 1, "image_pixel": operation.channels}
    else:
        values |= {"image_channel": pixels, "image_row": operation.width}
        constants["image_pixel"] = 1
    grid = (-(-rows // tile.patches), 1, 1)
    return [launch("smc.plugins.patches.kernel:patches", grid, values, constants, warps=tile.warps, stages=1, overlaps=overlaps)]


def _block(operation: Patches) -> int:
    return 1 << (operation.shape[1] - 1).bit_length()
