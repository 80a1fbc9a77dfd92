"""Images of scenes: every pixel the mean of 2x2 rays, each coloured from the texture level that fits its footprint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from smc.compiler.scenes.geometry import Cameras, Hits, Scenes, away_from_zero, cast, pixel_grid, relief_slope
from smc.compiler.scenes.textures import Textures, uniform

RAYS = 2
"""Rays of a pixel along each side."""


def render(scenes: Scenes, textures: Textures, cameras: Cameras, height: int, width: int, compiled: bool = False) -> Tensor:
    """Light that reaches each pixel, (B, 3, H, W) in [0, 1]: no camera's faults yet.

    `compiled`: shade in one program of torch.compile's, which pays when many images of one size are made.
    """
    count = len(cameras.focal)
    xy = pixel_grid(height, width, RAYS * height, RAYS * width, cameras.focal.device).expand(count, -1, -1)
    hits = cast(scenes, cameras, xy)
    colours = (compiled_shade() if compiled else shade)(scenes, textures, cameras, xy, hits)
    return F.avg_pool2d(colours.transpose(1, 2).reshape(count, 3, RAYS * height, RAYS * width), RAYS)


@functools.cache
def compiled_shade() -> Callable[..., Tensor]:
    return torch.compile(shade, dynamic=False)


def shade(scenes: Scenes, textures: Textures, cameras: Cameras, xy: Tensor, hits: Hits) -> Tensor:
    """Colours (B, N, 3) of what rays met; black where they met nothing."""
    count, facets = scenes.corner.shape[:2]
    side1 = torch.cat([scenes.side1, scenes.along1[:, None]], dim=1)
    side2 = torch.cat([scenes.side2, scenes.along2[:, None]], dim=1)
    normals = F.normalize(torch.linalg.cross(side1, side2), dim=-1)
    texels = textures.side * scenes.window[..., 2:] / torch.stack([side1.norm(dim=-1), side2.norm(dim=-1)], dim=-1)  # per length
    density = texels.prod(-1).sqrt()

    scene = torch.arange(count, device=xy.device)[:, None]
    normal = normals[scene, hits.surface]  # (B, N, 3)
    by_a, by_b = relief_slope(scenes, hits.a, hits.b)
    ground1 = scenes.along1 / scenes.along1.square().sum(-1, keepdim=True)
    ground2 = scenes.along2 / scenes.along2.square().sum(-1, keepdim=True)
    bent = F.normalize(normals[:, facets, None] - by_a[..., None] * ground1[:, None] - by_b[..., None] * ground2[:, None], dim=-1)
    normal = torch.where((hits.surface == facets)[..., None], bent, normal)

    rays = cameras.directions(xy) @ cameras.rotation
    facing = (normal * rays).sum(-1) / rays.norm(dim=-1)
    normal = torch.where((facing > 0)[..., None], -normal, normal)

    # Between the footprint's short side, which aliases along the long one, and its long side, which blurs across it.
    footprint = density[scene, hits.surface] / (away_from_zero(hits.inverse_depth) * cameras.focal[:, None] * RAYS)
    level = torch.log2(footprint.clamp(min=1e-6)) - 0.5 * torch.log2(facing.abs().clamp(min=0.05))
    window = scenes.window[scene, hits.surface]
    u, v = window[..., 0] + hits.a * window[..., 2], window[..., 1] + hits.b * window[..., 3]
    colour = textures.sample(scenes.texture[scene, hits.surface], u, v, level)

    lambert = (normal * scenes.light[:, None]).sum(-1).clamp(min=0)
    light = scenes.ambient[:, None] + (1 - scenes.ambient[:, None]) * lambert
    return torch.where((hits.inverse_depth > 0)[..., None], colour * light[..., None], 0.0)


def expose(generator: Generator, light: Tensor) -> Tensor:
    """What a camera makes of light (B, 3, H, W): exposure, colour balance, uneven light, blur, contrast, noise; uint8."""
    count, _, height, width = light.shape
    g = generator

    gain = torch.exp(uniform(g, count, 1, 1, 1, low=-0.5, high=0.6)) * uniform(g, count, 3, 1, 1, low=0.9, high=1.1)
    x = torch.linspace(-1, 1, width, device=light.device)
    y = torch.linspace(-1, 1, height, device=light.device)[:, None]
    direction = uniform(g, count, 1, 1, 1, high=2 * math.pi)
    slope = uniform(g, count, 1, 1, 1, high=0.35).square() * 2
    uneven = 1 + slope * (direction.cos() * x + direction.sin() * y) - uniform(g, count, 1, 1, 1, high=0.12) * (x * x + y * y)
    image = light * gain * uneven

    # Blur: between the sharp image and one blurred by a 5x5 binomial twice, sigma 1.4 pixels; half of the images stay sharp.
    weights = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], device=light.device) / 16
    kernel = (weights[:, None] * weights)[None, None].expand(3, 1, 5, 5)
    blurred = image
    for _ in range(2):
        blurred = F.conv2d(F.pad(blurred, (2, 2, 2, 2), mode="replicate"), kernel, groups=3)
    image = torch.lerp(image, blurred, uniform(g, count, 1, 1, 1, low=-1.0).clamp(min=0))

    image = image.clamp(min=0) ** torch.exp(uniform(g, count, 1, 1, 1, low=-0.4, high=0.4))
    grey = uniform(g, count, 1, 1, 1) < 0.05
    image = torch.where(grey, image.mean(1, keepdim=True), image)
    noise = torch.randn(image.shape, generator=g, device=light.device) * (0.04 * uniform(g, count, 1, 1, 1).square())
    return ((image + noise) * 255).round().clamp(0, 255).to(torch.uint8)
