"""Scenes and cameras as batches of tensors, and exact ray casting.

Notation: B scenes, P facets a scene, N rays a scene. Coordinates are right-handed; a camera looks along its z axis, x to the
right and y down; pixel (0, 0) is the centre of the first pixel. A surface's own coordinates (a, b) run from 0 to 1 over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor

NEAR = 0.05
"""Nothing closer to a camera than this, along its axis, is seen."""

MARCH_STEPS, BISECTIONS = 20, 7
"""A ray goes through the relief in steps of 1/20 of its way in the relief's slab; the step that crosses the surface is halved 7
times, and what is left, 1/2560 of the way, is interpolated: far less than that on these smooth surfaces."""

VISIBLE = 2e-3
"""A point is hidden where something is nearer by more than this share of its depth."""

Batch = TypeVar("Batch", "Scenes", "Cameras")


@dataclass(frozen=True)
class Scenes:
    """B scenes of P parallelograms and one relief each.

    Attributes:
        corner, side1, side2: (B, P, 3) of every facet: its points are corner + a * side1 + b * side2.
        base, along1, along2: (B, 3) of the relief's ground, a rectangle.
        height: (B,) of the relief, from its ground to its highest possible point.
        waves: (B, W, 4): the relief's cosines, as cycles along a and b, phase in radians, and weight; the weights' sum is 1.
        texture: (B, P + 1) which texture is on a surface; the last is the relief's, here and below.
        window: (B, P + 1, 4): (a, b) = (0, 0) is at (u, v) in the texture, and the surface spans (du, dv) of it.
        light: (B, 3) unit vector to the light.
        ambient: (B,) share of the light that comes from everywhere.
    """

    corner: Tensor
    side1: Tensor
    side2: Tensor
    base: Tensor
    along1: Tensor
    along2: Tensor
    height: Tensor
    waves: Tensor
    texture: Tensor
    window: Tensor
    light: Tensor
    ambient: Tensor


@dataclass(frozen=True)
class Cameras:
    """B pinhole cameras: x_camera = rotation @ x_world + translation.

    Attributes:
        focal: (B,) pixels, the same in both directions.
        centre: (B, 2) the principal point in pixels, x and y.
        rotation: (B, 3, 3).
        translation: (B, 3).
    """

    focal: Tensor
    centre: Tensor
    rotation: Tensor
    translation: Tensor

    def intrinsics(self) -> Tensor:
        """(B, 3, 3)."""
        k = torch.zeros_like(self.rotation)
        k[:, 0, 0] = k[:, 1, 1] = self.focal
        k[:, :2, 2] = self.centre
        k[:, 2, 2] = 1
        return k

    def world_to_camera(self) -> Tensor:
        """(B, 4, 4)."""
        pose = torch.zeros_like(self.focal)[:, None, None].repeat(1, 4, 4)
        pose[:, :3, :3] = self.rotation
        pose[:, :3, 3] = self.translation
        pose[:, 3, 3] = 1
        return pose

    def directions(self, xy: Tensor) -> Tensor:
        """Pixels (B, N, 2) -> (B, N, 3) in the camera's frame, z = 1."""
        xy = (xy - self.centre[:, None]) / self.focal[:, None, None]
        return torch.cat([xy, torch.ones_like(xy[..., :1])], dim=-1)

    def project(self, world: Tensor) -> tuple[Tensor, Tensor]:
        """World points (B, N, 3) -> pixels (B, N, 2) and depths (B, N); pixels mean nothing where the depth is not positive."""
        local = world @ self.rotation.transpose(1, 2) + self.translation[:, None]
        depth = local[..., 2]
        xy = local[..., :2] / depth.clamp(min=1e-6)[..., None]
        return xy * self.focal[:, None, None] + self.centre[:, None], depth

    def unproject(self, xy: Tensor, depth: Tensor) -> Tensor:
        """Pixels (B, N, 2) and depths (B, N) -> world points (B, N, 3)."""
        return (self.directions(xy) * depth[..., None] - self.translation[:, None]) @ self.rotation


def pick(batch: Batch, index: Tensor) -> Batch:
    """Those members of a batch."""
    return type(batch)(**{field.name: getattr(batch, field.name)[index] for field in fields(batch)})


@dataclass(frozen=True)
class Hits:
    """What N rays of each camera meet first.

    Attributes:
        inverse_depth: (B, N), 1 / z in the camera's frame; 0 where a ray meets nothing.
        surface: (B, N) int64, the facet's number, P for the relief.
        a, b: (B, N), the surface's own coordinates.
    """

    inverse_depth: Tensor
    surface: Tensor
    a: Tensor
    b: Tensor


def away_from_zero(x: Tensor, eps: float = 1e-12) -> Tensor:
    """x, or +-eps where it is nearer to zero."""
    return torch.where(x.abs() < eps, torch.where(x < 0, -eps, eps), x)


@dataclass(frozen=True)
class View:
    """A scene as one camera's rays (x, y, 1) meet it.

    Attributes:
        facets: (B, P, 3, 3): times a ray gives (a / z, b / z, 1 / z) of where it meets the facet's plane.
        eye: (B, 3): the camera in the relief's own coordinates a, b and height.
        relief: (B, 3, 3): takes a ray to those coordinates, per depth.
        height, waves: the scene's.
    """

    facets: Tensor
    eye: Tensor
    relief: Tensor
    height: Tensor
    waves: Tensor


def view_of(scenes: Scenes, cameras: Cameras) -> View:
    # corner + a side1 + b side2 = z ray, all in the camera's frame: (a, b, 1) / z = inverse[side1, side2, corner] ray.
    to_camera = cameras.rotation.transpose(1, 2)
    corner = scenes.corner @ to_camera + cameras.translation[:, None]
    side1, side2 = scenes.side1 @ to_camera, scenes.side2 @ to_camera
    normal = torch.linalg.cross(side1, side2)
    determinant = away_from_zero((normal * corner).sum(-1, keepdim=True))
    rows = torch.stack([torch.linalg.cross(side2, corner), torch.linalg.cross(corner, side1), normal], dim=2) / determinant[..., None]

    up = torch.linalg.cross(scenes.along1, scenes.along2)
    axes = torch.stack(
        [
            scenes.along1 / scenes.along1.square().sum(-1, keepdim=True),
            scenes.along2 / scenes.along2.square().sum(-1, keepdim=True),
            up / up.norm(dim=-1, keepdim=True),
        ],
        dim=1,
    )
    eye = -(cameras.translation[:, None] @ cameras.rotation)[:, 0]
    eye = (axes @ (eye - scenes.base)[..., None])[:, :, 0]
    return View(rows, eye, axes @ to_camera, scenes.height, scenes.waves)


def cast(scenes: Scenes, cameras: Cameras, xy: Tensor) -> Hits:
    """The nearest surfaces along the rays through pixels xy (B, N, 2), which may lie between pixel centres and outside the image."""
    rays = cameras.directions(xy)
    view = view_of(scenes, cameras)
    if rays.is_cuda:
        from smc.compiler.scenes.cast_kernel import cast_on_gpu

        return Hits(*cast_on_gpu(view, rays))
    return cast_rays(view, rays)


def cast_rays(view: View, rays: Tensor) -> Hits:
    """`cast` in plain torch: what the GPU's kernel, `cast_kernel.py`, does in one pass."""
    x, y = rays[..., 0], rays[..., 1]
    facets = view.facets.shape[1]
    near, a, b = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    surface = torch.zeros_like(x, dtype=torch.int64)
    for facet in range(facets):
        row = view.facets[:, facet, :, :, None]  # (B, 3, 3, 1)
        a_z, b_z, inverse = (row[:, i, 0] * x + row[:, i, 1] * y + row[:, i, 2] for i in range(3))
        hit = (inverse > near) & (inverse < 1 / NEAR) & (a_z >= 0) & (b_z >= 0) & (a_z <= inverse) & (b_z <= inverse)
        z = 1 / torch.where(hit, inverse, 1.0)
        near, a, b = torch.where(hit, inverse, near), torch.where(hit, a_z * z, a), torch.where(hit, b_z * z, b)
        surface = torch.where(hit, facet, surface)

    inverse, relief_a, relief_b = _cast_relief(view, rays)
    hit = inverse > near
    return Hits(
        torch.where(hit, inverse, near),
        torch.where(hit, facets, surface),
        torch.where(hit, relief_a, a),
        torch.where(hit, relief_b, b),
    )


def relief_height(scenes: Scenes | View, a: Tensor, b: Tensor) -> Tensor:
    """Height (B, N) over the ground at (a, b), in [0, height]."""
    total = torch.zeros_like(a)
    for wave in range(scenes.waves.shape[1]):
        along_a, along_b, phase, weight = scenes.waves[:, wave, :, None].unbind(1)
        total = total + weight * torch.cos(2 * math.pi * (along_a * a + along_b * b) + phase)
    return scenes.height[:, None] * (0.5 + 0.5 * total)


def relief_slope(scenes: Scenes, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of `relief_height` by a and by b, (B, N) each."""
    by_a, by_b = torch.zeros_like(a), torch.zeros_like(a)
    for wave in range(scenes.waves.shape[1]):
        along_a, along_b, phase, weight = scenes.waves[:, wave, :, None].unbind(1)
        slope = weight * torch.sin(2 * math.pi * (along_a * a + along_b * b) + phase)
        by_a, by_b = by_a - slope * along_a, by_b - slope * along_b
    scale = math.pi * scenes.height[:, None]
    return scale * by_a, scale * by_b


def _cast_relief(view: View, rays: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inverse depth, 0 for a miss, and (a, b) where rays meet the relief: a solid block with that top."""
    start, step = view.eye, rays @ view.relief.transpose(1, 2)  # (B, 3), (B, N, 3)
    top = torch.stack([torch.ones_like(view.height), torch.ones_like(view.height), view.height], dim=-1)
    slope = away_from_zero(step)
    low, high = -start[:, None] / slope, (top - start)[:, None] / slope
    enter = torch.minimum(low, high).amax(-1).clamp(min=NEAR)
    leave = torch.maximum(low, high).amin(-1)
    inside = leave > enter

    def clearance(z: Tensor) -> Tensor:
        a, b, c = (start[:, i, None] + z * step[..., i] for i in range(3))
        return c - relief_height(view, a, b)

    stride = (leave - enter) / MARCH_STEPS
    before, above = enter, clearance(enter)
    after, below = enter, above
    found = above <= 0  # entered through the block's side
    for i in range(1, MARCH_STEPS + 1):
        z = enter + i * stride
        value = clearance(z)
        crossing = ~found & (value <= 0)
        after, below = torch.where(crossing, z, after), torch.where(crossing, value, below)
        found = found | crossing
        before, above = torch.where(found, before, z), torch.where(found, above, value)
    for _ in range(BISECTIONS):
        z = (before + after) / 2
        value = clearance(z)
        under = value <= 0
        after, below = torch.where(under, z, after), torch.where(under, value, below)
        before, above = torch.where(under, before, z), torch.where(under, above, value)
    z = before + (after - before) * (above / away_from_zero(above - below)).clamp(0, 1)
    hit = inside & found
    z = torch.where(hit, z, 1.0)
    a, b = start[:, 0, None] + z * step[..., 0], start[:, 1, None] + z * step[..., 1]
    return torch.where(hit, 1 / z, 0.0), a, b


def pixel_grid(height: int, width: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """Centres of the rows x cols equal parts of an image, (rows * cols, 2) as x, y in pixels, row by row."""
    x = (torch.arange(cols, device=device, dtype=torch.float32) + 0.5) * (width / cols) - 0.5
    y = (torch.arange(rows, device=device, dtype=torch.float32) + 0.5) * (height / rows) - 0.5
    return torch.stack([x.expand(rows, cols), y[:, None].expand(rows, cols)], dim=-1).reshape(-1, 2)


def in_image(xy: Tensor, height: int, width: int) -> Tensor:
    x, y = xy.unbind(-1)
    return (x > -0.5) & (y > -0.5) & (x < width - 0.5) & (y < height - 0.5)


def warp(scenes: Scenes, source: Cameras, target: Cameras, xy: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Where the surfaces seen at pixels xy (B, N, 2) of one camera appear in another's image of height x width.

    Returns:
        Pixels (B, N, 2), and whether (B, N) the point is seen there: on a surface, in the image, and not hidden. Hiding is
        decided by casting the other camera's ray to the very point, not by a depth map.
    """
    hits = cast(scenes, source, xy)
    return project_visible(scenes, source, target, xy, hits, height, width)


def project_visible(
    scenes: Scenes, source: Cameras, target: Cameras, xy: Tensor, hits: Hits, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """`warp` of rays that have been cast."""
    hit = hits.inverse_depth > 0
    world = source.unproject(xy, 1 / torch.where(hit, hits.inverse_depth, 1.0))
    seen_at, depth = target.project(world)
    nearest = cast(scenes, target, seen_at).inverse_depth
    visible = hit & (depth > NEAR) & in_image(seen_at, height, width) & (nearest * depth < 1 + VISIBLE)
    return seen_at, visible
