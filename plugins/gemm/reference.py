"""The operation of `specification`, written plainly in float64: what the kernels are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.gemm.specification import Gemm

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gemm(op: Gemm, operands: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """out as (groups, m, n), whatever its layout is.

    Args:
        operands: those of `specification` but for the outputs, as flat or shaped arrays.
    """
    a = _rows(operands["a"], op.a_offset, op.a_group, op.a_row, op.groups, op.m, op.k)
    weight = _wide(operands["weight"]).reshape(-1, op.k, op.n)
    x = a @ weight
    if op.bias is not None:
        x = x + _wide(operands["bias"]).reshape(-1, 1, op.n)
    if op.rotary is not None:
        table = np.arange(op.m) % op.rotary.tokens
        cos, sin = (_wide(operands[name]).reshape(-1, op.rotary.half)[table, None] for name in ("cos", "sin"))
        heads = x[:, :, : op.rotary.columns].reshape(op.groups, op.m, -1, 2 * op.rotary.half)
        x1, x2 = heads[..., 0::2], heads[..., 1::2]
        rotated = np.stack([x1 * cos - x2 * sin, x1 * sin + x2 * cos], -1)
        x = np.concatenate([rotated.reshape(op.groups, op.m, -1), x[:, :, op.rotary.columns :]], -1)
    if op.activation == "gelu":
        x = x * 0.5 * (1 + _erf(x / math.sqrt(2)))
    elif op.activation == "relu":
        x = np.maximum(x, 0)
    if op.residual is not None:
        x = x + _wide(operands["residual"]).ravel()[positions(op, op.r_offset, op.r_group, op.r_row)]
    return x


def positions(op: Gemm, offset: int, group: int, row: int) -> NDArray[np.int64]:
    """Where element (g, row, column) of out, or of residual, lies: elements from the operand's start, as (groups, m, n)."""
    rows, columns = np.arange(op.m)[:, None], np.arange(op.n)[None, :]
    if op.scatter is not None:
        s = op.scatter.scale
        channels = op.n // s**2
        i, j, columns = columns // (s * channels), columns // channels % s, columns % channels
        y, x = rows // op.scatter.width, rows % op.scatter.width
        rows = (y * s + i) * (op.scatter.width * s) + x * s + j
    return offset + np.arange(op.groups)[:, None, None] * group + rows * row + columns


def _rows(x: NDArray[Any], offset: int, group: int, row: int, groups: int, rows: int, columns: int) -> NDArray[np.float64]:
    g, r, c = np.ogrid[:groups, :rows, :columns]
    return _wide(x).ravel()[offset + g * group + r * row + c]


def _wide(x: NDArray[Any]) -> NDArray[np.float64]:
    return np.asarray(x, np.float64)
