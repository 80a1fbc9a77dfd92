"""What the cases of the small operations have in common: operands in memory, poisoned outputs, and how results are judged.

The error of a result is relative to float64, ||out - exact|| / ||exact||, and is compared with that of the same computation in plain
float32, rounded to the output's type.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.launch import Launch
from tests.plugins.launching import Arrays, interpret, sm_number

Run = Callable[[Launch, Arrays], Arrays]
Errors = dict[str, tuple[float, float]]
"""Of each output: the kernel's, and the plain computation's."""

FEW_ROUNDINGS = 5e-7
"""What the hardware's exponential and square root in float32 may add, four units in the last place."""


@dataclass(frozen=True)
class Expected:
    """An output: its type, the places of its elements in the flat operand, their exact values and those of plain float32 arithmetic."""

    dtype: str
    places: NDArray[np.int64]
    exact: NDArray[np.float64]
    plain: NDArray[Any]


@dataclass(frozen=True)
class Case:
    launches: list[Launch]
    inputs: dict[str, NDArray[Any]]
    outputs: dict[str, Expected]


def errors(case: Case, run: Run) -> Errors:
    """Run a case; what of its outputs' memory is not theirs must stay as it is."""
    operands = dict(case.inputs)
    for name, expected in case.outputs.items():
        operands[name] = poison(int(expected.places.max()) + 9, expected.dtype)
    before = {name: array.copy() for name, array in operands.items()}
    for launch in case.launches:
        operands = dict(run(launch, operands))
    found = {}
    for name, array in operands.items():
        kept = np.ones(array.size, bool)
        if name in case.outputs:
            expected = case.outputs[name]
            kept[expected.places.reshape(-1)] = False
            out = loaded(array, expected.dtype)[expected.places]
            rounded = loaded(stored(expected.plain, expected.dtype), expected.dtype).reshape(out.shape)
            found[name] = relative(out, expected.exact), relative(rounded, expected.exact)
        assert array.reshape(-1)[kept].tobytes() == before[name].reshape(-1)[kept].tobytes(), f"{name} is written where it should not be"
    return found


def is_close(ours: float, plain: float) -> bool:
    return ours <= max(2 * plain, FEW_ROUNDINGS)


def on_cpu(launch: Launch, operands: Arrays) -> Arrays:
    """Triton's interpreter. It must have been turned on before triton was imported."""
    arrays = {name: array.copy() for name, array in operands.items()}
    interpret(launch, arrays)
    return arrays


def gpu_sm() -> int:
    """Compute capability of this machine's first GPU."""
    from smc.exported.engines import cuda_memory

    return sm_number(cuda_memory.devices()[0].sm)


def places(shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> NDArray[np.int64]:
    """Where the elements of a view lie in flat memory."""
    steps = (np.arange(size) * stride for size, stride in zip(shape, strides, strict=True))
    found = np.full((1,) * len(shape), offset, np.int64)
    for axis, step in enumerate(steps):
        found = found + step.reshape([-1 if other == axis else 1 for other in range(len(shape))])
    return found


def memory(used: Iterable[NDArray[np.int64]], dtype: str, seed: int = 0) -> NDArray[Any]:
    """Random values wherever a view has elements, and behind them."""
    random = np.random.default_rng(seed)
    count = max(int(view.max()) for view in used) + 1
    if dtype == "uint8":
        return random.integers(0, 256, count, np.uint8)
    if dtype == "int32":
        return random.integers(-1000, 1000, count, np.int32)
    return stored(random.standard_normal(count), dtype)


def poison(count: int, dtype: str) -> NDArray[Any]:
    return stored(np.full(count, math.nan if "float" in dtype else 90), dtype)


def stored(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values rounded to a type, as they lie in memory: numpy has no bfloat16, so that is its bits."""
    if dtype != "bfloat16":
        return np.asarray(values).astype(dtype)
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def loaded(array: NDArray[Any], dtype: str) -> NDArray[np.float64]:
    """Stored values, flat."""
    if dtype == "bfloat16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(-1).astype(np.float64)


def relative(out: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    assert out.shape == exact.shape
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))
