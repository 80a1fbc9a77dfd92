"""Textures, from photographs and from noise, with the halved copies that distant surfaces are coloured from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

CHUNK = 32
"""Textures made at a time, which bounds the memory taken."""

CELLS = 48
"""Points of a cell texture."""

SMALLEST_LEVEL = 4


@dataclass(frozen=True)
class Textures:
    """T square textures in one table.

    Attributes:
        texels: (T * M, 4) RGB in [0, 1] and one unused value that makes a texel a single load; M texels a texture, level by level,
            row by row.
        count: T.
        side: texels along a side, at full size.
        levels: how often the side is halved, plus one.
    """

    texels: Tensor
    count: int
    side: int
    levels: int

    def offset(self, level: Tensor) -> Tensor:
        """Texels of a texture before this level: side^2 (1 + 1/4 + ...), a geometric sum."""
        finer = 4 * self.side * self.side
        return (finer - (finer >> (2 * level))) // 3

    @property
    def texels_each(self) -> int:
        return sum((self.side >> level) ** 2 for level in range(self.levels))

    def sample(self, texture: Tensor, u: Tensor, v: Tensor, level: Tensor) -> Tensor:
        """Colours (..., 3) at (u, v), bilinear in the nearest level; level is fractional; beyond [0, 1] a texture is mirrored."""
        whole = level.round().clamp(0, self.levels - 1).to(torch.int64)
        size = self.side >> whole
        start = texture * self.texels_each + self.offset(whole)

        def texel(coordinate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            place = (1 - (1 - coordinate.remainder(2)).abs()) * size - 0.5
            first = place.floor()
            index = first.to(torch.int64)
            return index.clamp(min=0), torch.minimum(index + 1, size - 1), (place - first)[..., None]

        left, right, x = texel(u)
        top, bottom, y = texel(v)
        above = torch.lerp(self._at(start + top * size + left), self._at(start + top * size + right), x)
        below = torch.lerp(self._at(start + bottom * size + left), self._at(start + bottom * size + right), x)
        return torch.lerp(above, below, y)

    def _at(self, index: Tensor) -> Tensor:
        return self.texels[index][..., :3].float()


def draw_textures(generator: Generator, photographs: Tensor | None, count: int, side: int) -> Textures:
    """New textures: two thirds cut from photographs, uint8 (n, 3, s, s), where there are any; the others made of noise."""
    images = torch.cat([_draw_chunk(generator, photographs, min(CHUNK, count - i), side) for i in range(0, count, CHUNK)])
    levels, images = [images], images
    while images.shape[-1] > SMALLEST_LEVEL:
        images = F.avg_pool2d(images, 2)
        levels.append(images)
    flat = torch.cat([level.flatten(2) for level in levels], dim=2).transpose(1, 2)  # (T, M, 3)
    dtype = torch.float16 if flat.device.type == "cuda" else torch.float32
    texels = F.pad(flat, (0, 1)).reshape(-1, 4).to(dtype)
    return Textures(texels.contiguous(), count, side, len(levels))


def uniform(generator: Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low


def _draw_chunk(generator: Generator, photographs: Tensor | None, count: int, side: int) -> Tensor:
    """(count, 3, side, side) in [0, 1]."""
    kinds = torch.stack(
        [_clouds(generator, count, side), _marble(generator, count, side), _tiles(generator, count, side), _cells(generator, count, side)]
    )
    choice = torch.randint(len(kinds), (count,), generator=generator, device=generator.device)
    images = kinds[choice, torch.arange(count, device=choice.device)]
    if photographs is not None:
        cut = _cut(generator, photographs, count, side)
        images = torch.where(uniform(generator, count, 1, 1, 1) < 2 / 3, cut, images)
    # Some grain on all of them: no surface is quite without detail, and a magnified photograph is not only blur.
    grain = _clouds(generator, count, side, coarsest=4) - 0.5
    images = images + grain * uniform(generator, count, 1, 1, 1, high=0.3).square() * 2
    return _recolour(generator, images).clamp(0, 1)


def _cut(generator: Generator, photographs: Tensor, count: int, side: int) -> Tensor:
    """Pieces of photographs, turned, scaled and mirrored."""
    device = generator.device
    which = torch.randint(len(photographs), (count,), generator=generator, device=device)
    angle = uniform(generator, count, low=-math.pi, high=math.pi)
    scale = torch.exp(uniform(generator, count, low=math.log(0.4), high=math.log(1.6)))  # of the half side
    stretch = torch.exp(uniform(generator, count, low=-0.25, high=0.25))
    mirror = torch.where(uniform(generator, count) < 0.5, -1.0, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    shift = uniform(generator, count, 2, low=-1, high=1) * (1 - scale[:, None]).clamp(min=0)
    transform = torch.stack(
        [
            torch.stack([scale * stretch * cos * mirror, -scale * sin, shift[:, 0]], dim=-1),
            torch.stack([scale * stretch * sin * mirror, scale * cos, shift[:, 1]], dim=-1),
        ],
        dim=1,
    )
    grid = F.affine_grid(transform, [count, 3, side, side], align_corners=False)
    return F.grid_sample(photographs[which].float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _clouds(generator: Generator, count: int, side: int, coarsest: int = 0) -> Tensor:
    """Noise over all scales from 4 * 2^coarsest cells a side, how rough drawn for each."""
    total = torch.zeros(count, 3, side, side, device=generator.device)
    weights = torch.zeros(count, 1, 1, 1, device=generator.device)
    roughness = uniform(generator, count, 1, 1, 1, low=0.5, high=0.95)
    for octave in range(coarsest, int(math.log2(side)) - 1):
        cells = 4 << octave
        # The colours of one texture are kin: a common pattern and a little of each channel's own.
        field = uniform(generator, count, 1, cells, cells) + 0.4 * (uniform(generator, count, 3, cells, cells) - 0.5)
        weight = roughness**octave
        total += weight * F.interpolate(field, (side, side), mode="bicubic", align_corners=False)
        weights += weight
    contrast = 1 + 2 * uniform(generator, count, 1, 1, 1)
    return ((total / weights.clamp(min=1e-3) - 0.5) * contrast + 0.5).clamp(0, 1)


def _marble(generator: Generator, count: int, side: int) -> Tensor:
    """Bands of changing colour along the contours of clouds."""
    field = _clouds(generator, count, side).mean(1, keepdim=True)
    bands = uniform(generator, count, 3, 1, 1, low=4, high=40)
    return 0.5 + 0.5 * torch.sin(bands * field + uniform(generator, count, 3, 1, 1, high=2 * math.pi))


def _tiles(generator: Generator, count: int, side: int) -> Tensor:
    """A wall of tiles or bricks, each of its own shade, with joints."""
    device = generator.device
    most = 24
    place = (torch.arange(side, device=device) + 0.5) / side
    rows = uniform(generator, count, 1, 1, low=4, high=most)
    cols = uniform(generator, count, 1, 1, low=4, high=most)
    y = (place[:, None] * rows).expand(count, side, side)
    stagger = torch.where(uniform(generator, count, 1, 1) < 0.5, 0.5, 0.0)
    x = place[None, :] * cols + stagger * y.floor().remainder(2)
    shade = uniform(generator, count, (most + 2) ** 2, 1) + 0.5 * (uniform(generator, count, (most + 2) ** 2, 3) - 0.5)
    index = (y.floor() * (most + 2) + x.floor()).long().reshape(count, -1, 1).expand(-1, -1, 3)
    colour = shade.gather(1, index).transpose(1, 2).reshape(count, 3, side, side)
    joint = torch.minimum(x.frac(), y.frac()) < uniform(generator, count, 1, 1, high=0.15)
    return torch.where(joint[:, None], uniform(generator, count, 3, 1, 1), colour)


def _cells(generator: Generator, count: int, side: int) -> Tensor:
    """The regions nearest to each of some points, in that point's colour, darker to their edges: pebbles, leaves, cracks."""
    device = generator.device
    points = uniform(generator, count, CELLS, 2)
    shade = uniform(generator, count, CELLS, 3)
    place = (torch.arange(side, device=device) + 0.5) / side
    # Bent by noise, or all edges would be straight.
    bend = 0.08 * (_clouds(generator, count, side) - 0.5)
    x, y = place[None, None, :] + bend[:, 0], place[None, :, None] + bend[:, 1]
    nearest, second = torch.full_like(x, 9.0), torch.full_like(x, 9.0)
    owner = torch.zeros_like(x, dtype=torch.int64)
    for i in range(CELLS):
        distance = (x - points[:, i, 0, None, None]).square() + (y - points[:, i, 1, None, None]).square()
        closer = distance < nearest
        second = torch.where(closer, nearest, torch.minimum(second, distance))
        owner, nearest = torch.where(closer, i, owner), torch.minimum(nearest, distance)
    colour = shade.gather(1, owner.reshape(count, -1, 1).expand(-1, -1, 3)).transpose(1, 2).reshape(count, 3, side, side)
    edge = ((second.sqrt() - nearest.sqrt()) * side / 16).clamp(0, 1)[:, None]
    return colour * (0.3 + 0.7 * edge)


def _recolour(generator: Generator, images: Tensor) -> Tensor:
    """Another contrast, brightness, tint, saturation; at times channels exchanged, or the negative."""
    count = len(images)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * uniform(generator, count, 1, 1, 1, low=0.2, high=1.5)
    order = torch.argsort(uniform(generator, count, 3), dim=1)
    order = torch.where(uniform(generator, count, 1) < 0.4, order, torch.arange(3, device=order.device))
    images = images.gather(1, order[:, :, None, None].expand_as(images))
    images = torch.where(uniform(generator, count, 1, 1, 1) < 0.1, 1 - images, images)
    centre = images.mean((1, 2, 3), keepdim=True)
    images = centre + (images - centre) * uniform(generator, count, 1, 1, 1, low=0.5, high=1.3)
    return images * uniform(generator, count, 3, 1, 1, low=0.75, high=1.15) + uniform(generator, count, 1, 1, 1, low=-0.1, high=0.1)
