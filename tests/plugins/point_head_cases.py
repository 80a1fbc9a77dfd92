"""Point heads for the kernels, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.point_head_cases

prints, as JSON, each small case's errors on the CPU and those of a plain computation of the same precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np

from smc.plugins.conv.launches import HopperTile, Tile
from smc.plugins.conv.specification import Dtype
from smc.plugins.point_head import launches, reference
from smc.plugins.point_head.specification import PointHead
from tests.plugins.conv_cases import LAYOUTS, Array, Errors, float32_conv, relative, run, scatter, tile_name


@dataclass(frozen=True)
class Case:
    height: int
    width: int
    in_channels: int
    channels: int
    tile: Tile | HopperTile | None = None
    groups: int = 2
    batch: int = 1
    dtype: Dtype = "float16"
    bias: Dtype = "float32"
    layout: str = "contiguous"
    size: int = 3
    scale: float = 1.0
    """Of x: small makes points near the camera."""

    @property
    def name(self) -> str:
        sizes = f"{self.groups}x{self.batch}x{self.height}x{self.width}x{self.in_channels}x{self.channels}"
        return "-".join([sizes, self.dtype, self.bias, self.layout, str(self.size), str(self.scale), tile_name(self.tile)])

    @property
    def operation(self) -> PointHead:
        x = LAYOUTS[self.layout](self.dtype, self.batch, self.height, self.width, self.in_channels)
        pixels = self.batch * self.height * self.width
        sizes = (self.groups, self.batch, self.height, self.width, self.in_channels, self.channels)
        return PointHead(*sizes, x, 3 * pixels + 5, pixels + 3, self.bias, self.size)


SMALL = [
    Case(5, 9, 16, 16, Tile(4, 8, 16, 16, warps=4, stages=2)),
    Case(5, 9, 16, 16, Tile(1, 32, 16, 16, warps=4, stages=2, tma=True), batch=2, bias="float16"),
    Case(6, 7, 40, 24, Tile(4, 8, 32, 32, warps=4, stages=2, tma=True), layout="spread"),
    Case(6, 7, 24, 40, Tile(4, 8, 64, 32, warps=4, stages=2), layout="turned", scale=0.01),
    Case(4, 4, 16, 24, Tile(4, 8, 32, 16, warps=4, stages=2), groups=1, size=1),
    Case(4, 5, 16, 24, groups=1, dtype="float32"),
]


LARGE = [
    Case(50, 70, 128, 128, tile, batch=batch, layout=layout)
    for tile in (None, HopperTile(3, 2, 128, 2, 4), HopperTile(2, 1, 128, 3, 6), Tile(1, 128, 128, 64, warps=8, stages=3, tma=True))
    for batch, layout in ((1, "contiguous"), (2, "spread"))
] + [
    Case(41, 66, 104, 120, HopperTile(2, 2, 128, 2, 6), bias="float16", scale=0.01),
    Case(41, 66, 104, 120, Tile(8, 16, 128, 32, warps=8, stages=3)),
    Case(20, 33, 40, 64, dtype="float32"),
]
"""For sm 9.0."""


def errors(case: Case, on_gpu: bool, seed: int = 0) -> Errors:
    op, random = case.operation, np.random.default_rng(seed)
    image = (op.batch, op.height, op.width)
    x = (case.scale * random.standard_normal((op.groups, *image, op.in_channels))).astype(case.dtype)
    fan_in = op.size**2 * op.in_channels
    values = {
        "weight": (random.standard_normal((op.groups, op.size, op.size, op.in_channels, op.channels)) / fan_in**0.5).astype(case.dtype),
        "bias": (0.1 * case.scale * random.standard_normal((op.groups, op.channels))).astype(case.bias),
        "weight_out": (random.standard_normal((op.groups, op.channels, 4)) / op.channels**0.5).astype(case.dtype),
        "bias_out": (0.1 * case.scale * random.standard_normal((op.groups, 4))).astype(case.bias),
    }
    pixels = op.batch * op.height * op.width
    outputs = {
        "pts3d": np.full((op.groups - 1) * op.pts3d_group + 3 * pixels, np.nan, np.float32),
        "conf": np.full((op.groups - 1) * op.conf_group + pixels, np.nan, np.float32),
    }
    after = run(launches.launches(op, case.tile or launches.default_tile(op, 90), 90), {"x": scatter(op.x, x), **values, **outputs}, on_gpu)
    found = {
        "pts3d": _taken(after["pts3d"], op.groups, op.pts3d_group, (*image, 3)),
        "conf": _taken(after["conf"], op.groups, op.conf_group, image),
    }

    exact = reference.point_head(x, *values.values(), op.norm_floor, op.conf_floor)
    h = np.maximum(float32_conv(x, values["weight"], 1, op.size // 2) + values["bias"].astype(np.float32)[:, None, None, None], 0)
    y = np.einsum("gbhwc,gcd->gbhwd", h.astype(case.dtype).astype(np.float32), values["weight_out"].astype(np.float32))
    y += values["bias_out"].astype(np.float32)[:, None, None, None]
    norm = np.linalg.norm(y[..., :3], axis=-1, keepdims=True)
    plain = (y[..., :3] / np.maximum(norm, op.norm_floor) * (np.exp(norm) - 1), op.conf_floor + np.exp(y[..., 3]))
    return {name: (relative(found[name], e), relative(p, e)) for name, e, p in zip(found, exact, plain, strict=True)}


def _taken(flat: Array, groups: int, stride: int, shape: tuple[int, ...]) -> Array:
    """Every group's output; nothing may have been written between them."""
    size = int(np.prod(shape))
    for group in range(groups - 1):
        assert np.isnan(flat[group * stride + size : (group + 1) * stride]).all(), "written between the groups' outputs"
    return np.stack([flat[group * stride : group * stride + size].reshape(shape) for group in range(groups)])


if __name__ == "__main__":
    print(json.dumps({case.name: errors(case, on_gpu=False) for case in SMALL}))
