"""The kernel of Patches: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smc.plugins.patches import reference
from smc.plugins.patches.launches import default_tile, launches, tiles
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.patches_cases import SMALL, bytes_in, case, floats_in
from tests.plugins.small_cases import errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

REAL = {
    "bytes": bytes_in(2, 384, 512, patch=16),
    "floats": floats_in(2, 384, 512, patch=16),
    "half floats": floats_in(1, 224, 224, patch=16, dtype="float16"),
}


@pytest.mark.parametrize("operation", [SMALL["bytes to float32"][0], SMALL["floats left over"][0]], ids=["bytes", "floats"])
def test_a_convolution_is_its_weight_times_patches(operation: Any) -> None:
    shape = (operation.batch, operation.height, operation.width, operation.channels)
    pixels = torch.randn(shape, dtype=torch.float64)
    weight = torch.randn(7, operation.channels, operation.patch, operation.patch, dtype=torch.float64)
    image = pixels if operation.layout == "nhwc" else pixels.permute(0, 3, 1, 2)
    normalized = (pixels.permute(0, 3, 1, 2) - operation.subtract) * operation.multiply
    expected = torch.nn.functional.conv2d(normalized, weight, stride=operation.patch).flatten(2).transpose(1, 2).flatten(0, 1)
    rows = reference.patches(operation, image)
    np.testing.assert_allclose(rows @ weight.flatten(1).numpy().T, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run_cases("patches_cases")


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
    operations = [bytes_in(batch, height, width, patch=16) for batch, height, width in ((2, 384, 512), (8, 256, 512), (1, 512, 512))]
    assert len({launches(operation, tiles(operation, 90)[0], 90)[0].kernel for operation in operations}) <= 2  # an odd number of rows


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
