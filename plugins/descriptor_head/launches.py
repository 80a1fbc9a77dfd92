"""DescriptorHead as launches. Operands: f, desc, desc_conf, desc16."""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.descriptor_head.specification import DescriptorHead
from smc.plugins.launch import Address, Constant, Launch, Value, launch


@dataclass(frozen=True)
class Tile:
    """How the work is cut: pixels of a token a program, and warps a program."""

    pixels: int
    warps: int


def tiles(operation: DescriptorHead, sm: int) -> list[Tile]:
    """Worth timing."""
    return [Tile(pixels, warps) for pixels, warps in ((256, 4), (128, 4), (64, 2), (256, 8), (128, 8), (64, 4))]


def default_tile(operation: DescriptorHead, sm: int) -> Tile:
    """A token of the public model a program: the fastest on the H200, by little."""
    return Tile(256, 4)


def launches(operation: DescriptorHead, tile: Tile, sm: int) -> list[Launch]:
    """The one launch."""
    overlaps = sm >= 90
    values: dict[str, Value] = {
        "f": Address("f", operation.dtype, operation.f_offset),
        "desc": Address("desc", "float32"),
        "desc_conf": Address("desc_conf", "float32"),
    }
    constants: dict[str, Constant] = {
        "CONFIDENCE": operation.confidence,
        "LEAST_NORM": operation.least_norm,
        "C": operation.channels,
        "SIZE": operation.patch,
        "PIXELS": tile.pixels,
        "PADDED": operation.padded,
        "OVERLAPS": overlaps,
    }
    if operation.desc16:
        values["desc16"] = Address("desc16", "float16")
    else:
        constants["desc16"] = None
    values |= {"w": operation.w, "f_row": operation.f_row, "f_group": operation.f_group}
    grid = (operation.batch * operation.h * operation.w, operation.groups, -(-(operation.patch**2) // tile.pixels))
    return [
        launch("smc.plugins.descriptor_head.kernel:descriptor_head", grid, values, constants, warps=tile.warps, stages=1, overlaps=overlaps)
    ]
