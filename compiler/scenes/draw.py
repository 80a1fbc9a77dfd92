"""Scenes and pairs of cameras, drawn at random and kept if both cameras see enough of the same.

A scene is a room 7 to 12 across with a wall or ground of interest at its origin: a relief, flat in a third of the scenes, facing z.
In front of it float and stand boxes and sheets. Both cameras look at about the same place from 1 to 6 away.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from smc.compiler.scenes.geometry import NEAR, Cameras, Scenes, cast, pick, pixel_grid, project_visible
from smc.compiler.scenes.textures import uniform

BOXES, SHEETS, WAVES = 4, 6, 4
FACETS = 6 + 6 * BOXES + SHEETS
"""The room's six walls, six faces a box, and the sheets."""

CANDIDATES = 3
"""Scenes drawn for each one kept: those that share too little are dropped."""

GRID = (18, 24)
"""Rows and columns of the rays by which overlap is measured."""

FLAT_RELIEF = 2e-4
"""A relief that is lower is a plane."""

CLOSEST = 0.25
"""No camera is so near to something, which also keeps them out of the boxes."""


@dataclass(frozen=True)
class Difficulty:
    """How far apart two views may be.

    Attributes:
        view_angle: largest angle between the viewing directions, degrees.
        roll: standard deviation of each camera's roll, degrees; one view in ten is rolled by anything up to four times as much.
        zoom: largest ratio of the two distances.
        overlap: smallest and largest share of either image that is seen in the other.
    """

    view_angle: float = 60.0
    roll: float = 12.0
    zoom: float = 1.8
    overlap: tuple[float, float] = (0.2, 1.0)


def draw_pairs(
    generator: Generator, count: int, height: int, width: int, textures: int, difficulty: Difficulty
) -> tuple[Scenes, Cameras, Cameras, Tensor]:
    """`count` scenes with two cameras each, and the overlap (count,) of their images, within the bounds asked for."""
    kept: list[tuple[Scenes, Cameras, Cameras, Tensor]] = []
    missing = count
    while missing > 0:
        scenes = draw_scenes(generator, CANDIDATES * missing, textures)
        one, other = draw_cameras(generator, CANDIDATES * missing, height, width, difficulty)
        shared, nearest = overlap(scenes, one, other, height, width)
        low, high = difficulty.overlap
        good = ((shared >= low) & (shared <= high) & (nearest > CLOSEST)).nonzero()[:missing, 0]
        kept.append((pick(scenes, good), pick(one, good), pick(other, good), shared[good]))
        missing -= len(good)
    return (
        Scenes(**{name: torch.cat([vars(s)[name] for s, _, _, _ in kept]) for name in vars(kept[0][0])}),
        Cameras(**{name: torch.cat([vars(c)[name] for _, c, _, _ in kept]) for name in vars(kept[0][1])}),
        Cameras(**{name: torch.cat([vars(c)[name] for _, _, c, _ in kept]) for name in vars(kept[0][2])}),
        torch.cat([shared for _, _, _, shared in kept]),
    )


def overlap(scenes: Scenes, one: Cameras, other: Cameras, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The smaller of the shares of the two images that the other camera sees too, and the smallest depth in either, (B,) each."""
    xy = pixel_grid(height, width, *GRID, scenes.light.device).expand(len(scenes.light), -1, -1)
    shares, nearest = [], []
    for source, target in ((one, other), (other, one)):
        hits = cast(scenes, source, xy)
        _, visible = project_visible(scenes, source, target, xy, hits, height, width)
        shares.append(visible.float().mean(1))
        nearest.append(1 / hits.inverse_depth.amax(1).clamp(min=NEAR))
    return torch.minimum(*shares), torch.minimum(*nearest)


def draw_scenes(generator: Generator, count: int, textures: int) -> Scenes:
    """Scenes whose surfaces wear textures 0 to textures - 1."""
    g, n = generator, count
    floor_depth = uniform(g, n, low=-1.0, high=-0.05)
    room = _room(g, n, floor_depth)
    flat = uniform(g, n) < 1 / 3
    bare = uniform(g, n) < 0.2  # nothing but the wall, as on a photograph of a facade

    half = uniform(g, n, 2, low=1.0, high=3.0)
    turn = uniform(g, n, high=2 * math.pi)
    u, v = _plane_axes(turn)
    along1, along2 = 2 * half[:, :1] * u, 2 * half[:, 1:] * v
    base = -(along1 + along2) / 2
    height = torch.where(flat, FLAT_RELIEF / 2, torch.exp(uniform(g, n, low=math.log(0.03), high=math.log(0.6))))

    weights = uniform(g, n, WAVES, low=0.1)
    waves = torch.stack(
        [
            uniform(g, n, WAVES, low=-2.5, high=2.5),
            uniform(g, n, WAVES, low=-2.5, high=2.5),
            uniform(g, n, WAVES, high=2 * math.pi),
            weights / weights.sum(1, keepdim=True),
        ],
        dim=-1,
    )

    boxes = [_box(g, n, (uniform(g, n) < 0.55) & ~bare) for _ in range(BOXES)]
    sheets = [_sheet(g, n, (uniform(g, n) < 0.45) & ~bare) for _ in range(SHEETS)]
    facets = torch.cat([room, *boxes, *sheets], dim=1)  # (n, P, 3 vectors, 3)

    surfaces = FACETS + 1
    extent = uniform(g, n, surfaces, 1, low=0.35, high=1.0)
    # On what is large, one copy of a texture would be a blur: it goes over it more than once, mirrored.
    extent[:, :6] = uniform(g, n, 6, 1, low=2.0, high=4.0)
    extent[:, FACETS:] = uniform(g, n, 1, 1, low=0.8, high=2.0)
    stretch = torch.exp(uniform(g, n, surfaces, 1, low=-0.2, high=0.2))
    size = torch.cat([extent * stretch, extent / stretch], dim=-1).clamp(max=4.0)
    start = uniform(g, n, surfaces, 2) * (1 - size).clamp(min=0)
    light = F.normalize(torch.cat([uniform(g, n, 2, low=-1, high=1), uniform(g, n, 1, low=0.3, high=1.2)], dim=-1), dim=-1)
    return Scenes(
        corner=facets[:, :, 0],
        side1=facets[:, :, 1],
        side2=facets[:, :, 2],
        base=base,
        along1=along1,
        along2=along2,
        height=height,
        waves=waves,
        texture=torch.randint(textures, (n, surfaces), generator=g, device=g.device),
        window=torch.cat([start, size], dim=-1),
        light=light,
        ambient=uniform(g, n, low=0.35, high=0.9),
    )


def draw_cameras(generator: Generator, count: int, height: int, width: int, difficulty: Difficulty) -> tuple[Cameras, Cameras]:
    """Two cameras for each scene."""
    g, n = generator, count
    tilt, round_ = uniform(g, n, high=math.radians(55)), uniform(g, n, high=2 * math.pi)
    towards = torch.stack([tilt.sin() * round_.cos(), tilt.sin() * round_.sin(), tilt.cos()], dim=-1)
    distance = torch.exp(uniform(g, n, low=math.log(1.5), high=math.log(3.5)))
    target = torch.cat([uniform(g, n, 2, low=-0.5, high=0.5), uniform(g, n, 1, low=0.0, high=0.3)], dim=-1)

    axis = F.normalize(torch.linalg.cross(towards, F.normalize(torch.randn(n, 3, generator=g, device=g.device), dim=-1)), dim=-1)
    angle = uniform(g, n, 1, high=math.radians(difficulty.view_angle))
    towards2 = towards * angle.cos() + torch.linalg.cross(axis, towards) * angle.sin()
    ratio = torch.exp(uniform(g, n, low=-1, high=1) * math.log(difficulty.zoom))
    target2 = target + 0.25 * distance[:, None] * uniform(g, n, 3, low=-1, high=1)
    spin = uniform(g, n, high=2 * math.pi)  # which way is up is the scene's, not the wall's
    return (
        _camera(g, target, towards, distance, spin, height, width, difficulty.roll),
        _camera(g, target2, towards2, distance * ratio, spin, height, width, difficulty.roll),
    )


def _camera(g: Generator, target: Tensor, towards: Tensor, distance: Tensor, spin: Tensor, height: int, width: int, roll: float) -> Cameras:
    n = len(spin)
    forward = -towards
    up = torch.stack([spin.cos(), spin.sin(), torch.zeros_like(spin)], dim=-1)
    right = F.normalize(torch.linalg.cross(forward, up), dim=-1)
    down = torch.linalg.cross(forward, right)
    usual = torch.randn(n, generator=g, device=g.device).clamp(-3, 3) * math.radians(roll)
    wild = uniform(g, n, low=-4, high=4) * math.radians(roll)
    turn = torch.where(uniform(g, n) < 0.1, wild, usual)[:, None]
    rotation = torch.stack([right * turn.cos() + down * turn.sin(), down * turn.cos() - right * turn.sin(), forward], dim=1)
    eye = target + towards * distance[:, None]
    # The long side's field of view, 35 to 75 degrees: from a portrait lens to a telephone's.
    view = uniform(g, n, low=math.radians(35), high=math.radians(75))
    focal = max(height, width) / 2 / torch.tan(view / 2)
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=g.device).expand(n, 2)
    return Cameras(focal, centre, rotation, -(rotation @ eye[:, :, None])[:, :, 0])


def _plane_axes(turn: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros_like(turn)
    return torch.stack([turn.cos(), turn.sin(), zero], dim=-1), torch.stack([-turn.sin(), turn.cos(), zero], dim=-1)


def _block(corner: Tensor, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The six faces (n, 6, 3, 3) of a block: corner and two sides each."""
    faces = [(corner, x, y), (corner, y, z), (corner, z, x), (corner + z, x, y), (corner + x, y, z), (corner + y, z, x)]
    return torch.stack([torch.stack(face, dim=1) for face in faces], dim=1)


def _room(g: Generator, n: int, floor_depth: Tensor) -> Tensor:
    turn = uniform(g, n, high=2 * math.pi)
    u, v = _plane_axes(turn)
    half = uniform(g, n, 2, low=3.5, high=6.0)
    side1, side2 = 2 * half[:, :1] * u, 2 * half[:, 1:] * v
    rise = torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), uniform(g, n, low=7.0, high=9.0)], dim=-1)
    floor = torch.stack([torch.zeros_like(turn), torch.zeros_like(turn), floor_depth], dim=-1)
    return _block(floor - (side1 + side2) / 2, side1, side2, rise)


def _box(g: Generator, n: int, present: Tensor) -> Tensor:
    """Boxes that stand on the ground, or are turned anyhow and float."""
    axes = _rotation(g, n)
    u, v = _plane_axes(uniform(g, n, high=2 * math.pi))
    upright = torch.stack([u, v, torch.tensor([0.0, 0.0, 1.0], device=g.device).expand(n, 3)], dim=1)
    standing = uniform(g, n) < 0.6
    axes = torch.where(standing[:, None, None], upright, axes)
    size = torch.exp(uniform(g, n, 3, 1, low=math.log(0.15), high=math.log(1.0)))
    x, y, z = (axes * size).unbind(1)
    middle = torch.cat([uniform(g, n, 2, low=-1.2, high=1.2), uniform(g, n, 1, low=0.2, high=1.2)], dim=-1)
    corner = middle - (x + y + z) / 2
    corner[:, 2] = torch.where(standing, 0.0, corner[:, 2])
    return _block(_banish(corner, present), x, y, z)


def _sheet(g: Generator, n: int, present: Tensor) -> Tensor:
    """Rectangles turned anyhow; one in four as large as a wall."""
    x, y, _ = _rotation(g, n).unbind(1)
    scale = torch.where(uniform(g, n, 1) < 0.25, 2.0, 0.7)
    x = x * scale * torch.exp(uniform(g, n, 1, low=-1.0, high=0.4))
    y = y * scale * torch.exp(uniform(g, n, 1, low=-1.0, high=0.4))
    middle = torch.cat([uniform(g, n, 2, low=-1.6, high=1.6), uniform(g, n, 1, low=0.0, high=1.0)], dim=-1)
    return torch.stack([_banish(middle - (x + y) / 2, present), x, y], dim=1)[:, None]


def _banish(corner: Tensor, present: Tensor) -> Tensor:
    """What is absent from a scene waits behind the room's floor, where no ray comes."""
    return torch.where(present[:, None], corner, corner - torch.tensor([0.0, 0.0, 100.0], device=corner.device))


def _rotation(g: Generator, n: int) -> Tensor:
    """(n, 3, 3), rows orthonormal, directions evenly spread."""
    x = F.normalize(torch.randn(n, 3, generator=g, device=g.device), dim=-1)
    y = F.normalize(torch.linalg.cross(x, torch.randn(n, 3, generator=g, device=g.device)), dim=-1)
    return torch.stack([x, y, torch.linalg.cross(x, y)], dim=1)
