"""The operation of `specification`, written plainly in float64: what the kernels are compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def conv(x: Array, weight: Array, stride: int, padding: int, bias: Array | None = None, residual: Array | None = None) -> Array:
    """x (groups, B, H, W, Cin) by weight (groups, size, size, Cin, Cout), then + bias (groups, Cout) and + residual.

    Returns (groups, B, Ho, Wo, Cout).
    """
    size = weight.shape[1]
    padded = np.pad(np.asarray(x, np.float64), ((0, 0), (0, 0), (padding, padding), (padding, padding), (0, 0)))
    out_height, out_width = ((padded.shape[axis] - size) // stride + 1 for axis in (2, 3))
    out = np.zeros((*x.shape[:2], out_height, out_width, weight.shape[4]))
    for i in range(size):
        for j in range(size):
            window = padded[:, :, i : i + stride * (out_height - 1) + 1 : stride, j : j + stride * (out_width - 1) + 1 : stride]
            out += np.einsum("gbhwc,gcd->gbhwd", window, np.asarray(weight[:, i, j], np.float64), optimize=True)
    if bias is not None:
        out += np.asarray(bias, np.float64)[:, None, None, None]
    return out if residual is None else out + residual
