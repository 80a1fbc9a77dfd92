"""The Triton kernel: a program writes whole rows; what it reads, scattered as it is, stays in the first-level cache until all is used."""

# ruff: noqa: N803  (capitals are compile-time constants, as is the custom in Triton)
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def patches(
    image,  # (B, H, W, C) or (B, C, H, W), contiguous
    out,  # (B * h * w, C * SIZE * SIZE) contiguous
    count,  # B * h * w
    h,
    w,
    image_batch,  # strides in elements
    image_channel,
    image_row,
    image_pixel,
    SUBTRACT: tl.constexpr,
    MULTIPLY: tl.constexpr,
    C: tl.constexpr,
    SIZE: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two from C * SIZE * SIZE on
    OVERLAPS: tl.constexpr,
):
    """Grid: (ceil(count / PATCHES),)."""
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    mask = (patch < count) & (column < C * SIZE * SIZE)
    channel, i, j = column // (SIZE * SIZE), column // SIZE % SIZE, column % SIZE
    first = (patch // (h * w)).to(tl.int64) * image_batch + patch // w % h * SIZE * image_row + patch % w * SIZE * image_pixel
    if OVERLAPS:
        gdc_wait()
        gdc_launch_dependents()
    pixels = tl.load(image + first + channel * image_channel + i * image_row + j * image_pixel, mask=mask).to(tl.float32)
    result = (pixels - SUBTRACT) * MULTIPLY
    tl.store(out + patch.to(tl.int64) * (C * SIZE * SIZE) + column, result.to(out.dtype.element_ty), mask=mask)
