"""What the last layers of the DPT head compute, as data.

Operands:
    x: `Map` (smc.plugins.conv.specification) of (groups, batch, height, width, in_channels).
    weight: (groups, size, size, in_channels, channels), contiguous, of x's type.
    bias: (groups, channels), contiguous, of a type of its own.
    weight_out: (groups, channels, 4), contiguous, of x's type.
    bias_out: (groups, 4), contiguous, of bias's type.
    pts3d: float32, (batch, height, width, 3) contiguous for each group.
    conf: float32, (batch, height, width) contiguous for each group.

Value, for each group and pixel:
    h = max(conv(x, weight) + bias, 0), rounded to x's type
    y = h weight_out + bias_out
    pts3d = y[:3] / max(n, norm_floor) (exp(n) - 1), with n the length of y[:3]
    conf = conf_floor + exp(y[3])
with zeros around x so that the image keeps its size. All but the products' operands is in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

from smc.plugins.conv.specification import Conv, Dtype, Map


@dataclass(frozen=True)
class PointHead:
    """The last layers of a DPT head.

    Attributes:
        groups: of different weights: the two views.
        batch, height, width: of x and of the outputs.
        in_channels: of x; channels: of h, at most 256; multiples of 8.
        x: where it lies; its type is float16, bfloat16 or float32.
        pts3d_group, conf_group: elements from one group's output to the next.
        bias: the type of both biases.
        size: of the convolution's kernel; odd.
        norm_floor, conf_floor: see above.

    Raises:
        ValueError: an attribute is outside these limits.
    """

    groups: int
    batch: int
    height: int
    width: int
    in_channels: int
    channels: int
    x: Map
    pts3d_group: int
    conf_group: int
    bias: Dtype = "float32"
    size: int = 3
    norm_floor: float = 1e-8
    conf_floor: float = 1.0

    def __post_init__(self) -> None:
        if self.channels > 256:
            raise ValueError(f"channels is {self.channels}; the kernel takes at most 256")
        if self.size % 2 == 0:
            raise ValueError(f"size is {self.size}; an odd one is needed")
        if self.batch * self.height * self.width * 3 >= 2**31:
            raise ValueError("an output has 2^31 elements or more")
        _ = self.conv

    @property
    def conv(self) -> Conv:
        """Its convolution by itself, as if the result were written where x lies."""
        return Conv(
            self.groups,
            self.batch,
            self.height,
            self.width,
            self.in_channels,
            self.channels,
            self.x,
            self.x,
            self.size,
            padding=self.size // 2,
            bias=self.bias,
            activation="relu",
        )
