"""What Reduction computes, as data.

Operands:
    x: (rows, columns), strided; float16, bfloat16 or float32.
    out: (rows,) contiguous, of a type of its own.

Value: the sum of each row, or for "l2" the square root of the sum of its squares; in float32, rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """The operation; strides (0 or negative, too) and the first element's offset are in elements, types named as numpy does."""

    function: Literal["sum", "l2"]
    rows: int
    columns: int
    dtype: str
    out_dtype: str
    x_row: int
    x_column: int = 1
    x_offset: int = 0
