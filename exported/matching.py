"""FastNN-Lite: reciprocal nearest-neighbour matching of two dense descriptor maps, in NumPy.

The scheme is MASt3R's fast reciprocal matching ("Grounding Image Matching in 3D with MASt3R", section 3.3): from a sparse
grid, walk to the nearest neighbour in the other image and back until the walk closes. The search under it is the single
loop of Speedy MASt3R (section 3.4.3): one block of queries at a time against the whole map, as one matrix product.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smc.exported.errors import BadInput

Descriptors = NDArray[np.float32]
Indices = NDArray[np.int64]

SCORE_BYTES = 25 << 20
"""Memory for one block's scores: the block is as many queries as fit, which keeps the scores in a last-level cache."""

MAX_WALK = 10
"""Round trips after which a walk that has not closed is given up, as in the original."""


ROW_PADDING = 48
"""Floats added to the length of matrix rows: rows a large power of two apart would all compete for the same cache sets."""


def nearest_neighbours(queries: Descriptors, points: Descriptors) -> Indices:
    """For each query (M, D) the index of the point (N, D) with the largest dot product; the first of equals. float32 in, (M,) out."""
    count, dim = points.shape
    transposed = np.empty((dim, count + ROW_PADDING), np.float32)[:, :count]
    transposed[:] = points.T
    block = max(1, min(len(queries), SCORE_BYTES // (4 * count)))
    scores = np.empty((block, count + ROW_PADDING), np.float32)[:, :count]
    nearest = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), block):
        chunk = queries[start : start + block]
        np.matmul(chunk, transposed, out=scores[: len(chunk)])
        # Row by row: NumPy would copy the padded block to take all its maxima at once.
        nearest[start : start + len(chunk)] = [row.argmax() for row in scores[: len(chunk)]]
    return nearest


def fast_reciprocal_nn(
    desc1: Descriptors,
    desc2: Descriptors,
    subsample: int = 8,
    pixel_tol: float = 0,
    start_xy: tuple[NDArray[np.integer], NDArray[np.integer]] | NDArray[np.integer] | None = None,
) -> tuple[Indices, Indices]:
    """Reciprocal matches between two descriptor maps.

    Args:
        desc1: (H1, W1, D) float32 descriptors, unit norm, of image 1.
        desc2: (H2, W2, D) float32 descriptors of image 2.
        subsample: step in pixels of the grid of starting points in image 1, when `start_xy` is not given.
        pixel_tol: 0 follows each walk until it closes exactly (at most 10 round trips). Above 0, each starting point makes
            one round trip and is kept, in place, if it comes back to less than this many pixels.
        start_xy: integer starting points in image 1, (K, 2) as x, y, or a pair of arrays x and y. Each makes one round trip.

    Returns:
        xy1, xy2: int64 (K, 2) each, as x, y; unique, sorted by row-major position in image 1, then in image 2.

    Raises:
        BadInput: maps of other shapes, or starting points outside image 1.
    """
    for desc in (desc1, desc2):
        if desc.ndim != 3 or desc.size == 0:
            raise BadInput(f"descriptor maps must be (H, W, D), found {desc.shape}")
    if desc1.shape[2] != desc2.shape[2]:
        raise BadInput(f"descriptor sizes differ: {desc1.shape[2]} and {desc2.shape[2]}")
    if not pixel_tol >= 0:
        raise BadInput(f"pixel_tol must be 0 or more, found {pixel_tol}")

    width1, width2 = desc1.shape[1], desc2.shape[1]
    points1 = np.ascontiguousarray(desc1.reshape(-1, desc1.shape[2]), np.float32)
    points2 = np.ascontiguousarray(desc2.reshape(-1, desc2.shape[2]), np.float32)

    if not (np.isfinite(points1).all() and np.isfinite(points2).all()):
        # NaN would be every query's maximum: matching would go on, and find nothing else.
        raise BadInput("descriptors hold NaN or infinite values")

    starts = starting_points(desc1.shape[0], width1, subsample, start_xy)
    index1, index2 = starts.copy(), np.full_like(starts, -1)
    walking = np.arange(len(starts))  # positions in the lists of the walks that have not closed
    for _ in range(1 if pixel_tol > 0 or start_xy is not None else MAX_WALK):
        if len(walking) == 0:
            break
        forth = nearest_neighbours(points1[index1[walking]], points2)
        moved = forth != index2[walking]
        walking, forth = walking[moved], forth[moved]
        index2[walking] = forth
        back = nearest_neighbours(points2[forth], points1)
        moved = back != index1[walking]
        index1[walking] = back
        walking = walking[moved]

    if pixel_tol > 0:
        kept = np.hypot(starts % width1 - index1 % width1, starts // width1 - index1 // width1) < pixel_tol
        index1 = starts
    else:
        kept = np.ones(len(starts), bool)
        kept[walking] = False
    return _unique_pairs(index1[kept], index2[kept], width1, width2)


def reciprocal_nn_both_ways(
    desc1: Descriptors, desc2: Descriptors, conf1: NDArray[np.float32], conf2: NDArray[np.float32], subsample: int = 8
) -> tuple[Indices, Indices, NDArray[np.float32]]:
    """Matches found from a grid in image 1 and those found from a grid in image 2, merged.

    Args:
        desc1, desc2: as for `fast_reciprocal_nn`.
        conf1, conf2: (H1, W1) and (H2, W2) float32 descriptor confidences.
        subsample: grid step, pixels.

    Returns:
        xy1, xy2: int64 (K, 2), unique and sorted as by `fast_reciprocal_nn`; and the float32 (K,) confidence of each match,
        the smaller of its two pixels'.
    """
    width1, width2 = desc1.shape[1], desc2.shape[1]
    forth1, forth2 = fast_reciprocal_nn(desc1, desc2, subsample)
    back2, back1 = fast_reciprocal_nn(desc2, desc1, subsample)
    xy1, xy2 = np.concatenate([forth1, back1]), np.concatenate([forth2, back2])
    xy1, xy2 = _unique_pairs(xy1[:, 0] + width1 * xy1[:, 1], xy2[:, 0] + width2 * xy2[:, 1], width1, width2)
    return xy1, xy2, match_confidence(xy1, xy2, conf1, conf2)


def match_confidence(xy1: Indices, xy2: Indices, conf1: NDArray[np.float32], conf2: NDArray[np.float32]) -> NDArray[np.float32]:
    """(K,) confidence of matches: the smaller of the two pixels' in the (H, W) maps."""
    return np.minimum(conf1[xy1[:, 1], xy1[:, 0]], conf2[xy2[:, 1], xy2[:, 0]])


def starting_points(height: int, width: int, subsample: int, start_xy: object) -> Indices:
    """Unique, sorted row-major indices of the starting points."""
    if start_xy is None:
        if not isinstance(subsample, int | np.integer) or subsample < 1:
            raise BadInput(f"subsample must be a whole number, 1 or more, found {subsample!r}")
        y, x = np.mgrid[subsample // 2 : height : subsample, subsample // 2 : width : subsample].reshape(2, -1)
    else:
        points = _paired(start_xy) if isinstance(start_xy, tuple) else np.asarray(start_xy)
        if points.ndim != 2 or points.shape[1] != 2 or not np.issubdtype(points.dtype, np.integer):
            raise BadInput(f"starting points must be integers (K, 2), found {points.dtype} {points.shape}")
        x, y = points.T.astype(np.int64)
        if len(points) and (x.min() < 0 or y.min() < 0 or x.max() >= width or y.max() >= height):
            raise BadInput(f"starting points lie outside the {width}x{height} image")
    return np.unique(x + width * y)


def _paired(columns: tuple[object, ...]) -> NDArray[np.generic]:
    """Arrays x and y as (K, 2)."""
    flat = [np.ravel(np.asarray(column)) for column in columns]
    if len(flat) != 2 or len(flat[0]) != len(flat[1]):
        raise BadInput(f"starting points must be as many x as y, found arrays of {', '.join(str(len(column)) for column in flat)}")
    return np.stack(flat, axis=1)


def _unique_pairs(index1: Indices, index2: Indices, width1: int, width2: int) -> tuple[Indices, Indices]:
    pairs = np.unique(np.stack([index1, index2], axis=1), axis=0).astype(np.int64).reshape(-1, 2)
    xy1, xy2 = (np.stack([index % width, index // width], axis=1) for index, width in zip(pairs.T, (width1, width2), strict=True))
    return xy1, xy2
