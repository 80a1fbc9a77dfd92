"""The convolution kernels: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smc.plugins.conv import launches, reference
from smc.plugins.conv.launches import HopperTile, Tile
from smc.plugins.conv.specification import Conv, Map, contiguous
from tests.plugins.conv_cases import LARGE, SMALL, Case, Errors, errors
from tests.plugins.interpreting import run_cases

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits


def conv(height: int, width: int, channels: int, out_channels: int, **options: Any) -> Conv:
    """Two views' convolution of one image each, in float16, where every map fills its operand."""
    x = contiguous("float16", 1, height, width, channels)
    return Conv(2, 1, height, width, channels, out_channels, x, contiguous("float16", 1, height, width, out_channels), **options)


MODEL = conv(96, 128, 256, 256, bias="float16", residual=contiguous("float16", 1, 96, 128, 256))


# The specification and the reference


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"in_channels": 12}, "in_channels is 12; a multiple of 8"),
        ({"batch": 0}, "batch is 0"),
        ({"height": 1, "padding": 0}, "out_height is -1"),
        ({"padding": -1}, "padding is -1"),
        ({"x": Map("float16", 0, 0, 2**30, 256)}, "an image has 2\\^31 elements"),
    ],
)
def test_attributes_out_of_bounds_are_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(MODEL, **attributes)


@pytest.mark.parametrize("name", ["group", "batch", "row", "column", "offset"])
def test_places_off_16_bytes_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 12 elements of float16"):
        replace(MODEL.x, **{name: 12})


@pytest.mark.parametrize(("size", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (2, 2, 0), (5, 3, 4)])
def test_the_reference_is_torchs_convolution(size: int, stride: int, padding: int) -> None:
    random = np.random.default_rng(0)
    x, weight, bias = (random.standard_normal(shape) for shape in ((1, 2, 7, 9, 4), (1, size, size, 4, 6), (1, 6)))
    out = reference.conv(x, weight, stride, padding, bias)
    kernel = torch.from_numpy(weight[0]).permute(3, 2, 0, 1)
    expected = F.conv2d(torch.from_numpy(x[0]).permute(0, 3, 1, 2), kernel, torch.from_numpy(bias[0]), stride, padding)
    np.testing.assert_allclose(out[0], expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.conv(x, weight, stride, padding, bias, out), 2 * out, rtol=1e-12)


# The kernels' arithmetic, on the CPU


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Errors]:
    return run_cases("conv_cases")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(interpreted: dict[str, Errors], case: Case) -> None:
    found = interpreted[case.name]
    assert set(found) == ({"out", "out_relu"} if case.both else {"out"})
    assert all(ours <= 2 * plain for ours, plain in found.values())


# How the work is cut


@pytest.mark.parametrize("sm", [80, 86, 90, 120])
@pytest.mark.parametrize(
    "op",
    [MODEL, conv(12, 16, 768, 256), conv(24, 32, 768, 768, padding=0, size=1), replace(MODEL, stride=2)],
    ids=lambda op: str(op.in_channels),
)
def test_candidates(op: Conv, sm: int) -> None:
    found = launches.tiles(op, sm)
    assert found[0] == launches.default_tile(op, sm)
    assert len(set(found)) == len(found) >= 2
    assert all(isinstance(tile, Tile) or (sm == 90 and op.stride == 1) for tile in found)
    for tile in found:
        made = launches.launches(op, tile, sm)
        assert len(made) == (1 if tile.splits == 1 else 2)
        assert made[0].grid[0] * made[0].grid[1] * made[0].grid[2] == tile.count(op)
        assert ("partial" in launches.workspace(op, tile)) == (tile.splits > 1)
        assert all(launch.kernel.overlaps == (sm >= 90) for launch in made)


def test_images_of_other_sizes_take_the_same_kernel() -> None:
    for tile in (Tile(8, 16, 128, 64, 8, 3), HopperTile(3, 1, 256, 2, 4)):
        kernels = {launches.launches(conv(h, w, 256, 256), tile, 90)[0].kernel for h, w in ((96, 128), (48, 64), (112, 160))}
        assert len(kernels) == 1


@pytest.mark.parametrize(
    ("op", "tile", "sm"),
    [
        (replace(MODEL, stride=2), HopperTile(3, 1, 256, 2, 4), 90),
        (MODEL, HopperTile(3, 1, 256, 2, 4), 80),
        (replace(MODEL, stride=2), Tile(8, 16, 128, 64, 8, 3, tma=True), 90),
        (MODEL, Tile(8, 16, 128, 64, 8, 3, tma=True), 86),
    ],
)
def test_tiles_that_do_not_take_the_convolution_are_refused(op: Conv, tile: Any, sm: int) -> None:
    with pytest.raises(ValueError, match="convolutions of stride 1"):
        launches.launches(op, tile, sm)


# Ahead of time, with no GPU


@pytest.mark.parametrize(
    ("tile", "sm"),
    [
        (None, 80),
        (None, 86),
        (None, 89),
        (Tile(4, 16, 128, 64, 4, 3, splits=3, tma=True), 90),
        (HopperTile(3, 1, 256, 2, 4), 90),
        (HopperTile(3, 2, 128, 2, 4), 90),
        (HopperTile(2, 1, 256, 2, 4, splits=3), 90),
    ],
    ids=str,
)
def test_compiles(tile: Tile | HopperTile | None, sm: int) -> None:
    product, *sums = launches.launches(MODEL, tile or launches.default_tile(MODEL, sm), sm)
    for launch in (product, *sums):
        built = compile_kernel(launch.kernel, sm)
        assert fits(built, sm)
        # Groups of warps beyond the first are parts of a Hopper kernel of their own.
        groups = tile.groups if isinstance(tile, HopperTile) and launch is product else 1
        assert built.threads == 32 * launch.kernel.warps * groups


@pytest.mark.parametrize("sm", [80, 86, 90])
def test_float32_compiles(sm: int) -> None:
    place = contiguous("float32", 1, 96, 128, 256)
    op = replace(MODEL, x=place, out=place, residual=place, bias="float32")
    (launch,) = launches.launches(op, launches.default_tile(op, sm), sm)
    assert fits(compile_kernel(launch.kernel, sm), sm)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_on_the_gpu(case: Case) -> None:
    assert all(ours <= 2 * plain for ours, plain in errors(case, on_gpu=True).values())
