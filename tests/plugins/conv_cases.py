"""Convolutions for the kernels, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.conv_cases

prints, as JSON, each small case's errors on the CPU and those of a plain computation of the same precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from smc.plugins.conv import launches, reference
from smc.plugins.conv.launches import HopperTile, Tile
from smc.plugins.conv.specification import Conv, Dtype, Map, contiguous
from smc.plugins.launch import Launch
from tests.plugins.launching import interpret, run_on_gpu, without_overlap

Array = NDArray[Any]
Errors = dict[str, tuple[float, float]]
"""Output -> the kernel's error relative to float64, ||out - exact|| / ||exact||, and that of the plain computation."""


def spread(dtype: Dtype, batch: int, height: int, width: int, channels: int) -> Map:
    """A map with gaps between channels, pixels, rows, images and groups, and before the first."""
    column = channels + 16
    row = column * width + 32
    return Map(dtype, (row * height + 16) * batch + 64, row * height + 16, row, column, offset=48)


def turned(dtype: Dtype, batch: int, height: int, width: int, channels: int) -> Map:
    """A map of two groups that lie in the other order, the images of both side by side in one row of pixels."""
    row = 2 * width * channels
    return Map(dtype, -width * channels, row * height, row, channels, offset=width * channels)


LAYOUTS: dict[str, Callable[..., Map]] = {"contiguous": contiguous, "spread": spread, "turned": turned}


def tile_name(tile: Tile | HopperTile | None) -> str:
    if tile is None:
        return "default"
    if isinstance(tile, HopperTile):
        return f"hopper{tile.groups}x{tile.rows}x{tile.channels}s{tile.splits}"
    return f"{tile.height}x{tile.width}x{tile.channels}x{tile.depth}s{tile.splits}{'tma' if tile.tma else ''}"


@dataclass(frozen=True)
class Case:
    height: int
    width: int
    in_channels: int
    out_channels: int
    tile: Tile | HopperTile
    groups: int = 2
    batch: int = 1
    dtype: Dtype = "float16"
    layout: str = "contiguous"
    size: int = 3
    stride: int = 1
    padding: int = 1
    bias: Dtype | None = None
    residual: bool = False
    relu: bool = False
    both: bool = False
    """Whether out_relu is written."""

    @property
    def name(self) -> str:
        parts = [f"{self.groups}x{self.batch}x{self.height}x{self.width}x{self.in_channels}x{self.out_channels}", self.dtype, self.layout]
        parts += [
            f"{self.size}s{self.stride}p{self.padding}",
            str(self.bias),
            *(n for n in ("residual", "relu", "both") if getattr(self, n)),
        ]
        return "-".join([*parts, tile_name(self.tile)])

    @property
    def operation(self) -> Conv:
        height, width = ((n + 2 * self.padding - self.size) // self.stride + 1 for n in (self.height, self.width))
        make = LAYOUTS[self.layout]
        result = make(self.dtype, self.batch, height, width, self.out_channels)
        return Conv(
            self.groups,
            self.batch,
            self.height,
            self.width,
            self.in_channels,
            self.out_channels,
            make(self.dtype, self.batch, self.height, self.width, self.in_channels),
            result,
            self.size,
            self.stride,
            self.padding,
            self.bias,
            result if self.residual else None,
            "relu" if self.relu else "none",
            contiguous(self.dtype, self.batch, height, width, self.out_channels) if self.both else None,
        )


PLAIN = Tile(4, 8, 32, 32, warps=4, stages=2)
COPIED = Tile(4, 8, 32, 32, warps=4, stages=2, tma=True)

SMALL = [
    Case(5, 9, 16, 24, PLAIN, groups=1),
    Case(5, 9, 16, 24, COPIED, groups=1),
    Case(8, 8, 32, 32, PLAIN, batch=2, bias="float16", relu=True),
    Case(8, 8, 32, 32, COPIED, batch=2, bias="float32", relu=True),
    Case(7, 10, 40, 48, PLAIN, bias="float32", residual=True, both=True, layout="spread"),
    Case(7, 10, 40, 48, COPIED, bias="float16", residual=True, both=True, layout="spread"),
    Case(3, 5, 48, 40, COPIED, residual=True, relu=True, layout="spread"),
    Case(3, 5, 48, 40, PLAIN, both=True, layout="turned"),
    Case(6, 7, 40, 24, Tile(4, 8, 32, 16, warps=4, stages=2, splits=5, tma=True), batch=2, bias="float16", residual=True, both=True),
    Case(6, 7, 40, 24, Tile(4, 8, 16, 32, warps=4, stages=2, splits=3), batch=2, bias="float16", relu=True, layout="spread"),
    Case(9, 6, 32, 32, PLAIN, stride=2, bias="float32"),
    Case(8, 12, 24, 32, Tile(2, 16, 32, 16, warps=4, stages=2, splits=4), stride=2),
    Case(6, 7, 16, 16, PLAIN, size=1, padding=0),
    Case(6, 7, 16, 16, COPIED, size=5, padding=0, groups=1),
    Case(6, 6, 16, 16, PLAIN, size=2, stride=2, padding=0, groups=1),
    Case(5, 6, 24, 40, COPIED, dtype="float32", bias="float32", residual=True),
    Case(5, 6, 24, 40, PLAIN, dtype="float32", bias="float16", relu=True),
]


FAST = [
    Tile(8, 16, 128, 32, warps=8, stages=3),
    Tile(8, 8, 64, 64, warps=4, stages=3, splits=5),
    Tile(1, 128, 256, 64, warps=8, stages=3, tma=True),
    Tile(4, 16, 128, 64, warps=4, stages=3, splits=3, tma=True),
    HopperTile(3, 1, 256, 2, 4),
    HopperTile(2, 1, 256, 2, 4, splits=3),
    HopperTile(3, 2, 128, 2, 4),
    HopperTile(2, 2, 128, 2, 6),
    HopperTile(3, 1, 64, 3, 8, splits=2),
    HopperTile(2, 1, 128, 3, 6),
]

LARGE = [
    *(Case(50, 70, 256, 256, tile, bias="float16", residual=True, both=True, layout="spread") for tile in FAST),
    *(Case(49, 130, 104, 200, tile, batch=2, bias="float32", relu=True) for tile in FAST),
    *(Case(13, 17, 768, 256, tile, residual=True, layout="spread") for tile in FAST[1::2]),
    Case(13, 17, 256, 256, FAST[1], residual=True, layout="turned"),
    Case(21, 30, 320, 768, Tile(8, 8, 64, 64, warps=4, stages=3, splits=4), stride=2, bias="float16"),
    Case(50, 70, 64, 64, HopperTile(2, 1, 64, 2, 3), size=5, padding=2),
    Case(50, 70, 64, 64, HopperTile(2, 1, 64, 2, 3), size=1, padding=0),
    Case(40, 50, 72, 64, Tile(4, 8, 64, 32, warps=4, stages=3, tma=True), dtype="float32", bias="float32", residual=True),
    Case(40, 50, 72, 64, Tile(4, 8, 64, 32, warps=4, stages=2), dtype="float32", bias="float32", residual=True),
]
"""For sm 9.0."""


def scatter(place: Map, values: Array) -> Array:
    """`values` (groups, B, H, W, C) as `place` has them, in a flat operand that is NaN elsewhere."""
    indices = _indices(place, values.shape)
    flat = np.full(int(indices.max()) + 64, np.nan, values.dtype)
    flat[indices] = values
    return flat


def gather(place: Map, flat: Array, shape: tuple[int, ...]) -> Array:
    """What `place` says of a flat operand. All else there must still be NaN: nothing was written beside the map."""
    indices = _indices(place, shape)
    beside = np.ones(flat.size, bool)
    beside[indices] = False
    assert np.isnan(flat[beside]).all(), "written beside the map"
    return flat[indices]


def _indices(place: Map, shape: tuple[int, ...]) -> NDArray[np.int64]:
    steps = (place.group, place.batch, place.row, place.column, 1)
    return place.offset + sum(
        np.arange(n).reshape([-1 if a == axis else 1 for a in range(5)]) * s for axis, (n, s) in enumerate(zip(shape, steps, strict=True))
    )


def relative(x: Array, exact: Array) -> float:
    """||x - exact|| / ||exact||; NaN anywhere makes it NaN."""
    return float(np.linalg.norm(x.astype(np.float64) - exact) / np.linalg.norm(exact))


def run(made: list[Launch], operands: dict[str, Array], on_gpu: bool) -> dict[str, Array]:
    """The operands after launches of an operation, one after the other."""
    for launch in made:
        if on_gpu:
            operands = run_on_gpu(launch, operands)
        else:
            interpret(without_overlap(launch), operands)
    return operands


def exact_conv(x: Array, weight: Array, stride: int, padding: int, on_gpu: bool) -> Array:
    """The convolution of `reference`; on a GPU by torch, in float64 too."""
    if not on_gpu:
        return reference.conv(x, weight, stride, padding)
    made = [
        F.conv2d(
            torch.from_numpy(g).cuda().double().permute(0, 3, 1, 2),
            torch.from_numpy(w).cuda().double().permute(3, 2, 0, 1),
            stride=stride,
            padding=padding,
        )
        for g, w in zip(x, weight, strict=True)
    ]
    return torch.stack(made).permute(0, 1, 3, 4, 2).cpu().numpy()


def float32_conv(x: Array, weight: Array, stride: int, padding: int) -> Array:
    """The convolution of `reference` by torch, with float32 sums, on the CPU."""
    made = [
        F.conv2d(
            torch.from_numpy(g).float().permute(0, 3, 1, 2), torch.from_numpy(w).float().permute(3, 2, 0, 1), stride=stride, padding=padding
        )
        for g, w in zip(x, weight, strict=True)
    ]
    return torch.stack(made).permute(0, 1, 3, 4, 2).numpy()


def operands(case: Case, seed: int) -> dict[str, Array]:
    """Random values of each operand, maps as (groups, B, H, W, C)."""
    op, random = case.operation, np.random.default_rng(seed)
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.out_channels)
    fan_in = op.size**2 * op.in_channels
    made = {
        "x": random.standard_normal((op.groups, op.batch, op.height, op.width, op.in_channels)).astype(case.dtype),
        "weight": (random.standard_normal((op.groups, op.size, op.size, op.in_channels, op.out_channels)) / fan_in**0.5).astype(case.dtype),
    }
    if op.bias:
        made["bias"] = random.standard_normal((op.groups, op.out_channels)).astype(op.bias)
    if op.residual:
        made["residual"] = random.standard_normal(shape).astype(case.dtype)
    return made


def errors(case: Case, on_gpu: bool, seed: int = 0) -> Errors:
    op, values = case.operation, operands(case, seed)
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.out_channels)
    maps = {"x": op.x, "residual": op.residual, "out": op.out, "out_relu": op.out_relu}
    flat = {name: scatter(place, values[name]) for name, place in maps.items() if place and name in values}
    flat |= {name: values[name] for name in ("weight", "bias") if name in values}
    for name in ("out", "out_relu"):
        place = maps[name]
        if place:
            flat[name] = scatter(place, np.full(shape, np.nan, case.dtype))
    for name, (dtype, size) in launches.workspace(op, case.tile).items():
        flat[name] = np.full(size, np.nan, dtype)
    after = run(launches.launches(op, case.tile, 90), flat, on_gpu)

    exact = exact_conv(values["x"], values["weight"], op.stride, op.padding, on_gpu)
    if "bias" in values:
        exact = exact + values["bias"].astype(np.float64)[:, None, None, None]
    if "residual" in values:
        exact = exact + values["residual"]
    plain = float32_conv(values["x"], values["weight"], op.stride, op.padding)
    if "bias" in values:
        plain = plain + values["bias"].astype(np.float32)[:, None, None, None]
    if "residual" in values:
        plain = plain + values["residual"].astype(np.float32)
    if case.relu:
        exact, plain = np.maximum(exact, 0), np.maximum(plain, 0)
    found: Errors = {}
    for name in ("out", "out_relu"):
        place = maps[name]
        if place:
            limit = 0.0 if name == "out_relu" else -np.inf
            want = np.maximum(exact, limit)
            found[name] = (
                relative(gather(place, after[name], shape), want),
                relative(np.maximum(plain, limit).astype(case.dtype), want),
            )
    return found


if __name__ == "__main__":
    print(json.dumps({case.name: errors(case, on_gpu=False) for case in SMALL}))
