"""MASt3R's matching as the paper describes the original: a double loop over blocks, in torch, on any device.

Speedy MASt3R, section 3.4.3 and algorithm 1, for the search, which finds the best of every row and of every column of each block;
MASt3R, section 3.3, for the walk around it. Indices are on the host between two searches, as they are in the original.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smc.exported.matching import MAX_WALK

BLOCK = 1 << 13

Indices = NDArray[np.int64]


def block_search(queries: Tensor, points: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Nearest neighbours both ways: of each query (M, D) among the points (N, D), and of each point among the queries; (M,) and (N,)."""
    best = [torch.full((len(side),), -torch.inf, device=side.device, dtype=side.dtype) for side in (queries, points)]
    nearest = [torch.full((len(side),), -1, device=side.device, dtype=torch.int64) for side in (queries, points)]
    for i in range(0, len(queries), block):
        for j in range(0, len(points), block):
            scores = queries[i : i + block] @ points[j : j + block].T
            for side, own, other in ((0, slice(i, i + block), j), (1, slice(j, j + block), i)):
                score, winner = scores.max(dim=1 - side)
                better = score > best[side][own]
                best[side][own] = torch.where(better, score, best[side][own])
                nearest[side][own] = torch.where(better, winner + other, nearest[side][own])
    return nearest[0], nearest[1]


def reciprocal_matches(desc1: Tensor, desc2: Tensor, subsample: int = 8, block: int = BLOCK) -> tuple[Indices, Indices]:
    """Matches of two descriptor maps (H, W, D), as `smc.fast_reciprocal_nn` gives them: int64 (K, 2) as x, y in either image."""
    (height, width1, _), width2 = desc1.shape, desc2.shape[1]
    points1, points2 = desc1.flatten(0, 1).float(), desc2.flatten(0, 1).float()

    def search(queries: Tensor, index: Indices, points: Tensor) -> Indices:
        return block_search(queries[torch.from_numpy(index).to(queries.device)], points, block)[0].cpu().numpy()

    y, x = np.mgrid[subsample // 2 : height : subsample, subsample // 2 : width1 : subsample].reshape(2, -1)
    index1 = np.unique(x + width1 * y)
    index2 = np.full_like(index1, -1)
    walking = np.arange(len(index1))
    for _ in range(MAX_WALK):
        if len(walking) == 0:
            break
        index2[walking] = search(points1, index1[walking], points2)
        back = search(points2, index2[walking], points1)
        moved = back != index1[walking]
        index1[walking] = back
        walking = walking[moved]
    closed = np.ones(len(index1), bool)
    closed[walking] = False
    pairs = np.unique(np.stack([index1[closed], index2[closed]], axis=1), axis=0)
    xy1, xy2 = (np.stack([index % width, index // width], axis=1) for index, width in zip(pairs.T, (width1, width2), strict=True))
    return xy1, xy2


def pixel_confidence(xy1: Indices, xy2: Indices, conf1: Tensor, conf2: Tensor) -> NDArray[np.float32]:
    """(K,) confidence of matches: the smaller of the two pixels' in the (H, W) maps."""
    values = [conf[torch.from_numpy(xy[:, 1]), torch.from_numpy(xy[:, 0])] for xy, conf in ((xy1, conf1), (xy2, conf2))]
    return torch.minimum(*values).float().cpu().numpy()
