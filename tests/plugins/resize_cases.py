"""Resizes for the kernels, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.resize_cases

prints, as JSON, how many bytes of each small case are wrong on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from smc.plugins.launch import Address, Kernel, Launch
from smc.plugins.resize import reference
from smc.plugins.resize.kernels import ACROSS, BYTES, DOWN, ROWS

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A resize of (rows, width) pixels along one of both: to so many, of so many neighbours each."""

    kernel: Kernel
    source: tuple[int, int]
    size: int
    taps: int


SMALL = {
    "across": Case(ACROSS, (5, 40), 30, 7),
    "across, wider": Case(ACROSS, (3, 9), 100, 4),
    "across, one column": Case(ACROSS, (9, 20), 1, 25),
    "down": Case(DOWN, (40, 31), 25, 9),
    "down, higher": Case(DOWN, (4, 90), 11, 5),
    "down, one pixel": Case(DOWN, (30, 1), 1, 30),
}

REAL = {
    "across": Case(ACROSS, (480, 640), 512, 9),
    "down": Case(DOWN, (480, 512), 384, 9),
    "across, 12 megapixels": Case(ACROSS, (3000, 4000), 512, 49),
    "down, 12 megapixels": Case(DOWN, (3000, 512), 384, 49),
}
"""Of sizes of photographs."""


def wrong(case: Case, run: Callable[[Launch, Arrays], Arrays]) -> int:
    """Bytes that come out wrong, of random pixels and weights, some of neighbours that there are not."""
    random = np.random.default_rng(1)
    height, width = case.source
    extent = width if case.kernel is ACROSS else height
    source = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    first = np.sort(random.integers(0, extent, case.size)).astype(np.int32)
    weights = random.integers(-(1 << 22) // case.taps, (1 << 23) // case.taps, (case.taps, case.size), dtype=np.int32)
    weights[first + np.arange(case.taps)[:, None] >= extent] = 0
    compute = reference.across if case.kernel is ACROSS else reference.down
    expected = compute(source, first, weights)
    rows, columns, _ = expected.shape
    values = (*(Address(name, dtype) for name, dtype in (("source", "uint8"), ("first", "int32"), ("weights", "int32"), ("out", "uint8"))),)
    grid = (-(-3 * columns // BYTES), -(-rows // ROWS), 1)
    launch = Launch(case.kernel, grid, (*values, rows, extent, columns, case.taps))
    out = run(launch, {"source": source, "first": first, "weights": weights, "out": np.zeros(expected.shape, np.uint8)})["out"]
    return int((out != expected).sum())


def on_cpu(launch: Launch, operands: Arrays) -> Arrays:
    from tests.plugins.launching import interpret

    arrays: dict[str, Any] = {name: np.ascontiguousarray(array) for name, array in operands.items()}
    interpret(launch, arrays)
    return arrays


if __name__ == "__main__":
    print(json.dumps({name: wrong(case, on_cpu) for name, case in SMALL.items()}))
