"""Robust estimation from matches, by poselib."""

from __future__ import annotations

from importlib import metadata

import numpy as np

from smc.compiler.evaluation.pairs import Floats
from smc.compiler.packages import require_packages

ITERATIONS = 100_000
"""Samples that poselib draws at most unless told otherwise; it draws fewer where many matches agree."""

LARGEST_SEED = 2**64 - 1
"""That poselib takes."""

FEWEST_POSE, FEWEST_HOMOGRAPHY = 5, 4
"""Matches that an estimate needs. With fewer, poselib returns the identity pose, or a homography of uninitialised memory."""


def version() -> str:
    """poselib's. Raises NoTarget where it is not installed."""
    require_packages("robust estimation", ("poselib",))
    return metadata.version("poselib")


def relative_pose(
    xy0: Floats, xy1: Floats, intrinsics0: Floats, intrinsics1: Floats, threshold: float, seed: int, iterations: int = ITERATIONS
) -> tuple[Floats, Floats, int] | None:
    """The pose of the second camera in which most matches agree.

    Args:
        xy0, xy1: matches (K, 2).
        intrinsics0, intrinsics1: (3, 3); skew is left out.
        threshold: largest epipolar error of an inlier, pixels.
        seed: of the samples drawn.
        iterations: how many are drawn at most.

    Returns:
        Rotation (3, 3), translation (3,) of no meaningful length, number of inliers; None where there are too few.
    """
    import poselib

    if len(xy0) < FEWEST_POSE:
        return None
    cameras = [
        # The size is not used for this model.
        {"model": "PINHOLE", "width": 1, "height": 1, "params": [k[0, 0], k[1, 1], k[0, 2], k[1, 2]]}
        for k in (intrinsics0, intrinsics1)
    ]
    options = {"max_epipolar_error": threshold, "seed": seed, "max_iterations": iterations}
    pose, info = poselib.estimate_relative_pose(xy0, xy1, *cameras, options, {})
    rotation, translation = np.asarray(pose.R), np.asarray(pose.t)
    if info["num_inliers"] < FEWEST_POSE or not (np.isfinite(rotation).all() and np.isfinite(translation).all()):
        return None
    return rotation, translation, int(info["num_inliers"])


def homography(xy0: Floats, xy1: Floats, threshold: float, seed: int, iterations: int = ITERATIONS) -> tuple[Floats, int] | None:
    """The homography (3, 3) in which most matches agree, and the number of inliers; None where there are too few.

    Args:
        xy0, xy1: matches (K, 2).
        threshold: largest distance of an inlier, pixels of the second image.
        seed: of the samples drawn.
        iterations: how many are drawn at most.
    """
    import poselib

    if len(xy0) < FEWEST_HOMOGRAPHY:
        return None
    options = {"max_reproj_error": threshold, "seed": seed, "max_iterations": iterations}
    found, info = poselib.estimate_homography(xy0, xy1, options, {})
    if info["num_inliers"] < FEWEST_HOMOGRAPHY or not np.isfinite(found).all():
        return None
    return np.asarray(found), int(info["num_inliers"])
