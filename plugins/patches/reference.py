"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smc.plugins.patches.specification import Patches


def patches(operation: Patches, image: ArrayLike) -> NDArray[np.float64]:
    """The rows of an image's patches."""
    pixels = np.asarray(image, np.float64)
    if operation.layout == "nhwc":
        pixels = pixels.transpose(0, 3, 1, 2)
    (h, w), size = operation.grid, operation.patch
    pixels = pixels[:, :, : h * size, : w * size].reshape(operation.batch, operation.channels, h, size, w, size)
    return (pixels.transpose(0, 2, 4, 1, 3, 5).reshape(operation.shape) - operation.subtract) * operation.multiply
