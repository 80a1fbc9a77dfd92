"""Images to measure with: random, and yet with something in them that two views share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smc.compiler.bench.records import Shape
from smc.exported.images import View, load_view

CELL = 32
"""Pixels between two knots of the smooth part."""

SHIFT = 12
"""Pixels by which the second image of a pair is moved."""

ImagePair = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def image_size(shape: Shape) -> Shape:
    """(H, W) of the images for an input shape: a quarter larger, so that they have to be resized (640x480 for 512x384)."""
    return shape[0] * 5 // 4, shape[1] * 5 // 4


def image_pairs(seed: int, shape: Shape, count: int) -> list[ImagePair]:
    """`count` pairs of uint8 (H, W, 3) images. Both show one smooth random scene, a few pixels apart, under noise of their own."""
    height, width = image_size(shape)
    random = np.random.default_rng([seed, *shape])
    pairs = []
    for _ in range(count):
        scene = _smooth(random, height, width + SHIFT)
        first, second = (
            np.clip(128 + 55 * scene[:, left : left + width] + random.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
            for left in (0, SHIFT)
        )
        pairs.append((first, second))
    return pairs


def view_pairs(pairs: list[ImagePair], shape: Shape) -> list[tuple[View, View]]:
    """The pairs as the network takes them."""
    return [(load_view(first, [shape]), load_view(second, [shape])) for first, second in pairs]


def grid_matches(shape: Shape, subsample: int = 8) -> NDArray[np.int64]:
    """One side of as many matches as there can be: the matcher's starting points, int64 (K, 2) as x, y."""
    y, x = np.mgrid[subsample // 2 : shape[0] : subsample, subsample // 2 : shape[1] : subsample].reshape(2, -1)
    return np.stack([x, y], axis=1)


def _smooth(random: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """A random field (H, W, 3), interpolated linearly between knots."""
    knots = random.standard_normal((height // CELL + 2, width // CELL + 2, 3))
    row, right = np.divmod(np.arange(width) / CELL, 1)
    line, down = np.divmod(np.arange(height) / CELL, 1)
    i, j = line.astype(int)[:, None], row.astype(int)[None, :]
    down, right = down[:, None, None], right[None, :, None]
    above = knots[i, j] * (1 - right) + knots[i, j + 1] * right
    below = knots[i + 1, j] * (1 - right) + knots[i + 1, j + 1] * right
    return above * (1 - down) + below * down
