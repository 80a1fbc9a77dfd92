"""LayerNorm: the reference, and how many kernels there are. `test_small_operations` runs them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from smc.plugins.layer_norm import reference
from smc.plugins.layer_norm.launches import Tile, launches
from tests.plugins.layer_norm_cases import BOTH, contiguous


def test_the_reference_is_torchs() -> None:
    x, scale, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 32), (32,), (32,)))
    expected = F.layer_norm(x, (32,), scale, bias, 1e-5)
    np.testing.assert_allclose(reference.layer_norm(x, scale, bias, 1e-5), expected, rtol=1e-12, atol=1e-13)


def test_one_kernel_serves_all_numbers_of_rows() -> None:
    kernels = {launches(contiguous(1, rows, 1024, **BOTH), Tile(1, 4), 90)[0].kernel for rows in (768, 1536, 3072)}
    assert len(kernels) == 1
