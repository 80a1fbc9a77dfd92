"""What to launch for a convolution, and how its work may be cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from smc.plugins.conv.specification import Conv, Map
from smc.plugins.launch import Address, Constant, Descriptor, Launch, Value, launch

KERNEL = "smc.plugins.conv.kernel:conv"
REDUCE = "smc.plugins.conv.kernel:reduce"
HOPPER = "smc.plugins.conv.hopper:conv"


@dataclass(frozen=True)
class Tile:
    """How the work is cut.

    Attributes:
        height, width: pixels of a program; powers of two, 16 pixels or more together.
        channels: of the output, of a program; a power of two, 16 or more.
        depth: channels of x a step; a power of two, 16 or more.
        warps: of a program.
        stages: buffers for x and weights.
        splits: programs that share the steps of one tile.
        tma: whether the copy engine fetches x and weights (sm 9.0 and newer, stride 1).
        registers: the most a thread may use; None for the compiler's choice.
    """

    height: int
    width: int
    channels: int
    depth: int
    warps: int
    stages: int
    splits: int = 1
    tma: bool = False
    registers: int | None = None

    def count(self, op: Conv) -> int:
        """Programs of the launch."""
        tiles = math.ceil(op.out_height / self.height) * math.ceil(op.out_width / self.width) * math.ceil(op.out_channels / self.channels)
        return op.groups * op.batch * tiles * self.splits


@dataclass(frozen=True)
class HopperTile:
    """How the work is cut for the kernels of `hopper`.

    Attributes:
        groups: of four warps, 2 or 3.
        rows: of 64 pixels, of a group of warps: 1 or 2.
        channels: of the output, of a program; a power of two, 16 to 256.
        x_stages, weight_stages: buffers, at least 2 and 3; as many of the latter as groups, or more.
        splits: programs that share the steps of one tile.
    """

    groups: int
    rows: int
    channels: int
    x_stages: int
    weight_stages: int
    splits: int = 1

    def count(self, op: Conv) -> int:
        """Programs of the launch."""
        tiles = math.ceil(op.out_height / (self.groups * self.rows)) * math.ceil(op.out_width / 64)
        return op.groups * op.batch * tiles * math.ceil(op.out_channels / self.channels) * self.splits


def has_hopper(op: Conv, sm: int) -> bool:
    """Whether the kernels of `hopper` take this convolution."""
    maps = [place for place in (op.x, op.out, op.out_relu) if place]
    same = all(place.dtype == op.x.dtype and _has_descriptor(place) for place in maps)
    return sm == 90 and op.stride == 1 and op.size % 2 == 1 and same and op.x.dtype != "float32"


def _has_descriptor(place: Map) -> bool:
    """The copy engine knows no negative strides."""
    return min(place.group, place.batch, place.row, place.column) >= 0


def has_tma(op: Conv, sm: int) -> bool:
    """Whether the copy engine can fetch x as this convolution sees it."""
    return sm >= 90 and op.stride == 1 and _has_descriptor(op.x)


def tiles(op: Conv, sm: int) -> list[Tile | HopperTile]:
    """Candidates worth timing, the default first."""
    first, most = default_tile(op, sm), power_of_two(op.out_channels)
    found: list[Tile | HopperTile] = []
    if has_hopper(op, sm) and op.out_width > 32:  # in narrower images more than half of their 64 columns would be idle
        found += [tile for tile in HOPPER_TILES if tile.channels <= most]
    if op.x.dtype != "float32":
        found += [_cut(op, sm, *cut) for cut in (CUTS_90 if sm >= 90 else CUTS_80)]
    split = [replace(tile, splits=n) for tile in found for n in _splits(op, tile)]
    return [first, *(tile for tile in dict.fromkeys(split) if tile != first)]


def _cut(op: Conv, sm: int, pixels: int, channels: int, warps: int, stages: int) -> Tile:
    """So many pixels, in rows as wide as the image allows, and at most so many channels, for 16-bit types."""
    width = min(max(8, power_of_two(op.out_width)), pixels)
    # Blocks of more than one row come into registers, not straight to the products: the copy engine is of no use there.
    tma = has_tma(op, sm) and width == pixels
    return Tile(pixels // width, width, min(channels, power_of_two(op.out_channels)), 64 if sm >= 90 else 32, warps, stages, tma=tma)


HOPPER_TILES = (
    HopperTile(3, 1, 256, 2, 4),
    HopperTile(2, 1, 256, 2, 4),
    HopperTile(3, 2, 128, 2, 4),
    HopperTile(2, 2, 128, 2, 6),
    HopperTile(2, 1, 128, 3, 6),
    HopperTile(3, 1, 64, 3, 8),
)
"""The largest first. On the H200 the first is the fastest for 256 channels from 96 x 128 pixels on, the third for 128 channels."""
CUTS_90 = ((128, 256, 8, 3), (128, 128, 8, 4), (64, 128, 4, 4), (64, 64, 4, 5), (64, 64, 4, 6))
CUTS_80 = ((128, 128, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (64, 64, 4, 4))
"""Pixels, channels, warps and stages of candidates for sm 9.0 and newer, and for those before it."""

_PROGRAMS = 264
"""Programs that a launch should not need more of for its work to be split: two for each of the H200's multiprocessors."""


def _splits(op: Conv, tile: Tile | HopperTile) -> list[int]:
    """How often a tile's steps may be split: not at all if that makes programs enough, else so that they are."""
    most = min(_PROGRAMS // tile.count(op), 16)
    return [1] if most < 2 else [n for n in (1, 2, 3, 4, 5, 6, 8, 12, 16) if most // 3 <= n <= most]


def default_tile(op: Conv, sm: int) -> Tile | HopperTile:
    """For GPUs on which nothing was timed: the largest tile that still makes 96 programs; if none does, the smallest, its steps split
    until there are some 192. On the H200 this is within a tenth of the fastest for the DPT heads of one pair at 512 x 384."""
    if op.x.dtype == "float32":
        return Tile(4, 8, min(64, power_of_two(op.out_channels)), 32, warps=4, stages=2)
    if has_hopper(op, sm) and op.out_width >= 48:
        for large in HOPPER_TILES[:4]:
            if large.channels <= power_of_two(op.out_channels) and large.count(op) >= 96:
                return large
    for channels, stages in ((128, 4), (64, 5)):
        tile = _cut(op, sm, 64, channels, 4, stages)
        if tile.count(op) >= 96:
            return tile
    return replace(tile, splits=max(1, min(8, round(192 / tile.count(op)), steps(op, tile))))


def workspace(op: Conv, tile: Tile | HopperTile) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Operands beyond the operation's own that the launches write and read: name -> (dtype, shape)."""
    if tile.splits == 1:
        return {}
    return {"partial": ("float32", (tile.splits, op.groups, op.batch, op.out_height, op.out_width, op.out_channels))}


def launches(op: Conv, tile: Tile | HopperTile, sm: int) -> list[Launch]:
    """The launches, in order. Operands: those of `specification`, and those of `workspace`."""
    overlaps = sm >= 90
    addresses, strides, absent = map_arguments({"residual": op.residual, "out": op.out, "out_relu": op.out_relu})
    if op.bias:
        addresses = {"bias": Address("bias", op.bias), **addresses}
    else:
        absent["bias"] = None
    relu: dict[str, Constant] = {"RELU": op.activation == "relu", "OVERLAPS": overlaps}
    sizes: dict[str, Value] = {"out_height": op.out_height, "out_width": op.out_width, "batches": op.batch}
    partial: dict[str, Value] = {"partial": Address("partial", "float32")}
    ends = partial if tile.splits > 1 else addresses
    none: dict[str, Constant] = dict.fromkeys(sorted({"partial", *addresses, *absent} - {*ends}))
    grid = (tile.count(op) // (op.groups * op.batch), op.batch, op.groups)
    if isinstance(tile, HopperTile):
        if not has_hopper(op, sm):
            raise ValueError("these kernels take convolutions of stride 1 and odd size, one 16-bit type, no negative strides, and sm 9.0")
        blocks = {
            name: descriptor(op, name, place, (1, 1, 1, 64, tile.channels))
            for name, place in (("out", op.out), ("out_relu", op.out_relu))
            if place
        }
        residual = {name: value for name, value in strides.items() if name.startswith("residual")}
        first = launch(
            HOPPER,
            grid,
            {
                **hopper_inputs(op, tile),
                **{name: blocks.get(name, value) for name, value in ends.items()},
                **sizes,
                "splits": tile.splits,
                **residual,
            },
            {**hopper_constants(op, tile), "PADDING": op.padding, "SPLIT": tile.splits > 1, **none, **relu},
            warps=4,
            stages=1,
            overlaps=overlaps,
        )
    else:
        x: dict[str, Value] = {"x_group": op.x.group, "x_batch": op.x.batch, "x_row": op.x.row, "x_column": op.x.column}
        first = launch(
            KERNEL,
            grid,
            {**inputs(op, tile, sm), **ends, "height": op.height, "width": op.width, **sizes, "splits": tile.splits, **x, **strides},
            {**convolve_constants(op, tile), "SPLIT": tile.splits > 1, **none, **relu},
            warps=tile.warps,
            stages=tile.stages,
            registers=tile.registers,
            overlaps=overlaps,
        )
    if tile.splits == 1:
        return [first]
    pixels, channels = 8, min(128, power_of_two(op.out_channels))
    second = launch(
        REDUCE,
        (math.ceil(op.out_height * op.out_width / pixels) * math.ceil(op.out_channels / channels), op.batch, op.groups),
        {**partial, **addresses, **sizes, **strides},
        {"C_OUT": op.out_channels, "PIXELS": pixels, "BLOCK_N": channels, "SPLITS": tile.splits, **absent, **relu},
        warps=4,
        stages=1,
        overlaps=overlaps,
    )
    return [first, second]


def inputs(op: Conv, tile: Tile, sm: int) -> dict[str, Value]:
    """The arguments x and weight, as `convolve` takes them. Raises ValueError if the copy engine cannot fetch them as the tile says."""
    if not tile.tma:
        return {"x": Address("x", op.x.dtype, op.x.offset), "weight": Address("weight", op.x.dtype)}
    if not has_tma(op, sm):
        raise ValueError("the copy engine fetches convolutions of stride 1 and no negative strides, on sm 9.0 and newer")
    return {
        "x": descriptor(op, "x", op.x, (1, 1, tile.height, tile.width, tile.depth)),
        "weight": weight_descriptor(op, (1, tile.depth, tile.channels)),
    }


def hopper_inputs(op: Conv, tile: HopperTile) -> dict[str, Value]:
    """The arguments x and weight of the kernels of `hopper`. Rows of x are copied in boxes, of powers of two."""
    rows = tile.groups * tile.rows + op.size - 1
    return {"x": descriptor(op, "x", op.x, (1, 1, rows & -rows, 64, 64)), "weight": weight_descriptor(op, (1, 64, tile.channels))}


def descriptor(op: Conv, name: str, place: Map, block: tuple[int, ...]) -> Descriptor:
    """A map of x's or of out's shape."""
    image = (op.height, op.width, op.in_channels) if name == "x" else (op.out_height, op.out_width, op.out_channels)
    strides = (place.group, place.batch, place.row, place.column, 1)
    return Descriptor(name, place.dtype, (op.groups, op.batch, *image), strides, block, place.offset)


def weight_descriptor(op: Conv, block: tuple[int, ...]) -> Descriptor:
    """The weights as (groups x taps, in_channels, out_channels)."""
    shape = (op.groups * op.size**2, op.in_channels, op.out_channels)
    return Descriptor("weight", op.x.dtype, shape, (op.in_channels * op.out_channels, op.out_channels, 1), block)


def hopper_constants(op: Conv, tile: HopperTile) -> dict[str, Constant]:
    """The compile-time arguments that the kernels of `hopper` share."""
    return {
        "C_IN": op.in_channels,
        "C_OUT": op.out_channels,
        "SIZE": op.size,
        "BLOCK_N": tile.channels,
        "GROUPS": tile.groups,
        "ROWS": tile.rows,
        "X_STAGES": tile.x_stages,
        "WEIGHT_STAGES": tile.weight_stages,
    }


def convolve_constants(op: Conv, tile: Tile) -> dict[str, Constant]:
    """The compile-time arguments of `convolve`."""
    return {
        "C_IN": op.in_channels,
        "C_OUT": op.out_channels,
        "SIZE": op.size,
        "STRIDE": op.stride,
        "PADDING": op.padding,
        "TILE_H": tile.height,
        "TILE_W": tile.width,
        "BLOCK_N": tile.channels,
        "BLOCK_K": tile.depth,
        "TMA": tile.tma,
        "PRECISION": "tf32x3" if op.x.dtype == "float32" else "tf32",
    }


def map_arguments(maps: Mapping[str, Map | None]) -> tuple[dict[str, Value], dict[str, Value], dict[str, Constant]]:
    """What a kernel takes for each map: its pointer, its strides (zeros if there is no map), and None instead of a pointer."""
    addresses: dict[str, Value] = {name: Address(name, place.dtype, place.offset) for name, place in maps.items() if place}
    strides: dict[str, Value] = {
        f"{name}_{side}": getattr(place, side) if place else 0
        for name, place in maps.items()
        for side in ("group", "batch", "row", "column")
    }
    return addresses, strides, {name: None for name, place in maps.items() if place is None}


def steps(op: Conv, tile: Tile) -> int:
    """Products that one program adds up without splits."""
    return op.size**2 * math.ceil(op.in_channels / tile.depth)


def power_of_two(size: int) -> int:
    """The least that holds `size`, and at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def operand_shapes(op: Conv) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Operands of the operation, name -> (dtype, shape), where every map fills its operand."""
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.out_channels)
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "x": (op.x.dtype, (op.groups, op.batch, op.height, op.width, op.in_channels)),
        "weight": (op.x.dtype, (op.groups, op.size, op.size, op.in_channels, op.out_channels)),
    }
    if op.bias:
        shapes["bias"] = (op.bias, (op.groups, op.out_channels))
    shapes |= {
        name: (place.dtype, shape)
        for name, place in zip(("out", "residual", "out_relu"), (op.out, op.residual, op.out_relu), strict=True)
        if place
    }
    return shapes
