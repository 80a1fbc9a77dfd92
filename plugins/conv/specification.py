"""What a convolution computes, as data.

Operands:
    x: `Map` of (groups, batch, height, width, in_channels).
    weight: (groups, size, size, in_channels, out_channels), contiguous, of x's type.
    bias: (groups, out_channels), contiguous, of a type of its own; optional.
    residual, out, out_relu: `Map`s of (groups, batch, out_height, out_width, out_channels); the first and the last are optional.

Value, for each group by itself:
    out = activation(conv(x, weight) + bias + residual), out_relu = max(out, 0)
with zeros around x. Products are of x's type (float32 ones nearly exact), all else is in float32, and each output is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smc.plugins.launch import ITEMSIZES

Dtype = Literal["float16", "bfloat16", "float32"]


@dataclass(frozen=True)
class Map:
    """Where a feature map (groups, batch, height, width, channels) lies in its operand. Channels are contiguous.

    Attributes:
        dtype: element type.
        group, batch, row, column: strides in elements, of which `row` is that of the image's rows and `column` that of its pixels;
            multiples of 16 bytes.
        offset: elements to the first; a multiple of 16 bytes.

    Raises:
        ValueError: a stride or the offset is no such multiple.
    """

    dtype: Dtype
    group: int
    batch: int
    row: int
    column: int
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("group", "batch", "row", "column", "offset"):
            if getattr(self, name) * ITEMSIZES[self.dtype] % 16:
                raise ValueError(f"{name} is {getattr(self, name)} elements of {self.dtype}; a multiple of 16 bytes is needed")


def contiguous(dtype: Dtype, batch: int, height: int, width: int, channels: int) -> Map:
    """The map that fills its operand, (groups, batch, height, width, channels)."""
    return Map(dtype, batch * height * width * channels, height * width * channels, width * channels, channels)


@dataclass(frozen=True)
class Conv:
    """A convolution.

    Attributes:
        groups: of different weights, such as the two views' heads.
        batch, height, width: of x.
        in_channels, out_channels: of one group; multiples of 8.
        x, out: where they lie; their types are float16, bfloat16 or float32.
        size: of the kernel, in pixels; odd or even.
        stride: in pixels.
        padding: rows and columns of zeros on each side.
        bias: its type; None without.
        residual, out_relu: where they lie; None without.
        activation: what follows the sum.

    Raises:
        ValueError: an attribute is outside these limits, or an image has 2^31 elements or more.
    """

    groups: int
    batch: int
    height: int
    width: int
    in_channels: int
    out_channels: int
    x: Map
    out: Map
    size: int = 3
    stride: int = 1
    padding: int = 1
    bias: Dtype | None = None
    residual: Map | None = None
    activation: Literal["none", "relu"] = "none"
    out_relu: Map | None = None

    def __post_init__(self) -> None:
        for name in ("groups", "batch", "height", "width", "in_channels", "out_channels", "size", "stride", "out_height", "out_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        for name in ("in_channels", "out_channels"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} is {getattr(self, name)}; a multiple of 8 is needed")
        if self.padding < 0:
            raise ValueError(f"padding is {self.padding}")
        if self.height * abs(self.x.row) >= 2**31 or any(self.out_height * abs(y.row) >= 2**31 for y in self.results):
            raise ValueError("an image has 2^31 elements or more")

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.padding - self.size) // self.stride + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.padding - self.size) // self.stride + 1

    @property
    def results(self) -> tuple[Map, ...]:
        """The maps of out's shape that there are."""
        return tuple(y for y in (self.out, self.residual, self.out_relu) if y is not None)

    @property
    def flops(self) -> int:
        pixels = self.groups * self.batch * self.out_height * self.out_width
        return 2 * pixels * self.size**2 * self.in_channels * self.out_channels
