"""Elementwise as launches. Operands: x, y, out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.launch import Address, Constant, Launch, Value, launch

RANK = 6
"""Dimensions that the kernel takes, after those that lie one in the other have become one."""


@dataclass(frozen=True)
class Tile:
    """How the work is cut: elements a program (a power of two), and warps a program."""

    elements: int
    warps: int


def tiles(operation: Elementwise, sm: int) -> list[Tile]:
    """Worth timing."""
    return [Tile(2048, 4), Tile(4096, 8), Tile(1024, 4), Tile(8192, 8)]


def default_tile(operation: Elementwise, sm: int) -> Tile:
    """The fastest on the H200: larger where rows become columns, so that both are read and written in long runs."""
    strides = tuple(view.strides for view in (*operation.inputs, operation.out))
    return Tile(4096, 8) if _crosswise(_tiled(*collapsed(operation.shape, strides))[1]) else Tile(2048, 4)


def launches(operation: Elementwise, tile: Tile, sm: int) -> list[Launch]:
    """The one launch, or none where there are no elements.

    Raises:
        ValueError: more than RANK dimensions are left, or a size or stride is no int32.
    """
    if math.prod(operation.shape) == 0:
        return []
    overlaps = sm >= 90
    names = ("x", "y", "out") if len(operation.inputs) == 2 else ("x", "out")
    views = (*operation.inputs, operation.out)
    shape, strides = _tiled(*collapsed(operation.shape, tuple(view.strides for view in views)))
    values: dict[str, Value] = {
        name: Address(name, view.dtype, view.offset - _beyond(view)) for name, view in zip(names, views, strict=True)
    }
    numbers: dict[str, int] = {f"{name}_offset": _beyond(view) for name, view in zip(names, views, strict=True)}
    numbers |= {f"n{axis}": size for axis, size in enumerate(shape)}
    for name, steps in zip(names, strides, strict=True):
        numbers |= {f"{name}{axis}": step for axis, step in enumerate(steps)}
    if any(not -(1 << 31) <= number < 1 << 31 for number in numbers.values()):
        raise ValueError(f"a size or stride is no int32: shape {shape}, strides {strides}")
    if _crosswise(strides):
        # Both axes have an operand that is contiguous along them: 64 elements are whole lines of memory in both.
        rows = min(64, tile.elements, _power_of_two(shape[-2]))
        columns = min(tile.elements // rows, _power_of_two(shape[-1]))
    else:
        columns = min(tile.elements, _power_of_two(shape[-1]))
        rows = min(tile.elements // columns, _power_of_two(shape[-2]))
    constants: dict[str, Constant] = {
        "FUNCTION": operation.function,
        "INTEGER": operation.integer,
        "ROWS": rows,
        "COLUMNS": columns,
        "OVERLAPS": overlaps,
    }
    # 0 and 1 are what decides how memory is accessed, and which dimensions there are.
    constants |= {name: number for name, number in numbers.items() if number in (0, 1)}
    values |= {name: number for name, number in numbers.items() if number not in (0, 1)}
    if "y" not in names:
        constants |= {"y": None, "y_offset": 0} | {f"y{axis}": 0 for axis in range(RANK)}
    grid = (math.prod(shape[:-2]) * -(-shape[-2] // rows) * -(-shape[-1] // columns), 1, 1)
    return [launch("smc.plugins.elementwise.kernel:elementwise", grid, values, constants, warps=tile.warps, stages=1, overlaps=overlaps)]


Strides = tuple[tuple[int, ...], ...]
"""Of each operand, the output last."""


def collapsed(shape: tuple[int, ...], strides: Strides) -> tuple[tuple[int, ...], Strides]:
    """The same elements with the fewest dimensions, those nearest in the output's memory last; none for a single element."""
    axes = sorted((axis for axis, size in enumerate(shape) if size > 1), key=lambda axis: -abs(strides[-1][axis]))
    sizes: list[int] = []
    steps: list[tuple[int, ...]] = []  # for each dimension, of each operand
    for axis in axes:
        step = tuple(operand[axis] for operand in strides)
        if steps and all(outer == inner * shape[axis] for outer, inner in zip(steps[-1], step, strict=True)):
            sizes[-1] *= shape[axis]
            steps[-1] = step
        else:
            sizes.append(shape[axis])
            steps.append(step)
    return tuple(sizes), tuple(tuple(step[operand] for step in steps) for operand in range(len(strides)))


def _tiled(shape: tuple[int, ...], strides: Strides) -> tuple[tuple[int, ...], Strides]:
    """RANK dimensions, of which the last but one is the one along which an input is contiguous, if there is one."""
    missing = RANK - len(shape)
    if missing < 0:
        raise ValueError(f"{len(shape)} dimensions that do not lie one in the other; the kernel takes {RANK}")
    contiguous = [axis for axis in range(len(shape) - 1) if any(abs(operand[axis]) == 1 for operand in strides[:-1])]
    order = [axis for axis in range(len(shape)) if axis not in contiguous[:1]]
    order[-1:-1] = contiguous[:1]

    def arranged(numbers: tuple[int, ...], filling: int) -> tuple[int, ...]:
        return (filling,) * missing + tuple(numbers[axis] for axis in order)

    return arranged(shape, 1), tuple(arranged(operand, 0) for operand in strides)


def _crosswise(strides: Strides) -> bool:
    return any(abs(operand[-2]) == 1 for operand in strides[:-1])


def _beyond(view: View) -> int:
    """What of an offset cannot be in the address, which is a multiple of 16 bytes: 16 elements always are."""
    return view.offset % 16


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
