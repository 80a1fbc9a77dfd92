"""Patches: the reference, and how many kernels there are. `test_small_operations` runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from smc.plugins.patches import reference
from smc.plugins.patches.launches import launches, tiles
from tests.plugins.patches_cases import SMALL, bytes_in


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


def test_one_kernel_serves_all_images() -> None:
    operations = [bytes_in(batch, height, width, patch=16) for batch, height, width in ((2, 384, 512), (8, 256, 512), (1, 512, 512))]
    assert len({launches(operation, tiles(operation, 90)[0], 90)[0].kernel for operation in operations}) <= 2  # an odd number of rows
