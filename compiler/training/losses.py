"""The losses of the original papers.

- Points: "DUSt3R" (Wang et al., 2024), section 3.2: distances between predicted and true points of both views in view 1's frame,
  each cloud first divided by its mean distance from the origin, weighted by the predicted confidence.
- Descriptors: "MASt3R" (Leroy et al., 2024), section 3.3: symmetric InfoNCE over true correspondences, at a temperature of 0.07,
  weighted likewise by the descriptors' confidence.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from smc.compiler.scenes.geometry import in_image
from smc.compiler.scenes.pairs import PairBatch
from smc.compiler.scenes.textures import uniform

ALPHA = 0.2
"""Reward of the points' confidence."""

TEMPERATURE = 0.07

MATCHING_ALPHA = 10.0
"""Reward of the descriptors' confidence. It sets where the confidence settles, at alpha / loss: with the 7 of an untrained network
near 1, where it starts, and with a trained one's 0.5 at 20."""

MATCHING_WEIGHT = 0.3
"""Of the matching loss in the sum. Where each confidence is at its best, the two terms are ALPHA * log(error) and
MATCHING_WEIGHT * MATCHING_ALPHA * log(InfoNCE): descriptors, which are what matches are made of, count fifteen times as much. The
original's 0.075 is for a network that has learnt to see before."""

WINDOW = 5
"""Half of the correspondences lie in a window of 1/5 of the image's sides. Points spread over all of an image teach a descriptor to
tell places far apart; those 2 to 3 pixels apart teach it to be exact."""

MASKED = -1e4
"""A similarity that no softmax notices."""


def points_loss(
    points: tuple[Tensor, Tensor], confidence: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of points (B, H, W, 3), confidences and masks (B, H, W) of both views, all in view 1's frame.

    Returns:
        The loss, the sum of both views' means over valid pixels, and the mean normalised distance without weights; scalars.
    """
    found = [p / s for p, s in zip(points, _scales(points, valid), strict=True)]
    wanted = [p / s for p, s in zip(truth, _scales(truth, valid), strict=True)]
    loss, distance = torch.zeros((), device=points[0].device), torch.zeros((), device=points[0].device)
    for p, t, c, v in zip(found, wanted, confidence, valid, strict=True):
        error = _length(p - t)
        count = v.sum().clamp(min=1)
        loss = loss + ((c * error - ALPHA * c.log()) * v).sum() / count
        distance = distance + (error.detach() * v).sum() / count / 2
    return loss, distance


def _scales(points: tuple[Tensor, Tensor], valid: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The mean distance (B, 1, 1, 1) from the origin over both views' valid points, once for each view."""
    total = sum((_length(p) * v).sum((1, 2)) for p, v in zip(points, valid, strict=True))
    count = sum(v.sum((1, 2)) for v in valid)
    scale = (total / torch.as_tensor(count).clamp(min=1)).clamp(min=1e-6)[:, None, None, None]
    return scale, scale


def _length(x: Tensor) -> Tensor:
    """Euclidean, with a gradient at 0."""
    return (x.square().sum(-1) + 1e-12).sqrt()


def matching_loss(
    desc1: Tensor, desc2: Tensor, confidence1: Tensor, confidence2: Tensor, pixels: tuple[Tensor, Tensor], real: Tensor
) -> tuple[Tensor, Tensor]:
    """Of descriptors (B, n, D) and confidences (B, n) of n correspondences between `pixels` (B, n); those not `real` (B, n) are padding.

    A pixel that was drawn twice is no negative of itself.

    Returns:
        The weighted loss, and the mean InfoNCE without weights; scalars.
    """
    similarity = desc1 @ desc2.transpose(1, 2) / TEMPERATURE  # (B, n, n)
    own = similarity.diagonal(dim1=1, dim2=2)
    negative = real[:, :, None] & real[:, None, :]
    for pixel in pixels:
        negative &= pixel[:, :, None] != pixel[:, None, :]
    negative |= torch.eye(real.shape[1], dtype=torch.bool, device=real.device)
    similarity = similarity.masked_fill(~negative, MASKED)
    nce = (torch.logsumexp(similarity, dim=2) + torch.logsumexp(similarity, dim=1)) / 2 - own
    confidence = (confidence1 + confidence2) / 2
    count = real.sum().clamp(min=1)
    loss = ((confidence * nce - MATCHING_ALPHA * confidence.log()) * real).sum() / count
    return loss, (nce.detach() * real).sum() / count


def at_pixels(maps: Tensor, index: Tensor) -> Tensor:
    """Values (B, n, D) of maps (B, H, W, D) at pixels (B, n), counted row by row."""
    flat = maps.flatten(1, 2)
    return flat.gather(1, index[..., None].expand(-1, -1, flat.shape[2]))


def draw_correspondences(generator: Generator, batch: PairBatch, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of image 1 and of image 2, (B, count) counted row by row, that show the same point, and which are real.

    The second pixel is the nearest to the exact place, half a pixel away at most on either axis. A pair may have too few; padding
    makes up for them.
    """
    height, width = batch.shape
    pairs = len(batch.overlap)
    size = torch.tensor([width, height], device=generator.device, dtype=torch.float32)

    def visible_first(xy: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        xy2, visible = batch.warp(xy)
        xy2 = xy2.round()
        visible &= in_image(xy2, height, width)
        order = visible.int().argsort(dim=1, descending=True, stable=True)[:, :keep]
        places = order[..., None].expand(-1, -1, 2)
        return xy.gather(1, places), xy2.gather(1, places), visible.gather(1, order)

    spread = (uniform(generator, pairs, 3 * (count - count // 2), 2) * size).floor()
    xy1, xy2, real = visible_first(spread, count - count // 2)
    # The window goes around the first of these, so that it is where both cameras look.
    side = size / WINDOW
    corner = torch.minimum((xy1[:, :1] - side / 2).clamp(min=0), size - side)
    dense = torch.minimum((corner + uniform(generator, pairs, 2 * (count // 2), 2) * side).floor(), size - 1)
    parts = [torch.cat(both, dim=1) for both in zip((xy1, xy2, real), visible_first(dense, count // 2), strict=True)]
    first, second = ((xy[..., 1] * width + xy[..., 0]).long().clamp(0, height * width - 1) for xy in parts[:2])
    return first, second, parts[2]
