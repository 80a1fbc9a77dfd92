"""Resize's two kernels, `across` and then `down`, as what to compile.

Their launches are not part of a plan, since they depend on each image's size: `smc.exported.engines.cuda_resize` makes them. The grid is
(ceil(3 * width / BYTES), ceil(rows / ROWS)) for a result of `rows` times `width` pixels. Weights are those of `smc.exported.resampling`.

Operands of across, contiguous, at multiples of 16 bytes:
    source: (rows, source_width, 3) uint8.
    first: (width,) int32; weights: (taps, width) int32.
    out: (rows, width, 3) uint8.

Operands of down:
    source: (source_rows, width, 3) uint8.
    first: (rows,) int32; weights: (taps, rows) int32.
    out: (rows, width, 3) uint8.

Then follow, as int32: rows, source_width or source_rows, width, taps. Neighbours past the end of the source are not read.
"""

from __future__ import annotations

from smc.plugins.launch import Kernel

ROWS, BYTES = 4, 256
"""A program makes `BYTES` neighbouring bytes of `ROWS` rows of the result."""


def _kernel(name: str, extent: str) -> Kernel:
    pointers = (("source", "*u8"), ("first", "*i32"), ("weights", "*i32"), ("out", "*u8"))
    integers = (("rows", "i32"), (extent, "i32"), ("width", "i32"), ("taps", "i32"))
    constants = (("BYTES", BYTES), ("ROWS", ROWS))
    return Kernel(f"smc.plugins.resize.kernel:{name}", pointers + integers, constants, frozenset(), warps=4, stages=1)


ACROSS = _kernel("across", "source_width")
DOWN = _kernel("down", "source_rows")
