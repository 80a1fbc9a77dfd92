"""The Triton kernel: tiles over the two innermost of six dimensions; strides that are 0 or 1 are compiled in, as are dimensions of 1."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _apply(x, y, FUNCTION: tl.constexpr):
    """The function of one tile, or of two; `y` is not used by functions of one."""
    if FUNCTION == "relu":
        # Not the hardware's maximum, which makes NaN 0.
        result = tl.where(x < 0, 0, x)
    elif FUNCTION == "gelu":
        result = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FUNCTION == "exp":
        result = tl.exp(x)
    elif FUNCTION == "sqrt":
        result = tl.sqrt_rn(x)
    elif FUNCTION == "add":
        result = x + y
    elif FUNCTION == "sub":
        result = x - y
    elif FUNCTION == "mul":
        result = x * y
    elif FUNCTION == "div":
        result = tl.div_rn(x, y)
    elif FUNCTION == "maximum":
        result = tl.where((x > y) | (x != x), x, y)
    elif FUNCTION == "minimum":
        result = tl.where((x < y) | (x != x), x, y)
    else:
        tl.static_assert(FUNCTION == "copy")
        result = x
    return result


@triton.jit
def elementwise(
    x,  # in all pointers: a view of the shape (n0, ..., n5), the first element at the operand's offset from it
    y,  # None for functions of one
    out,
    x_offset,
    y_offset,
    out_offset,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    x0,  # strides in elements
    x1,
    x2,
    x3,
    x4,
    x5,
    y0,
    y1,
    y2,
    y3,
    y4,
    y5,
    out0,
    out1,
    out2,
    out3,
    out4,
    out5,
    FUNCTION: tl.constexpr,
    INTEGER: tl.constexpr,  # whether it is computed in int32 or in float32
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (n0 * n1 * n2 * n3 * ceil(n4 / ROWS) * ceil(n5 / COLUMNS),)."""
    computed: tl.constexpr = tl.int32 if INTEGER else tl.float32
    program = tl.program_id(0)
    across = tl.cdiv(n5, COLUMNS)
    i5 = (program % across * COLUMNS + tl.arange(0, COLUMNS)[None, :]).to(tl.int64)
    program //= across
    down = tl.cdiv(n4, ROWS)
    i4 = (program % down * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    program //= down
    i3 = (program % n3).to(tl.int64)
    program //= n3
    i2 = (program % n2).to(tl.int64)
    program //= n2
    i1 = (program % n1).to(tl.int64)
    i0 = (program // n1).to(tl.int64)
    mask = (i4 < n4) & (i5 < n5)
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    first = tl.load(x + (x_offset + i0 * x0 + i1 * x1 + i2 * x2 + i3 * x3) + i4 * x4 + i5 * x5, mask=mask).to(computed)
    second = first
    if y is not None:
        second = tl.load(y + (y_offset + i0 * y0 + i1 * y1 + i2 * y2 + i3 * y3) + i4 * y4 + i5 * y5, mask=mask).to(computed)
    result = _apply(first, second, FUNCTION).to(out.dtype.element_ty)
    tl.store(out + (out_offset + i0 * out0 + i1 * out1 + i2 * out2 + i3 * out3) + i4 * out4 + i5 * out5, result, mask=mask)
