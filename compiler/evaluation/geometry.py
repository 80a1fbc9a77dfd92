"""Cameras and homographies: changing the size of images, and errors against ground truth."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smc.compiler.evaluation.pairs import Floats


def resize_matrix(factor: float) -> Floats:
    """(3, 3) from coordinates of an image to those of the image resized by `factor`; pixel centres are whole numbers in both."""
    return np.array([[factor, 0, (factor - 1) / 2], [0, factor, (factor - 1) / 2], [0, 0, 1]])


def transform(homography: NDArray[np.floating], xy: NDArray[np.floating]) -> Floats:
    """Points (..., 2) through a homography. Those that it sends to infinity become infinite or NaN."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        mapped = np.concatenate([xy, np.ones_like(xy[..., :1])], axis=-1) @ homography.T
        return mapped[..., :2] / mapped[..., 2:]


def turn(image: NDArray[np.uint8], intrinsics: Floats, quarters: int) -> tuple[NDArray[np.uint8], Floats, Floats]:
    """An image turned counter-clockwise, as `numpy.rot90` does, with the camera turned along.

    Returns:
        The image; its intrinsics; and (4, 4) from the camera's old frame to its new one.
    """
    camera = np.eye(4)
    for _ in range(quarters % 4):
        width = image.shape[1]
        image = np.rot90(image)
        fx, fy, cx, cy = intrinsics[0, 0], intrinsics[1, 1], intrinsics[0, 2], intrinsics[1, 2]
        intrinsics = np.array([[fy, 0, cy], [0, fx, width - 1 - cx], [0, 0, 1]])
        camera = np.array([[0, 1, 0, 0], [-1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) @ camera
    return np.ascontiguousarray(image), intrinsics, camera


def rotation_error(found: Floats, truth: Floats) -> float:
    """Degrees between two rotations (3, 3)."""
    # Not the arc cosine of the trace, which has no digits left where the error is small.
    half_sine = np.linalg.norm(found - truth) / np.sqrt(8)
    return float(np.degrees(2 * np.arcsin(min(half_sine, 1.0))))


def direction_error(found: Floats, truth: Floats) -> float:
    """Degrees between two translations (3,), of which neither length nor sign counts; 0 where the truth does not move.

    The sign does not count because the benchmarks' own code leaves it out (SuperGlue, LoFTR, glue-factory), which an essential
    matrix does not determine.
    """
    if np.linalg.norm(truth) < 1e-9:
        return 0.0
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(found, truth)), abs(found @ truth))))


def epipolar_error(xy0: Floats, xy1: Floats, intrinsics0: Floats, intrinsics1: Floats, pose: Floats) -> Floats:
    """The squared distances (K,) of both points to their epipolar lines, added, in image planes at focal length 1 (SuperGlue).

    Args:
        xy0, xy1: points (K, 2).
        intrinsics0, intrinsics1: (3, 3).
        pose: (4, 4), from the first camera's frame to the second's.
    """
    rays0, rays1 = (
        np.column_stack([transform(np.linalg.inv(intrinsics), xy), np.ones(len(xy))])
        for xy, intrinsics in ((xy0, intrinsics0), (xy1, intrinsics1))
    )
    x, y, z = pose[:3, 3]
    essential = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ pose[:3, :3]
    lines1, lines0 = rays0 @ essential.T, rays1 @ essential
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = 1 / (lines0[:, :2] ** 2).sum(1) + 1 / (lines1[:, :2] ** 2).sum(1)
        return np.nan_to_num((rays1 * lines1).sum(1) ** 2 * scale, nan=np.inf, posinf=np.inf)


def corner_error(found: Floats, truth: Floats, width: float, height: float) -> float:
    """The mean distance, in pixels of the second image, of where two homographies send the first image's corners."""
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    with np.errstate(invalid="ignore"):
        error = np.linalg.norm(transform(found, corners) - transform(truth, corners), axis=1).mean()
    return float(error) if np.isfinite(error) else np.inf


def transfer_error(xy0: Floats, xy1: Floats, homography: Floats) -> Floats:
    """Distances (K,) of matches to ground truth: the mean of the two images', in pixels (glue-factory)."""
    there = np.linalg.norm(transform(homography, xy0) - xy1, axis=1)
    back = np.linalg.norm(transform(np.linalg.inv(homography), xy1) - xy0, axis=1)
    return np.nan_to_num((there + back) / 2, nan=np.inf, posinf=np.inf)
