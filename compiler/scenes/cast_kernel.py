"""`geometry.cast_rays` as one Triton kernel: some thousand operations a ray, in registers from the ray to what it hits."""

# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from smc.compiler.scenes import geometry

if TYPE_CHECKING:
    from smc.compiler.scenes.geometry import View

BLOCK = 256
"""Rays of a program: two for each thread of four warps."""


@triton.jit
def clearance(z, eye_a, eye_b, eye_c, step_a, step_b, step_c, height, waves, WAVES: tl.constexpr):
    """Height of the points at depth z over the relief's surface."""
    a, b, c = eye_a + z * step_a, eye_b + z * step_b, eye_c + z * step_c
    total = tl.zeros_like(a)
    for wave in tl.static_range(WAVES):
        along_a, along_b = tl.load(waves + 4 * wave), tl.load(waves + 4 * wave + 1)
        phase, weight = tl.load(waves + 4 * wave + 2), tl.load(waves + 4 * wave + 3)
        total += weight * tl.cos(6.283185307179586 * (along_a * a + along_b * b) + phase)
    return c - height * (0.5 + 0.5 * total)


@triton.jit
def slab(eye, step, top):
    """Depths at which rays enter and leave 0 <= coordinate <= top."""
    step = tl.where(tl.abs(step) < 1e-12, tl.where(step < 0, -1e-12, 1e-12), step)
    low, high = -eye / step, (top - eye) / step
    return tl.minimum(low, high), tl.maximum(low, high)


@triton.jit
def cast_kernel(
    rays,  # float32 (B, N, 3), the third 1
    facets,  # float32 (B, P, 3, 3)
    eye,  # float32 (B, 3)
    relief,  # float32 (B, 3, 3)
    heights,  # float32 (B,)
    waves,  # float32 (B, WAVES, 4)
    inverse_depth,  # out, float32 (B, N)
    surface,  # out, int64 (B, N)
    at_a,  # out, float32 (B, N)
    at_b,  # out, float32 (B, N)
    count,  # N
    P: tl.constexpr,
    WAVES: tl.constexpr,
    STEPS: tl.constexpr,
    BISECTIONS: tl.constexpr,
    NEAR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    scene = tl.program_id(1).to(tl.int64)
    ray = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = ray < count
    place = scene * count + ray
    x = tl.load(rays + 3 * place, mask=inside, other=0.0)
    y = tl.load(rays + 3 * place + 1, mask=inside, other=0.0)

    near = tl.zeros([BLOCK], tl.float32)
    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    hit_surface = tl.zeros([BLOCK], tl.int64)
    for facet in range(P):
        row = facets + (scene * P + facet) * 9
        a_z = tl.load(row) * x + tl.load(row + 1) * y + tl.load(row + 2)
        b_z = tl.load(row + 3) * x + tl.load(row + 4) * y + tl.load(row + 5)
        inverse = tl.load(row + 6) * x + tl.load(row + 7) * y + tl.load(row + 8)
        hit = (inverse > near) & (inverse < 1 / NEAR) & (a_z >= 0) & (b_z >= 0) & (a_z <= inverse) & (b_z <= inverse)
        z = 1 / tl.where(hit, inverse, 1.0)
        near, a, b = tl.where(hit, inverse, near), tl.where(hit, a_z * z, a), tl.where(hit, b_z * z, b)
        hit_surface = tl.where(hit, facet, hit_surface)

    height, wave = tl.load(heights + scene), waves + scene * (4 * WAVES)
    axes = relief + scene * 9
    eye_a, eye_b, eye_c = tl.load(eye + scene * 3), tl.load(eye + scene * 3 + 1), tl.load(eye + scene * 3 + 2)
    step_a = tl.load(axes) * x + tl.load(axes + 1) * y + tl.load(axes + 2)
    step_b = tl.load(axes + 3) * x + tl.load(axes + 4) * y + tl.load(axes + 5)
    step_c = tl.load(axes + 6) * x + tl.load(axes + 7) * y + tl.load(axes + 8)
    low_a, high_a = slab(eye_a, step_a, 1.0)
    low_b, high_b = slab(eye_b, step_b, 1.0)
    low_c, high_c = slab(eye_c, step_c, height)
    enter = tl.maximum(tl.maximum(tl.maximum(low_a, low_b), low_c), NEAR)
    leave = tl.minimum(tl.minimum(high_a, high_b), high_c)

    stride = (leave - enter) / STEPS
    before, above = enter, clearance(enter, eye_a, eye_b, eye_c, step_a, step_b, step_c, height, wave, WAVES)
    after, below = enter, above
    found = above <= 0
    for i in range(1, STEPS + 1):
        z = enter + i * stride
        value = clearance(z, eye_a, eye_b, eye_c, step_a, step_b, step_c, height, wave, WAVES)
        crossing = (found == 0) & (value <= 0)
        after, below = tl.where(crossing, z, after), tl.where(crossing, value, below)
        found = found | crossing
        before, above = tl.where(found, before, z), tl.where(found, above, value)
    for _ in range(BISECTIONS):
        z = (before + after) / 2
        value = clearance(z, eye_a, eye_b, eye_c, step_a, step_b, step_c, height, wave, WAVES)
        under = value <= 0
        after, below = tl.where(under, z, after), tl.where(under, value, below)
        before, above = tl.where(under, before, z), tl.where(under, above, value)
    drop = above - below
    drop = tl.where(tl.abs(drop) < 1e-12, tl.where(drop < 0, -1e-12, 1e-12), drop)
    z = before + (after - before) * tl.minimum(tl.maximum(above / drop, 0.0), 1.0)
    met = (leave > enter) & found
    z = tl.where(met, z, 1.0)
    closer = met & (1 / z > near)
    tl.store(inverse_depth + place, tl.where(closer, 1 / z, near), mask=inside)
    tl.store(surface + place, tl.where(closer, P, hit_surface), mask=inside)
    tl.store(at_a + place, tl.where(closer, eye_a + z * step_a, a), mask=inside)
    tl.store(at_b + place, tl.where(closer, eye_b + z * step_b, b), mask=inside)


def cast_on_gpu(view: View, rays: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `Hits`."""
    scenes, count = rays.shape[:2]
    inverse, a, b = (torch.empty(scenes, count, device=rays.device) for _ in range(3))
    surface = torch.empty(scenes, count, device=rays.device, dtype=torch.int64)
    cast_kernel[(triton.cdiv(count, BLOCK), scenes)](
        rays.contiguous(),
        view.facets.contiguous(),
        view.eye.contiguous(),
        view.relief.contiguous(),
        view.height.contiguous(),
        view.waves.contiguous(),
        inverse,
        surface,
        a,
        b,
        count,
        P=view.facets.shape[1],
        WAVES=view.waves.shape[1],
        STEPS=geometry.MARCH_STEPS,
        BISECTIONS=geometry.BISECTIONS,
        NEAR=geometry.NEAR,
        BLOCK=BLOCK,
    )
    return inverse, surface, a, b
