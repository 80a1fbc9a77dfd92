"""Matching as an operation on two descriptor maps."""

from __future__ import annotations

from dataclasses import dataclass

MAX_WALK = 10
"""Round trips after which a walk that has not closed is given up, as in `smc.exported.matching`."""

GRID_STEP = 8
"""The step of the usual grid of starting points: a program takes as many at once as that grid has."""

MAX_STARTS = 1 << 13
"""The most starting points of an image that a program takes at once."""


@dataclass(frozen=True)
class Matching:
    """Reciprocal nearest neighbours of two maps.

    A program serves any starting points, any tolerance and both directions: these are values in its operands `starts` and `options`.

    Attributes:
        shape1, shape2: (H, W) of the maps.
        size: of a descriptor.
    """

    shape1: tuple[int, int]
    shape2: tuple[int, int]
    size: int = 24

    def __post_init__(self) -> None:
        for height, width in (self.shape1, self.shape2):
            if not (0 < height < 1 << 15 and 0 < width < 1 << 15 and height * width < 1 << 22):
                raise ValueError(f"a map of {height}x{width} pixels; sides of 1 to 2^15 - 1 pixels fit, and fewer than 2^22 pixels")
        if not 0 < self.size < 128:
            raise ValueError(f"descriptors of size {self.size}; 1 to 127 fit")

    @property
    def points1(self) -> int:
        """Pixels of map 1."""
        return self.shape1[0] * self.shape1[1]

    @property
    def points2(self) -> int:
        """Pixels of map 2."""
        return self.shape2[0] * self.shape2[1]

    @property
    def starts(self) -> int:
        """Starting points of one image that a program takes at once, a multiple of 256. The others wait for the next batch."""
        cells = max((-(-height // GRID_STEP)) * (-(-width // GRID_STEP)) for height, width in (self.shape1, self.shape2))
        return min(MAX_STARTS, -(-cells // 256) * 256)
