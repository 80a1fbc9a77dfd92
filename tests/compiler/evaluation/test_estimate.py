"""poselib on matches of known geometry."""

from __future__ import annotations

import numpy as np
import pytest

from smc.compiler.evaluation import estimate
from smc.compiler.evaluation.geometry import corner_error, direction_error, rotation_error, transform
from tests.compiler.evaluation.made import CAMERA, HEIGHT, WIDTH, pose, seen_points

PLANE = np.array([[0.9, -0.1, 30], [0.05, 1.1, -10], [1e-4, 2e-5, 1]])


def test_pose_of_matches_of_which_two_fifths_are_wrong() -> None:
    truth = pose()
    xy0, xy1 = seen_points(truth)
    wrong = np.random.default_rng(1).permutation(len(xy1))[:120]
    xy1[wrong] = np.random.default_rng(2).uniform(0, HEIGHT, (120, 2))
    found = estimate.relative_pose(xy0, xy1, CAMERA, CAMERA, 1.0, 0)
    assert found is not None
    assert rotation_error(found[0], truth[:3, :3]) < 0.1
    assert direction_error(found[1], truth[:3, 3]) < 0.3
    assert 180 <= found[2] <= 190


def test_homography_of_matches_of_which_two_fifths_are_wrong() -> None:
    xy0 = np.random.default_rng(0).uniform(0, HEIGHT, (200, 2))
    xy1 = transform(PLANE, xy0)
    xy1[:80] += np.random.default_rng(1).uniform(20, 90, (80, 2))
    found = estimate.homography(xy0, xy1, 1.0, 0)
    assert found is not None
    assert corner_error(found[0], PLANE, WIDTH, HEIGHT) < 0.01
    assert found[1] == 120


@pytest.mark.parametrize("count", [0, 1, 3, 4])
def test_too_few_matches_give_no_pose(count: int) -> None:
    xy0, xy1 = seen_points(pose(), count)
    assert estimate.relative_pose(xy0, xy1, CAMERA, CAMERA, 1.0, 0) is None


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_matches_give_no_homography(count: int) -> None:
    xy = np.random.default_rng(0).uniform(0, 100, (count, 2))
    assert estimate.homography(xy, xy, 1.0, 0) is None


def test_the_seed_alone_decides() -> None:
    xy0, xy1 = seen_points(pose())
    xy1 += np.random.default_rng(0).normal(0, 2, xy1.shape)
    first, again = (estimate.relative_pose(xy0, xy1, CAMERA, CAMERA, 1.0, 3) for _ in range(2))
    assert first is not None
    assert again is not None
    np.testing.assert_array_equal(first[0], again[0])
