"""The point head's kernels: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from smc.plugins.conv.launches import HopperTile, Tile
from smc.plugins.conv.specification import contiguous
from smc.plugins.point_head import launches, reference
from smc.plugins.point_head.specification import PointHead
from tests.plugins.conv_cases import Errors
from tests.plugins.interpreting import run_cases
from tests.plugins.point_head_cases import LARGE, SMALL, Case, errors

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

PIXELS = 384 * 512
MODEL = PointHead(2, 1, 384, 512, 128, 128, contiguous("float16", 1, 384, 512, 128), 3 * PIXELS, PIXELS)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"channels": 264}, "channels is 264; the kernel takes at most 256"),
        ({"size": 2}, "size is 2; an odd one is needed"),
        ({"in_channels": 20}, "in_channels is 20; a multiple of 8"),
        ({"batch": 4000}, "an output has 2\\^31 elements"),
    ],
)
def test_attributes_out_of_bounds_are_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(MODEL, **attributes)


def test_the_reference_at_a_pixel() -> None:
    # One pixel of one channel, which the convolution doubles and the last product spreads.
    x, weight, bias = np.full((1, 1, 1, 1, 1), 1.5), np.full((1, 1, 1, 1, 1), 2.0), np.zeros((1, 1))
    weight_out, bias_out = np.array([[[1.0, 0.0, 0.0, 1.0]]]), np.array([[0.0, 4.0, 0.0, -3.0]])
    pts3d, conf = reference.point_head(x, weight, bias, weight_out, bias_out, 1e-8, 1.0)
    np.testing.assert_allclose(pts3d[0, 0, 0, 0], np.array([0.6, 0.8, 0.0]) * np.expm1(5.0))
    np.testing.assert_allclose(conf[0, 0, 0, 0], 2.0)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Errors]:
    return run_cases("point_head_cases")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(interpreted: dict[str, Errors], case: Case) -> None:
    found = interpreted[case.name]
    assert set(found) == {"pts3d", "conf"}
    assert all(ours <= 2 * plain for ours, plain in found.values())


@pytest.mark.parametrize("tile", [Tile(8, 16, 64, 32, 8, 3), Tile(8, 16, 128, 32, 8, 3, splits=2)])
def test_a_program_makes_all_channels(tile: Tile) -> None:
    with pytest.raises(ValueError, match="all channels"):
        launches.launches(MODEL, tile, 86)


def test_the_hopper_kernel_is_for_sm_90() -> None:
    with pytest.raises(ValueError, match=r"sm 9\.0"):
        launches.launches(MODEL, HopperTile(3, 2, 128, 2, 4), 120)


@pytest.mark.parametrize("sm", [80, 86, 90, 120])
def test_candidates(sm: int) -> None:
    found = launches.tiles(MODEL, sm)
    assert found[0] == launches.default_tile(MODEL, sm)
    assert len(set(found)) == len(found) >= 2


@pytest.mark.parametrize(
    ("tile", "sm"),
    [
        (None, 80),
        (None, 86),
        (None, 89),
        (Tile(1, 128, 128, 64, 8, 3, tma=True), 90),
        (HopperTile(3, 2, 128, 2, 4), 90),
        (HopperTile(2, 1, 128, 3, 6), 90),
    ],
    ids=str,
)
def test_compiles(tile: Tile | HopperTile | None, sm: int) -> None:
    (launch,) = launches.launches(MODEL, tile or launches.default_tile(MODEL, sm), sm)
    assert fits(compile_kernel(launch.kernel, sm), sm)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_on_the_gpu(case: Case) -> None:
    assert all(ours <= 2 * plain for ours, plain in errors(case, on_gpu=True).values())
