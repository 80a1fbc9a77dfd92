"""What to launch for the last layers of a DPT head, and how its work may be cut."""

from __future__ import annotations

from smc.plugins.conv import launches as conv_launches
from smc.plugins.conv.launches import HopperTile, Tile
from smc.plugins.launch import Address, Constant, Launch, Value, launch
from smc.plugins.point_head.specification import PointHead

KERNEL = "smc.plugins.point_head.kernel:point_head"
HOPPER = "smc.plugins.point_head.hopper:point_head"


def tiles(op: PointHead, sm: int) -> list[Tile | HopperTile]:
    """Candidates worth timing, the default first. They hold all channels and are not split."""
    first, channels = default_tile(op, sm), conv_launches.power_of_two(op.channels)
    found: list[Tile | HopperTile] = []
    if conv_launches.has_hopper(op.conv, sm):
        found += [tile for tile in conv_launches.HOPPER_TILES if tile.channels == channels]
    if op.x.dtype != "float32" and sm >= 90:
        found.append(Tile(1, 128, channels, 64, 8, 4, tma=conv_launches.has_tma(op.conv, sm)))
    elif op.x.dtype != "float32":
        found += [Tile(8, 8, channels, 32, 4, 3), Tile(8, 16, channels, 32, 8, 3), Tile(8, 16, channels, 64, 8, 2)]
    return [first, *(tile for tile in found if tile != first)]


def default_tile(op: PointHead, sm: int) -> Tile | HopperTile:
    """The largest tile whose sums fit the registers; all channels a program."""
    channels = conv_launches.power_of_two(op.channels)
    if op.x.dtype == "float32":
        return Tile(4, 8, channels, 32, warps=4, stages=2)
    if conv_launches.has_hopper(op.conv, sm):
        for large in conv_launches.HOPPER_TILES:
            if large.channels == channels:
                return large
    return Tile(8, 16 if channels <= 128 else 8, channels, 32, warps=8, stages=3)


def launches(op: PointHead, tile: Tile | HopperTile, sm: int) -> list[Launch]:
    """The launch, alone in its list. Operands: those of `specification`."""
    if tile.channels < op.channels or tile.splits > 1:
        raise ValueError("a program makes all channels of its pixels")
    conv, x, overlaps = op.conv, op.x, sm >= 90
    ends: dict[str, Value] = {
        "bias": Address("bias", op.bias),
        "weight_out": Address("weight_out", x.dtype),
        "bias_out": Address("bias_out", op.bias),
        "pts3d": Address("pts3d", "float32"),
        "conf": Address("conf", "float32"),
        "height": op.height,
        "width": op.width,
    }
    strides: dict[str, Value] = {"pts3d_group": op.pts3d_group, "conf_group": op.conf_group}
    floors: dict[str, Constant] = {"NORM_FLOOR": op.norm_floor, "CONF_FLOOR": op.conf_floor, "OVERLAPS": overlaps}
    grid = (tile.count(conv) // (op.groups * op.batch), op.batch, op.groups)
    if isinstance(tile, HopperTile):
        if not conv_launches.has_hopper(conv, sm):
            raise ValueError("this kernel is for operands of 16 bits on sm 9.0")
        values = {**conv_launches.hopper_inputs(conv, tile), **ends, **strides}
        return [
            launch(HOPPER, grid, values, {**conv_launches.hopper_constants(conv, tile), **floors}, warps=4, stages=1, overlaps=overlaps)
        ]
    x_strides: dict[str, Value] = {"x_group": x.group, "x_batch": x.batch, "x_row": x.row, "x_column": x.column}
    return [
        launch(
            KERNEL,
            grid,
            {**conv_launches.inputs(conv, tile, sm), **ends, **x_strides, **strides},
            {**conv_launches.convolve_constants(conv, tile), **floors},
            warps=tile.warps,
            stages=tile.stages,
            registers=tile.registers,
            overlaps=overlaps,
        )
    ]


def operand_shapes(op: PointHead) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Operands of the operation, name -> (dtype, shape), where x fills its operand and the groups' outputs lie side by side."""
    image = (op.batch, op.height, op.width)
    return {
        "x": (op.x.dtype, (op.groups, *image, op.in_channels)),
        "weight": (op.x.dtype, (op.groups, op.size, op.size, op.in_channels, op.channels)),
        "bias": (op.bias, (op.groups, op.channels)),
        "weight_out": (op.x.dtype, (op.groups, op.channels, 4)),
        "bias_out": (op.bias, (op.groups, 4)),
        "pts3d": ("float32", (op.groups, *image, 3)),
        "conf": ("float32", (op.groups, *image)),
    }
