"""Image pairs with ground truth.

Coordinates are x, y in pixels of the image as stored, the centre of the first pixel at (0, 0); intrinsics and homographies are in
these coordinates too. Poses take a point from one camera's frame to another's: x right, y down, z forward.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

Task = Literal["pose", "homography"]

Floats = NDArray[np.float64]

Image = NDArray[np.uint8] | Path
"""uint8 (H, W, 3) RGB or (H, W) grey, or a file."""

Warp = Callable[[Floats], tuple[NDArray[np.floating], NDArray[np.bool_]]]
"""Points (K, 2) of the first image -> where they are in the second (K, 2), and whether they are seen there (K,)."""


@runtime_checkable
class PosePair(Protocol):
    """Two calibrated views of one scene.

    Attributes:
        name: unique in its data set.
        image0, image1: the images.
        K0, K1: (3, 3) intrinsics.
        T_0to1: (4, 4) from the first camera's frame to the second's; its translation counts up to scale.
        warp: the exact correspondence, where it is known.
    """

    @property
    def name(self) -> str: ...
    @property
    def image0(self) -> Image: ...
    @property
    def image1(self) -> Image: ...
    @property
    def K0(self) -> Floats: ...  # noqa: N802
    @property
    def K1(self) -> Floats: ...  # noqa: N802
    @property
    def T_0to1(self) -> Floats: ...  # noqa: N802
    @property
    def warp(self) -> Warp | None: ...


@dataclass(frozen=True, eq=False)
class ListedPair:
    """A `PosePair` of a list."""

    name: str
    image0: Image
    image1: Image
    K0: Floats
    K1: Floats
    T_0to1: Floats
    warp: Warp | None = None


@dataclass(frozen=True, eq=False)
class HomographyPair:
    """Two views of a plane. `homography` (3, 3) takes points (x, y, 1) of the first image to the second."""

    name: str
    image0: Image
    image1: Image
    homography: Floats


Pair = PosePair | HomographyPair


@dataclass(frozen=True)
class Scale:
    """The size of image in whose pixels errors and thresholds count. `side` None: the image's own."""

    side: Literal["long", "short"] | None = None
    pixels: int = 0

    def factor(self, width: int, height: int) -> float:
        """What coordinates of an image of this size are multiplied by."""
        if self.side is None:
            return 1.0
        return self.pixels / (max(width, height) if self.side == "long" else min(width, height))

    def __str__(self) -> str:
        return "own size" if self.side is None else f"{self.side} side {self.pixels} px"


OWN_SIZE = Scale()


@dataclass(frozen=True)
class PairSet:
    """A data set.

    Attributes:
        kind: of data, the first part of `--data`.
        task: what the ground truth of its pairs allows to be estimated.
        names: of its pairs, each once.
        load: gives a pair by its index; what takes time, such as rendering, happens here.
        files: the images that it needs, to be looked for before work begins.
        digest: of names and ground truth.
        scale: see `Scale`.
        origin: what made the pairs, where they are the project's own.
    """

    kind: str
    task: Task
    names: Sequence[str]
    load: Callable[[int], Pair]
    files: Sequence[Path]
    digest: str
    scale: Scale = OWN_SIZE
    origin: str = ""

    def __len__(self) -> int:
        return len(self.names)

    def part(self, first: int, step: int) -> PairSet:
        """Every `step`th pair from `first` on, for processes that share the work."""
        indices = range(first, len(self), step)
        return replace(self, names=[self.names[i] for i in indices], load=lambda index: self.load(indices[index]))


def digest_of(pairs: Iterable[tuple[str, Sequence[Floats]]]) -> str:
    """A digest of pairs' names and ground truth."""
    state = hashlib.sha256()
    for name, arrays in pairs:
        state.update(name.encode() + b"\0")
        for array in arrays:
            state.update(np.ascontiguousarray(array, "<f8").tobytes())
    return state.hexdigest()


def unique(names: Iterable[str]) -> list[str]:
    """The names, the second of a kind with #2 behind it, and so on: published lists may hold a pair twice."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} #{seen[name]}")
    return found
