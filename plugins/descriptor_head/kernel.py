"""The Triton kernel: a program takes pixels of one token, read along pixels and written along channels, as each lies in memory."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def descriptor_head(
    f,  # (groups, batch * h * w, (C + 1) * SIZE * SIZE), strided; float16, bfloat16 or float32
    desc,  # (groups * batch, h * SIZE, w * SIZE, C) contiguous float32
    desc_conf,  # (groups * batch, h * SIZE, w * SIZE) contiguous float32
    desc16,  # (groups * batch, h * SIZE, w * SIZE, PADDED) contiguous float16, or None
    w,
    f_row,  # strides in elements
    f_group,
    CONFIDENCE: tl.constexpr,
    LEAST_NORM: tl.constexpr,  # None for no limit
    C: tl.constexpr,
    SIZE: tl.constexpr,
    PIXELS: tl.constexpr,
    PADDED: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Grid: (tokens of a group, groups, ceil(SIZE * SIZE / PIXELS))."""
    token, group, tokens = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    pixel = tl.program_id(2) * PIXELS + tl.arange(0, PIXELS)
    inside = pixel < SIZE * SIZE
    channel = tl.arange(0, PADDED)[None, :]
    kept = inside[:, None] & (channel < C)
    y, x = (group * tokens + token) // w, token % w  # y counts rows of tokens through all images: they are contiguous
    place = (y * SIZE + pixel // SIZE).to(tl.int64) * (w * SIZE) + x * SIZE + pixel % SIZE
    f += group.to(tl.int64) * f_group + token.to(tl.int64) * f_row
    if OVERLAPS:
        gdc_wait()
    features = tl.load(f + pixel[:, None] + channel * (SIZE * SIZE), mask=kept, other=0.0).to(tl.float32)
    last = tl.load(f + C * SIZE * SIZE + pixel, mask=inside, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
    norm = tl.sqrt(tl.sum(features * features, 1))
    if LEAST_NORM is not None:
        norm = tl.maximum(norm, LEAST_NORM)
    unit = features * (1.0 / norm)[:, None]
    tl.store(desc + place[:, None] * C + channel, unit, mask=kept)
    tl.store(desc_conf + place, CONFIDENCE + tl.exp(last), mask=inside)
    if desc16 is not None:
        # A norm of 0 makes the padding NaN as well.
        tl.store(desc16 + place[:, None] * PADDED + channel, tl.where(kept, unit, 0.0).to(tl.float16), mask=inside[:, None])
