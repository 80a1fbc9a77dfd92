"""Pairs of known geometry, and matchers that know it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.compiler.evaluation.matchers import Correspondences
from smc.compiler.evaluation.pairs import Floats, ListedPair, PairSet

WIDTH, HEIGHT = 320, 240

CAMERA = np.array([[300.0, 0, 159.5], [0, 310.0, 119.5], [0, 0, 1]])


def rotation(degrees: float, axis: Sequence[float]) -> Floats:
    """(3, 3), by Rodrigues' formula."""
    x, y, z = np.asarray(axis) / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    angle = np.radians(degrees)
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def pose(degrees: float = 12, axis: Sequence[float] = (0.2, 1, 0.1), move: Sequence[float] = (-0.8, 0.1, 0.2)) -> Floats:
    """(4, 4)."""
    found = np.eye(4)
    found[:3, :3], found[:3, 3] = rotation(degrees, axis), move
    return found


def project(points: Floats, intrinsics: Floats) -> Floats:
    """Points (K, 3) in a camera's frame -> pixels (K, 2)."""
    mapped = points @ intrinsics.T
    return mapped[:, :2] / mapped[:, 2:]


def seen_points(T_0to1: Floats, count: int = 300, seed: int = 0, intrinsics: Floats = CAMERA) -> tuple[Floats, Floats]:  # noqa: N803
    """Pixels of points at many depths in both images, (K, 2) each."""
    random = np.random.default_rng(seed)
    xy = random.uniform((10, 10), (WIDTH - 10, HEIGHT - 10), (count, 2))
    points = np.column_stack([xy, np.ones(count)]) @ np.linalg.inv(intrinsics).T * random.uniform(3, 9, (count, 1))
    return xy, project(points @ T_0to1[:3, :3].T + T_0to1[:3, 3], intrinsics)


def noise_image(seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)


def planted_set(count: int = 4, kind: str = "planted") -> PairSet:
    """Pairs whose first image's first pixel is their index, which `PlantedMatcher` reads."""
    poses = [pose(5 + 5 * i) for i in range(count)]

    def load(index: int) -> ListedPair:
        image = noise_image(index)
        image[0, 0] = index
        return ListedPair(f"pair {index}", image, noise_image(100 + index), CAMERA, CAMERA, poses[index])

    return PairSet(kind, "pose", [f"pair {index}" for index in range(count)], load, [], "planted")


class PlantedMatcher:
    """Knows the truth of `planted_set`. Returns `matches` of a pair, and counts its calls; is interrupted at call `at`."""

    def __init__(self, matches: int = 300, noise: float = 0.1, at: int | None = None) -> None:
        self.matches, self.noise, self.at, self.calls = matches, noise, at, 0

    def describe(self) -> dict[str, Any]:
        return {"matcher": "planted", "matches": self.matches, "noise": self.noise}

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        index = int(image0[0, 0, 0])
        xy0, xy1 = seen_points(pose(5 + 5 * index), self.matches, seed=index)
        xy1 = xy1 + np.random.default_rng(index).normal(0, self.noise, xy1.shape)
        return Correspondences(xy0.astype(np.float32), xy1.astype(np.float32), np.ones(len(xy0), np.float32))


def save_image(path: Path, seed: int = 0) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise_image(seed)).save(path)
    return path
