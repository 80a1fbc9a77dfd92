"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def upsample(x: Array, out_height: int, out_width: int, residual: Array | None = None) -> Array:
    """x (groups, B, H, W, C) enlarged, corners aligned, + residual. Returns (groups, B, out_height, out_width, C)."""
    tall = _along(np.asarray(x, np.float64), 2, out_height)
    out = _along(tall, 3, out_width)
    return out if residual is None else out + residual


def _along(x: Array, axis: int, size: int) -> Array:
    """Linear interpolation along one axis."""
    places = np.arange(size) * ((x.shape[axis] - 1) / max(size - 1, 1))
    below = np.minimum(places.astype(int), x.shape[axis] - 1)
    above = np.minimum(below + 1, x.shape[axis] - 1)
    share = (places - below).reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return (1 - share) * x.take(below, axis) + share * x.take(above, axis)
