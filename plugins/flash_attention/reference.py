"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smc.plugins.flash_attention.specification import FlashAttention

Array = NDArray[np.float64]


def flash_attention(
    operation: FlashAttention,
    q: ArrayLike,
    k: ArrayLike,
    v: ArrayLike,
    cos_q: ArrayLike | None = None,
    sin_q: ArrayLike | None = None,
    cos_k: ArrayLike | None = None,
    sin_k: ArrayLike | None = None,
) -> Array:
    """Attention of q (B, N, Cq) over k (B, M, Ck) and v (B, M, Cv), with the rotation if there are tables.

    Returns (B, N, num_heads * head_size). Operands and attributes are those of `specification`.
    """
    queries = _heads(operation, q, operation.q_offset)
    keys = _heads(operation, k, operation.k_offset)
    values = _heads(operation, v, operation.v_offset)
    if cos_q is not None and sin_q is not None and cos_k is not None and sin_k is not None:
        queries, keys = _rotated(queries, cos_q, sin_q), _rotated(keys, cos_k, sin_k)
    scores = operation.scale * queries @ keys.swapaxes(-1, -2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out = (weights / weights.sum(axis=-1, keepdims=True)) @ values
    return out.swapaxes(1, 2).reshape(out.shape[0], out.shape[2], -1)


def _heads(operation: FlashAttention, x: ArrayLike, offset: int) -> Array:
    """(B, N, C) -> (B, num_heads, N, head_size)."""
    x = np.asarray(x, np.float64)[:, :, offset : offset + operation.num_heads * operation.head_size]
    return x.reshape(*x.shape[:2], operation.num_heads, operation.head_size).swapaxes(1, 2)


def _rotated(x: Array, cos: ArrayLike, sin: ArrayLike) -> Array:
    """Rows (..., N, D) rotated by tables (N, D/2)."""
    cos, sin = np.asarray(cos, np.float64), np.asarray(sin, np.float64)
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos], axis=-1)
