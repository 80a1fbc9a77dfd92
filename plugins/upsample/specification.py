"""What a bilinear enlargement computes, as data.

Operands, `Map`s (smc.plugins.conv.specification) of (groups, batch, height, width, channels):
    x: the map to enlarge, of height x width.
    residual, out, out_relu: of out_height x out_width; residual and out_relu are optional.

Value, with the corners of x and out on each other (ONNX's Resize with mode linear and align_corners):
    out[y, z] = bilinear(x, y (height - 1) / (out_height - 1), z (width - 1) / (out_width - 1)) + residual[y, z], out_relu = max(out, 0)
where an output of one row takes row 0 of x, and likewise with columns. All in float32; each output is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.conv.specification import Map


@dataclass(frozen=True)
class Upsample:
    """A bilinear enlargement (or reduction, without smoothing).

    Attributes:
        groups, batch: maps that differ in nothing but their place.
        height, width: of x.
        out_height, out_width: of the outputs.
        channels: a multiple of 8.
        x, out: where they lie.
        residual, out_relu: where they lie; None without.

    Raises:
        ValueError: an attribute is outside these limits, or an image has 2^31 elements or more.
    """

    groups: int
    batch: int
    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    x: Map
    out: Map
    residual: Map | None = None
    out_relu: Map | None = None

    def __post_init__(self) -> None:
        for name in ("groups", "batch", "height", "width", "out_height", "out_width", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.channels % 8:
            raise ValueError(f"channels is {self.channels}; a multiple of 8 is needed")
        results = [y for y in (self.out, self.residual, self.out_relu) if y is not None]
        if self.height * abs(self.x.row) >= 2**31 or any(self.out_height * abs(y.row) >= 2**31 for y in results):
            raise ValueError("an image has 2^31 elements or more")
