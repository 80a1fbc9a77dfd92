"""The Triton kernel: each element of a tile has a running sum of its own; they are added up at the end."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def reduction(
    x,  # (rows, columns), strided, the first element at x_offset from it
    out,  # (rows,) contiguous
    x_offset,
    rows,
    columns,
    x_row,  # strides in elements
    x_column,
    NORM: tl.constexpr,  # whether the norm or the sum is wanted
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(rows / ROWS),)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    x += x_offset + row.to(tl.int64)[:, None] * x_row + column.to(tl.int64) * x_column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    for start in range(0, columns, COLUMNS):
        values = tl.load(x, mask=inside[:, None] & (column < columns - start), other=0.0).to(tl.float32)
        if NORM:
            values *= values
        total += values
        x += tl.full((), COLUMNS, tl.int64) * x_column
    result = tl.sum(total, 1)
    if NORM:
        result = tl.sqrt_rn(result)
    tl.store(out + row, result.to(out.dtype.element_ty), mask=inside)
