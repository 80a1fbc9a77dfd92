"""What LayerNorm computes, as data.

Operands:
    x: (groups, rows, channels), strided; float16, bfloat16 or float32.
    scale, bias: (groups, channels) contiguous, or (channels,) for all groups; optional, of types of their own.
    out: (groups, rows, channels), strided, of a type of its own.

Value, for each row:
    out = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * scale + bias
in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """The operation's shapes, types and strides; strides and offsets are in elements.

    Attributes:
        groups, rows, channels: rows are those of one group.
        dtype, out_dtype: of x and out, as numpy names them.
        x_row, x_group, x_offset: from row to row, from group to group (0 or negative, too), and of the first element.
        out_row, out_group, out_offset: likewise.
        eps: added to the variance.
        scale, bias: their types; None without.
        shared: whether all groups use the same scale and bias.
    """

    groups: int
    rows: int
    channels: int
    dtype: str
    out_dtype: str
    x_row: int
    x_group: int
    out_row: int
    out_group: int
    eps: float
    scale: str | None = None
    bias: str | None = None
    shared: bool = False
    x_offset: int = 0
    out_offset: int = 0
