"""The enlarging kernel: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smc.plugins.conv.specification import contiguous
from smc.plugins.upsample import launches, reference
from smc.plugins.upsample.specification import Upsample
from tests.plugins.conv_cases import Errors
from tests.plugins.interpreting import run_cases
from tests.plugins.upsample_cases import LARGE, SMALL, Case, errors

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

LARGE_MAP = contiguous("float16", 1, 96, 128, 256)
MODEL = Upsample(2, 1, 48, 64, 96, 128, 256, contiguous("float16", 1, 48, 64, 256), LARGE_MAP, LARGE_MAP, LARGE_MAP)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"channels": 12}, "channels is 12; a multiple of 8"),
        ({"out_width": 0}, "out_width is 0"),
        ({"out": replace(LARGE_MAP, row=2**30)}, "an image has 2\\^31 elements"),
    ],
)
def test_attributes_out_of_bounds_are_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        replace(MODEL, **attributes)


@pytest.mark.parametrize("size", [(6, 10), (1, 7), (5, 1), (3, 5)])
def test_the_reference_is_torchs_interpolation(size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal((2, 1, 3, 5, 4))
    expected = F.interpolate(torch.from_numpy(x[:, 0]).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=True)
    out = reference.upsample(x, *size)
    np.testing.assert_allclose(out[:, 0], expected.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(reference.upsample(x, *size, out), 2 * out, rtol=1e-12)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Errors]:
    return run_cases("upsample_cases")


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_interpreted(interpreted: dict[str, Errors], case: Case) -> None:
    found = interpreted[case.name]
    assert set(found) == ({"out", "out_relu"} if case.both else {"out"})
    assert all(ours <= 2 * plain for ours, plain in found.values())


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_compiles(sm: int) -> None:
    (launch,) = launches.launches(MODEL, launches.default_tile(MODEL, sm), sm)
    assert fits(compile_kernel(launch.kernel, sm), sm)


@pytest.mark.parametrize(("size", "out_size"), [*((size, 2 * size) for size in (1, 2, 3, 7, 24, 192, 255, 1000)), (2, 6), (3, 10)])
def test_at_twice_the_size_and_some_others_outputs_share_their_neighbours_in_pairs(size: int, out_size: int) -> None:
    assert launches.cell_of(size, out_size) == 2


@pytest.mark.parametrize(("size", "out_size"), [(4, 11), (3, 3), (6, 1), (8, 4), (5, 9)])
def test_where_a_pair_straddles_a_pixel_cells_are_one_output(size: int, out_size: int) -> None:
    assert launches.cell_of(size, out_size) == 1


def test_candidates() -> None:
    found = launches.tiles(MODEL, 90)
    assert found[0] == launches.default_tile(MODEL, 90)
    assert len(set(found)) == len(found) >= 2


@pytest.mark.gpu
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.name)
def test_on_the_gpu(case: Case) -> None:
    assert all(ours <= 2 * plain for ours, plain in errors(case, on_gpu=True).values())
