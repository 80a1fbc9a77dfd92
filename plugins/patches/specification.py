"""What Patches computes, as data.

Operands:
    image: (batch, height, width, channels) for layout "nhwc", (batch, channels, height, width) for "nchw"; contiguous, of any type.
    out: (batch * h * w, channels * patch * patch) contiguous, with h = height // patch and w = width // patch.

Value: the row of patch (b, y, x) holds, in the order (channel, i, j) of a convolution's weight,
    out = (image[b, channel, y * patch + i, x * patch + j] - subtract) * multiply
in float32, rounded once. Pixels beyond the last whole patch are left out, as such a convolution does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Patches:
    """The operation's shapes, types and constants, as above; types are named as numpy does."""

    batch: int
    height: int
    width: int
    channels: int
    patch: int
    layout: Literal["nhwc", "nchw"]
    dtype: str
    out_dtype: str
    subtract: float = 0.0
    multiply: float = 1.0

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across an image."""
        return self.height // self.patch, self.width // self.patch

    @property
    def shape(self) -> tuple[int, int]:
        """Of out."""
        h, w = self.grid
        return self.batch * h * w, self.channels * self.patch**2
