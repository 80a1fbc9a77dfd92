"""Whatever finds matches: a bundle, SIFT, or the caller's own."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smc.compiler.packages import require_packages
from smc.exported.errors import UsageError
from smc.exported.matcher import Matcher

RATIO = 0.8
"""Lowe's: the best descriptor is this much nearer than the second best."""

KEYPOINTS = 8192
"""Keypoints of SIFT an image, at most."""

ROWS = 1024
"""Descriptors compared with all others at once: 32 MB of distances."""


@dataclass(frozen=True, eq=False)
class Correspondences:
    """Matches of a pair.

    Attributes:
        keypoints0, keypoints1: (K, 2) as x, y in pixels of either image, the centre of the first pixel at (0, 0).
        confidence: (K,), larger is better.
        seconds: wall time by stage, as far as the matcher knows it.
    """

    keypoints0: NDArray[np.floating]
    keypoints1: NDArray[np.floating]
    confidence: NDArray[np.floating]
    seconds: dict[str, float] = field(default_factory=dict)


class PairMatcher(Protocol):
    """What can be evaluated."""

    def describe(self) -> dict[str, Any]:
        """What it is, all that its matches depend on, as JSON has it: results of one description can be continued."""
        ...

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        """Match two images, uint8 (H, W, 3) RGB."""
        ...


class BundleMatcher:
    """A loaded bundle. `options`: keyword arguments of `Matcher.match_features`; UsageError for one that is not finite."""

    def __init__(self, matcher: Matcher, **options: Any) -> None:
        for name, value in options.items():
            if not math.isfinite(value):  # JSON, which names the options in a file of results, has no such number
                raise UsageError(f"{name} is {value}: a finite number was expected")
        self.matcher, self.options = matcher, options
        self._warned = False

    def describe(self) -> dict[str, Any]:
        manifest = self.matcher.manifest
        return {
            "matcher": "bundle",
            "build_key": manifest.build_key,
            "model": manifest.model.source,
            "backend": manifest.backend.name,
            "precision": manifest.precision,
            "target": manifest.target.gpu,
            "random_weights": manifest.random_weights,
            "options": self.options,
        }

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        start = time.perf_counter()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            features0, features1 = self.matcher.encode(image0), self.matcher.encode(image1)
        if caught and not self._warned:  # of an image that is cropped; once is enough for a data set
            self._warned = True
            warnings.warn(f"{caught[0].message} (the first of such images)", stacklevel=2)
        encoded = time.perf_counter()
        found = self.matcher.match_features(features0, features1, **self.options)
        seconds = {"encode": encoded - start, "decode and match": time.perf_counter() - encoded}
        return Correspondences(found.keypoints0, found.keypoints1, found.confidence, seconds)


class SiftMatcher:
    """OpenCV's SIFT, mutual nearest neighbours that pass Lowe's ratio test: a baseline that everyone knows.

    Raises NoTarget where OpenCV is not installed.
    """

    def __init__(self) -> None:
        require_packages("SIFT", ("cv2",))
        import cv2

        # Without the precise upscale, keypoints are 0.25 pixels off.
        self._sift = cv2.SIFT_create(nfeatures=KEYPOINTS, enable_precise_upscale=True)
        self._opencv = cv2.__version__

    def describe(self) -> dict[str, Any]:
        return {"matcher": "sift", "opencv": self._opencv, "keypoints": KEYPOINTS, "ratio": RATIO}

    def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
        import cv2

        start = time.perf_counter()
        xy, descriptors = [], []
        for image in (image0, image1):
            points, found = self._sift.detectAndCompute(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), None)
            xy.append(np.array([point.pt for point in points], np.float32).reshape(-1, 2))
            descriptors.append(np.zeros((0, 128), np.float32) if found is None else found)
        detected = time.perf_counter()
        index0, index1, confidence = mutual_nearest(descriptors[0], descriptors[1])
        seconds = {"detect": detected - start, "match": time.perf_counter() - detected}
        return Correspondences(xy[0][index0], xy[1][index1], confidence, seconds)


def mutual_nearest(
    descriptors0: NDArray[np.float32], descriptors1: NDArray[np.float32], ratio: float = RATIO
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Descriptors that are each other's nearest, and nearer than `ratio` times the second nearest in the second image.

    Args:
        descriptors0, descriptors1: float32 (N, D) and (M, D).
        ratio: of distances.

    Returns:
        Indices (K,) into either, and one minus the ratio found.
    """
    count0, count1 = len(descriptors0), len(descriptors1)
    if count0 == 0 or count1 < 2:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32)
    squares1 = (descriptors1**2).sum(1)
    nearest1 = np.zeros(count0, np.int64)
    ratios = np.zeros(count0, np.float32)
    nearest0, best0 = np.zeros(count1, np.int64), np.full(count1, np.inf, np.float32)
    for begin in range(0, count0, ROWS):
        rows = descriptors0[begin : begin + ROWS]
        distances = np.maximum((rows**2).sum(1)[:, None] + squares1 - 2 * rows @ descriptors1.T, 0)
        two = np.partition(distances, 1, axis=1)[:, :2]
        nearest1[begin : begin + ROWS] = distances.argmin(1)
        ratios[begin : begin + ROWS] = np.sqrt(two[:, 0] / np.maximum(two[:, 1], 1e-12))
        column = distances.argmin(0)
        best = distances[column, np.arange(count1)]
        nearest0 = np.where(best < best0, begin + column, nearest0)
        best0 = np.minimum(best, best0)
    index0 = np.flatnonzero((nearest0[nearest1] == np.arange(count0)) & (ratios < ratio))
    return index0, nearest1[index0], 1 - ratios[index0]
