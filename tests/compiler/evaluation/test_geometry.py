"""Cameras and errors, where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from smc.compiler.evaluation import geometry
from tests.compiler.evaluation.made import CAMERA, HEIGHT, WIDTH, noise_image, pose, project, rotation, seen_points


def test_resizing_keeps_the_edges_of_an_image_where_they_are() -> None:
    edges = np.array([[-0.5, -0.5], [WIDTH - 0.5, HEIGHT - 0.5]])
    found = geometry.transform(geometry.resize_matrix(0.5), edges)
    np.testing.assert_allclose(found, [[-0.5, -0.5], [WIDTH / 2 - 0.5, HEIGHT / 2 - 0.5]])


@pytest.mark.parametrize("quarters", [0, 1, 2, 3])
def test_a_turned_camera_sees_a_point_where_the_turned_image_has_it(quarters: int) -> None:
    image = noise_image()
    turned, intrinsics, camera = geometry.turn(image, CAMERA, quarters)
    np.testing.assert_array_equal(turned, np.rot90(image, quarters))
    for x, y in ((17, 33), (200, 120)):
        point = np.linalg.inv(CAMERA) @ [x, y, 1] * 4
        ((column, line),) = project((camera[:3, :3] @ point)[None], intrinsics)
        np.testing.assert_array_equal(turned[round(line), round(column)], image[y, x])


@pytest.mark.parametrize("degrees", [1e-6, 0.01, 3, 90, 179.9])
def test_angle_of_a_rotation(degrees: float) -> None:
    start = rotation(40, (1, 2, 3))
    assert geometry.rotation_error(start @ rotation(degrees, (3, 1, 2)), start) == pytest.approx(degrees, rel=1e-5)


def test_angle_of_translations_knows_neither_length_nor_sign() -> None:
    truth = np.array([1.0, 0, 0])
    assert geometry.direction_error(np.array([5.0, 5, 0]), truth) == pytest.approx(45)
    assert geometry.direction_error(np.array([-5.0, 5, 0]), truth) == pytest.approx(45)
    assert geometry.direction_error(np.array([0.0, 0, 1]), np.zeros(3)) == 0  # a camera that does not move has no direction


def test_epipolar_error_is_none_for_exact_matches_and_the_squared_offset_for_others() -> None:
    sideways = pose(0, move=(1, 0, 0))  # epipolar lines are rows
    xy0, xy1 = seen_points(sideways)
    assert geometry.epipolar_error(xy0, xy1, CAMERA, CAMERA, sideways).max() < 1e-20
    found = geometry.epipolar_error(xy0, xy1 + np.array([7, 3.1]), CAMERA, CAMERA, sideways)
    np.testing.assert_allclose(found, 2 * (3.1 / 310) ** 2)


def test_corner_error_is_the_mean_of_four_distances() -> None:
    moved = np.array([[1, 0, 3], [0, 1, 4], [0, 0, 1.0]])
    assert geometry.corner_error(moved, np.eye(3), 100, 50) == pytest.approx(5)
    wider = np.diag([1.1, 1, 1])
    assert geometry.corner_error(wider, np.eye(3), 101, 50) == pytest.approx(5)  # two corners by 10 px, two by none
    assert geometry.corner_error(np.diag([1, 1, 0.0]), np.eye(3), 100, 50) == np.inf


def test_transfer_error_is_the_mean_of_both_images() -> None:
    double = np.diag([2.0, 2, 1])
    found = geometry.transfer_error(np.array([[10.0, 10]]), np.array([[24.0, 20]]), double)
    np.testing.assert_allclose(found, (4 + 2) / 2)
