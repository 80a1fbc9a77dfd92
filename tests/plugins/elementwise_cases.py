"""Elementwise operations and reductions for the kernels, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.elementwise_cases

prints, as JSON, the errors of each small case on the CPU.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import numpy as np

from smc.plugins.elementwise import launches, reference
from smc.plugins.elementwise.launches import Tile
from smc.plugins.elementwise.specification import BINARY, UNARY, Elementwise, View
from smc.plugins.reduction import launches as reduction_launches
from smc.plugins.reduction import reference as reduction_reference
from smc.plugins.reduction.specification import Reduction
from tests.plugins.small_cases import Case, Expected, errors, loaded, memory, on_cpu, places

SHAPE = (3, 5, 7)


def packed(dtype: str, shape: tuple[int, ...] = SHAPE) -> View:
    """Row-major, at the start."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return View(dtype, tuple(strides))


def copy(shape: tuple[int, ...], x: View, out: View) -> Elementwise:
    return Elementwise("copy", shape, (x,), out)


def reduced(function: Literal["sum", "l2"], rows: int, columns: int, **more: Any) -> Reduction:
    """Contiguous rows, but where `more` says otherwise."""
    made: dict[str, Any] = {"dtype": "float16", "out_dtype": "float32", "x_row": columns}
    return Reduction(function=function, rows=rows, columns=columns, **made | more)


SMALL: dict[str, tuple[Elementwise, Tile]] = {
    "contiguous": (copy(SHAPE, packed("float16"), packed("float32")), Tile(32, 1)),
    "round": (copy(SHAPE, packed("float32"), packed("float16")), Tile(32, 1)),
    "transposed": (copy(SHAPE, View("float16", (1, 3, 15)), packed("float16")), Tile(32, 1)),
    "channels last": (copy((2, 3, 8, 9), View("float16", (216, 1, 27, 3)), packed("float32", (2, 3, 8, 9))), Tile(64, 1)),
    "slice to slice": (copy((4, 3, 10), View("float32", (60, 20, 1), 5), View("float16", (90, 30, 1), 16)), Tile(32, 1)),
    "other view first": (copy((2, 40), View("float16", (-40, 1), 40), packed("float16", (2, 40))), Tile(32, 1)),
    "backwards": (copy((6, 5), View("float16", (-5, -1), 29), packed("float16", (6, 5))), Tile(8, 1)),
    "repeated": (copy((4, 6), View("float32", (0, 1)), packed("float32", (4, 6))), Tile(8, 1)),
    "every second": (copy((4, 6), View("float32", (12, 2), 1), packed("float32", (4, 6))), Tile(8, 1)),
    "six dimensions": (
        copy((2, 3, 2, 3, 2, 3), View("float16", (1, 2, 6, 12, 36, 72)), packed("float32", (2, 3, 2, 3, 2, 3))), Tile(16, 1)
    ),
    "ones": (copy((1, 5, 1, 1, 7, 1, 1), View("float16", (99, 7, 3, 0, 1, 5, 5)), packed("float16", (1, 5, 1, 1, 7, 1, 1))), Tile(16, 1)),
    "one element": (copy((1, 1), View("float32", (0, 0), 3), View("float16", (5, 5), 7)), Tile(16, 1)),
    "scalar": (copy((), View("float32", ()), View("float16", ())), Tile(16, 1)),
    "bytes": (copy(SHAPE, packed("uint8"), packed("float16")), Tile(32, 1)),
    "to bytes": (copy(SHAPE, packed("uint8"), packed("uint8")), Tile(32, 1)),
    "integers": (copy(SHAPE, packed("int32"), packed("int32")), Tile(32, 1)),
    "to integers": (copy(SHAPE, packed("float32"), packed("int32")), Tile(32, 1)),
    "sum of integers": (Elementwise("add", SHAPE, (packed("int32"), View("int32", (0, 0, 1))), packed("int32")), Tile(32, 1)),
    "a bias": (Elementwise("add", (4, 33), (packed("float16", (4, 33)), View("float32", (0, 1))), packed("float16", (4, 33))), Tile(32, 1)),
    "a scalar": (Elementwise("maximum", SHAPE, (packed("float16"), View("float32", (0, 0, 0))), packed("float32")), Tile(32, 1)),
    "outer sum": (Elementwise("sub", (5, 6), (View("float32", (1, 0)), View("float32", (0, 1))), packed("float32", (5, 6))), Tile(8, 1)),
    **{name: (Elementwise(name, SHAPE, (packed("float16"),), packed("float32")), Tile(64, 1)) for name in UNARY},
    **{name: (Elementwise(name, SHAPE, (packed("float32"), packed("float16")), packed("float32")), Tile(64, 1)) for name in BINARY},
}  # fmt: skip

REDUCTIONS: dict[str, tuple[Reduction, reduction_launches.Tile]] = {
    "few columns": (reduced("sum", 50, 24), reduction_launches.Tile(64, 1)),
    "many columns": (reduced("l2", 3, 100), reduction_launches.Tile(32, 1)),
    "one column": (reduced("l2", 40, 1), reduction_launches.Tile(32, 1)),
    "slices": (reduced("l2", 7, 24, x_row=25, x_offset=21), reduction_launches.Tile(64, 1)),
    "down columns": (reduced("sum", 9, 13, x_row=1, x_column=9), reduction_launches.Tile(32, 1)),
    "backwards": (reduced("l2", 4, 40, x_row=-40, x_offset=120, dtype="float32"), reduction_launches.Tile(32, 1)),
}


def case(operation: Elementwise, tile: Tile, sm: int) -> Case:
    inputs, values = {}, []
    for seed, (name, view) in enumerate(zip(("x", "y"), operation.inputs, strict=False)):
        array = memory([places(operation.shape, view.strides, view.offset)], view.dtype, seed)
        if operation.function == "sqrt":
            array = np.abs(array)
        inputs[name] = array
        values.append(loaded(array, view.dtype))
    exact = reference.elementwise(operation, *values)
    if operation.out.dtype in ("uint8", "int32"):
        exact = np.trunc(exact)
    plain = exact.astype(np.int64 if operation.integer else np.float32)
    out = Expected(operation.out.dtype, places(operation.shape, operation.out.strides, operation.out.offset), exact, plain)
    return Case(launches.launches(operation, tile, sm), inputs, {"out": out})


def reduction_case(operation: Reduction, tile: reduction_launches.Tile, sm: int) -> Case:
    read = places((operation.rows, operation.columns), (operation.x_row, operation.x_column), operation.x_offset)
    x = memory([read], operation.dtype)
    values = loaded(x, operation.dtype)[read]
    single = values.astype(np.float32)
    plain = single.sum(1) if operation.function == "sum" else np.sqrt((single * single).sum(1))
    out = Expected(operation.out_dtype, np.arange(operation.rows), reduction_reference.reduction(operation, values), plain)
    return Case(reduction_launches.launches(operation, tile, sm), {"x": x}, {"out": out})


if __name__ == "__main__":
    found: dict[str, Any] = {name: errors(case(operation, tile, 80), on_cpu) for name, (operation, tile) in SMALL.items()}
    sums = {name: errors(reduction_case(operation, tile, 80), on_cpu) for name, (operation, tile) in REDUCTIONS.items()}
    print(json.dumps([found, sums]))
