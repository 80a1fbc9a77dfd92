"""The descriptor head: the reference, and how many kernels there are. `test_small_operations` runs them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from smc.plugins.descriptor_head import reference
from smc.plugins.descriptor_head.launches import Tile, launches
from tests.plugins.descriptor_head_cases import contiguous


def test_the_reference_is_mast3rs() -> None:
    operation = contiguous(1, 2, 3, 2, 8, 4)
    f = torch.randn(1, 2 * 3 * 2, 9 * 16, dtype=torch.float64)
    maps = F.pixel_shuffle(f.reshape(2, 6, 9 * 16).transpose(1, 2).reshape(2, 9 * 16, 3, 2), 4).permute(0, 2, 3, 1)
    desc, confidence = reference.descriptor_head(operation, f)
    np.testing.assert_allclose(desc, F.normalize(maps[..., :8], dim=-1), rtol=1e-12)
    np.testing.assert_allclose(confidence, 1 + maps[..., 8].exp(), rtol=1e-12)


def test_one_kernel_serves_all_images() -> None:
    operations = [contiguous(2, batch, h, w, 24, 16) for batch, h, w in ((1, 24, 32), (4, 16, 32), (1, 32, 32))]
    assert len({launches(operation, Tile(128, 4), 90)[0].kernel for operation in operations}) == 1
