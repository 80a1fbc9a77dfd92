"""The Triton kernel: a program keeps whole rows in registers, so that each is read once and its variance is that of what was centred."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def layer_norm(
    x,  # (groups, rows, C), strided; float16, bfloat16 or float32
    scale,  # (groups, C) or (C,), or None
    bias,  # likewise
    out,  # (groups, rows, C), strided
    rows,
    x_row,  # strides in elements
    x_group,
    out_row,
    out_group,
    EPS: tl.constexpr,
    C: tl.constexpr,
    WEIGHT_GROUP: tl.constexpr,  # elements from one group's scale and bias to the next one's
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from C on
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(rows / ROWS), groups)."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < C
    # Weights first: they do not wait for the kernel before.
    if scale is not None:
        factor = tl.load(scale + group * WEIGHT_GROUP + column, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + group * WEIGHT_GROUP + column, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        # The product after this one takes longer to begin than this kernel takes, and brings its weights meanwhile.
        gdc_launch_dependents()
        gdc_wait()
    mask = (row < rows) & inside
    values = tl.load(x + group.to(tl.int64) * x_group + row.to(tl.int64) * x_row + column, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, 1) / C
    centred = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / C
    result = centred * tl.rsqrt(variance + EPS)[:, None]
    if scale is not None:
        result *= factor
    if bias is not None:
        result += shift
    tl.store(out + group.to(tl.int64) * out_group + row.to(tl.int64) * out_row + column, result.to(out.dtype.element_ty), mask=mask)
