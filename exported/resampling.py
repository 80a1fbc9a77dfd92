"""The weights of Pillow's resize, so that the same can be done elsewhere, to the last bit.

Pillow resizes 8-bit images across and then down, or the other way round (`is_down_first`), and rounds to 8 bits in between. A pixel of the
result is

    clamp((2^21 + sum over k of weights[k] * source[first + k]) >> 22, 0, 255)

of neighbouring pixels of the source, in 32-bit integers. The filters' definitions are in Pillow's documentation, "Concepts: Filters".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import PIL
from numpy.typing import NDArray

Filter = Literal["lanczos", "bicubic"]

PRECISION_BITS = 22
"""Of the weights: a weight of 1 is 2^22."""

_PILLOW = int(PIL.__version__.partition(".")[0])


@dataclass(frozen=True, eq=False)
class Resampling:
    """One direction of a resize, for a range of the result's pixels.

    Attributes:
        first: int32 (N,): the first of each pixel's neighbours in the source.
        weights: int32 (K, N): those of its K neighbours; zero for neighbours that it does not have.
    """

    first: NDArray[np.int32]
    weights: NDArray[np.int32]

    @property
    def source(self) -> tuple[int, int]:
        """The range of the source's pixels that are read."""
        neighbours = self.first + np.arange(len(self.weights), dtype=np.int32)[:, None]
        return int(self.first.min()), int(neighbours[self.weights != 0].max()) + 1


def is_down_first(size: tuple[int, int], resized: tuple[int, int]) -> bool:
    """Whether the installed Pillow resizes (width, height) down first: from 13 on, where the height shrinks by over twice as much."""
    (width, height), (new_width, new_height) = size, resized
    return _PILLOW >= 13 and height > new_height and height - new_height > 2 * (width - new_width)


@lru_cache(maxsize=64)
def resampling(size: int, resized: int, start: int, stop: int, kind: Filter) -> Resampling:
    """The pixels `start` to `stop` of `resized` ones that are made of `size`. The arrays may not be written to."""
    support, shape = _FILTERS[kind]
    scale = size / resized
    stretch = max(scale, 1.0)  # over as many pixels as become one
    reach = support * stretch
    centre = (np.arange(start, stop) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)  # towards zero, as there
    count = np.minimum((centre + reach + 0.5).astype(np.int64), size) - first
    neighbour = np.arange(2 * math.ceil(reach) + 1)
    values = shape((neighbour + first[:, None] - centre[:, None] + 0.5) * (1 / stretch))
    values[neighbour >= count[:, None]] = 0
    values /= values.sum(axis=1, keepdims=True)
    weights = np.trunc(values * (1 << PRECISION_BITS) + np.copysign(0.5, values))
    made = Resampling(first.astype(np.int32), np.ascontiguousarray(weights.T, np.int32))
    for array in (made.first, made.weights):
        array.flags.writeable = False
    return made


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0.0)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    a, x = -0.5, np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_FILTERS: dict[Filter, tuple[float, Callable[[NDArray[np.float64]], NDArray[np.float64]]]] = {
    "lanczos": (3.0, _lanczos),
    "bicubic": (2.0, _bicubic),
}
"""How far a filter reaches, and its values."""
