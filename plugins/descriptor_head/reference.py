"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smc.plugins.descriptor_head.specification import DescriptorHead


def descriptor_head(operation: DescriptorHead, f: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """f (groups, batch * h * w, (channels + 1) * patch^2) -> desc and desc_conf."""
    images, h, w, size = operation.groups * operation.batch, operation.h, operation.w, operation.patch
    shuffled = np.asarray(f, np.float64).reshape(images, h, w, -1, size, size).transpose(0, 1, 4, 2, 5, 3)
    pixels = shuffled.reshape(images, h * size, w * size, -1)
    desc, confidence = pixels[..., : operation.channels], pixels[..., operation.channels]
    norm = np.sqrt((desc**2).sum(axis=-1, keepdims=True))
    if operation.least_norm is not None:
        norm = np.maximum(norm, operation.least_norm)
    return desc / norm, operation.confidence + np.exp(confidence)
