"""The descriptor head's kernel: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smc.plugins.descriptor_head import reference
from smc.plugins.descriptor_head.launches import Tile, default_tile, launches, tiles
from tests.plugins.descriptor_head_cases import SMALL, case, contiguous
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.small_cases import errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

REAL = {
    "a pair": contiguous(2, 1, 24, 32, 24, 16, desc16=True),
    "desc alone": contiguous(2, 1, 24, 32, 24, 16),
    "two pairs, float32": contiguous(2, 2, 14, 14, 24, 16, dtype="float32", desc16=True),
}


def test_the_reference_is_mast3rs() -> None:
    operation = contiguous(1, 2, 3, 2, 8, 4)
    f = torch.randn(1, 2 * 3 * 2, 9 * 16, dtype=torch.float64)
    maps = F.pixel_shuffle(f.reshape(2, 6, 9 * 16).transpose(1, 2).reshape(2, 9 * 16, 3, 2), 4).permute(0, 2, 3, 1)
    desc, confidence = reference.descriptor_head(operation, f)
    np.testing.assert_allclose(desc, F.normalize(maps[..., :8], dim=-1), rtol=1e-12)
    np.testing.assert_allclose(confidence, 1 + maps[..., 8].exp(), rtol=1e-12)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run_cases("descriptor_head_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: Any, name: str) -> None:
    assert all(is_close(*error) for error in interpreted[name].values())


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_compiles_for_any_gpu(sm: int) -> None:
    for operation in REAL.values():
        (made,) = launches(operation, default_tile(operation, sm), sm)
        assert fits(compile_kernel(made.kernel, sm), sm)
        assert made.kernel.overlaps == (sm == 90)


def test_one_kernel_serves_all_images() -> None:
    operations = [contiguous(2, batch, h, w, 24, 16) for batch, h, w in ((1, 24, 32), (4, 16, 32), (1, 32, 32))]
    assert len({launches(operation, Tile(128, 4), 90)[0].kernel for operation in operations}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_on_the_gpu(name: str) -> None:
    for tile in tiles(REAL[name], gpu_sm()):
        found = errors(case(REAL[name], tile, gpu_sm()), run_on_gpu)
        assert all(is_close(*error) for error in found.values()), (tile, found)


@pytest.mark.gpu
def test_small_cases_on_the_gpu() -> None:
    for operation, tile in SMALL.values():
        found = errors(case(operation, tile, gpu_sm()), run_on_gpu)
        assert all(is_close(*error) for error in found.values()), (operation, found)
