"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def layer_norm(x: ArrayLike, scale: ArrayLike | None, bias: ArrayLike | None, eps: float) -> NDArray[np.float64]:
    """x (groups, rows, channels) normalized; scale and bias (groups, channels) or (channels,), or None."""
    x = np.asarray(x, np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    if scale is not None:
        out = out * _per_group(scale)
    return out if bias is None else out + _per_group(bias)


def _per_group(weights: ArrayLike) -> NDArray[np.float64]:
    weights = np.asarray(weights, np.float64)
    return weights[:, None] if weights.ndim == 2 else weights
