"""The two kernels, written plainly: what they are compared with, and what is itself compared with Pillow."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def across(source: NDArray[np.uint8], first: NDArray[np.int32], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """uint8 (rows, source_width, 3) -> (rows, width, 3)."""
    return down(source.swapaxes(0, 1), first, weights).swapaxes(0, 1)


def down(source: NDArray[np.uint8], first: NDArray[np.int32], weights: NDArray[np.int32]) -> NDArray[np.uint8]:
    """uint8 (source_rows, width, 3) -> (rows, width, 3)."""
    total = np.full((len(first), *source.shape[1:]), 1 << 21, np.int32)
    for tap, weight in enumerate(weights):
        total += source[np.minimum(first + tap, len(source) - 1)] * weight[:, None, None]  # past the end weights are zero
    return np.clip(total >> 22, 0, 255).astype(np.uint8)
