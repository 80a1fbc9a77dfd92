"""The operation of `specification`, written plainly in float64 and without rounding h: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smc.plugins.conv import reference

Array = NDArray[np.float64]


def point_head(
    x: Array, weight: Array, bias: Array, weight_out: Array, bias_out: Array, norm_floor: float, conf_floor: float
) -> tuple[Array, Array]:
    """pts3d (groups, B, H, W, 3) and conf (groups, B, H, W) of x (groups, B, H, W, Cin) and the operands of `specification`."""
    h = np.maximum(reference.conv(x, weight, 1, weight.shape[1] // 2, bias), 0)
    y = np.einsum("gbhwc,gcd->gbhwd", h, np.asarray(weight_out, np.float64)) + np.asarray(bias_out, np.float64)[:, None, None, None]
    xyz = y[..., :3]
    norm = np.linalg.norm(xyz, axis=-1, keepdims=True)
    return xyz / np.maximum(norm, norm_floor) * (np.exp(norm) - 1), conf_floor + np.exp(y[..., 3])
