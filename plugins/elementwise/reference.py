"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.elementwise.specification import Elementwise, View


def elementwise(operation: Elementwise, *operands: NDArray[Any]) -> NDArray[np.float64]:
    """The function of the operands' elements, as an array of `operation.shape`; operands are flat arrays."""
    x, *y = (
        view(array, described, operation.shape).astype(np.float64) for array, described in zip(operands, operation.inputs, strict=True)
    )
    match operation.function:
        case "copy":
            return x
        case "relu":
            return np.maximum(x, 0)
        case "gelu":
            return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        case "exp":
            return np.exp(x)
        case "sqrt":
            return np.sqrt(x)
        case "add":
            return x + y[0]
        case "sub":
            return x - y[0]
        case "mul":
            return x * y[0]
        case "div":
            return x / y[0]
        case "maximum":
            return np.maximum(x, y[0])
        case "minimum":
            return np.minimum(x, y[0])


def view(array: NDArray[Any], described: View, shape: tuple[int, ...]) -> NDArray[Any]:
    """The view of a flat array; writing to it writes to the array."""
    strides = [stride * array.itemsize for stride in described.strides]
    return np.lib.stride_tricks.as_strided(array[described.offset :], shape, strides)
