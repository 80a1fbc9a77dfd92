"""Pairs of images with everything known about them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from smc.compiler.scenes import photographs
from smc.compiler.scenes.draw import FLAT_RELIEF, GRID, Difficulty, draw_pairs
from smc.compiler.scenes.geometry import Cameras, Scenes, cast, pick, pixel_grid, warp
from smc.compiler.scenes.render import expose, render
from smc.compiler.scenes.textures import Textures, draw_textures, uniform

HELD_OUT_SEED = 1 << 40
"""Added to the seeds of held-out sets; seeds of training are below it."""

LARGEST_FLAT_SHARE = 0.9
"""Of what both cameras see, in a pair of the evaluation set."""

RELIGHT = 0.3
"""Share of the pairs between whose images the sun moves."""


@dataclass(frozen=True)
class PairBatch:
    """B pairs of H x W images.

    Attributes:
        images: of cameras 1 and 2, uint8 (B, 3, H, W).
        scenes, cameras: what they show and where from.
        points: of either image, the 3D point of every pixel's centre in camera 1's frame, (B, H, W, 3); 0 where invalid.
        depth: of either image, z in its own camera's frame, (B, H, W); 0 where invalid.
        valid: of either image, whether there is a surface at the pixel, (B, H, W).
        overlap: (B,) the smaller share of an image that the other one sees too, by a coarse grid.
    """

    images: tuple[Tensor, Tensor]
    scenes: Scenes
    cameras: tuple[Cameras, Cameras]
    points: tuple[Tensor, Tensor]
    depth: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    overlap: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.images[0].shape[-2], self.images[0].shape[-1]

    def warp(self, xy: Tensor) -> tuple[Tensor, Tensor]:
        """Where pixels xy (B, N, 2) of image 1 are in image 2, and whether they are seen there; exact, see `geometry.warp`."""
        return warp(self.scenes, *self.cameras, xy, *self.shape)

    def relative_pose(self) -> Tensor:
        """(B, 4, 4), from camera 1's frame to camera 2's."""
        return self.cameras[1].world_to_camera() @ torch.linalg.inv(self.cameras[0].world_to_camera())

    def swapped(self) -> PairBatch:
        """The same pairs seen the other way round: image 2 first, points in its camera's frame."""
        pose = self.relative_pose()
        turn, shift = pose[:, :3, :3].transpose(1, 2), pose[:, None, :3, 3]

        def in_other(points: Tensor, valid: Tensor) -> Tensor:
            moved = (points.flatten(1, 2) @ turn + shift).view_as(points)
            return torch.where(valid[..., None], moved, 0.0)

        first, second = (in_other(*both) for both in zip(self.points, self.valid, strict=True))
        return dataclasses.replace(
            self,
            images=self.images[::-1],
            cameras=self.cameras[::-1],
            points=(second, first),
            depth=self.depth[::-1],
            valid=self.valid[::-1],
        )


def draw_batch(
    generator: Generator,
    textures: Textures,
    count: int,
    height: int,
    width: int,
    difficulty: Difficulty | None = None,
    compiled: bool = False,
) -> PairBatch:
    """`count` new pairs on the generator's device. `compiled`: see `render`."""
    scenes, one, other, shared = draw_pairs(generator, count, height, width, textures.count, difficulty or Difficulty())
    # Another sun for the second image of some pairs: its direction alone, the geometry stays.
    moved = torch.nn.functional.normalize(scenes.light + uniform(generator, count, 3, low=-0.8, high=0.8), dim=-1)
    light = torch.where(uniform(generator, count, 1) < RELIGHT, moved, scenes.light)
    relit = Scenes(**(vars(scenes) | {"light": light}))

    images = tuple(expose(generator, render(s, textures, c, height, width, compiled)) for s, c in ((scenes, one), (relit, other)))
    xy = pixel_grid(height, width, height, width, generator.device).expand(count, -1, -1)
    points, depths, valids = [], [], []
    for camera in (one, other):
        inverse = cast(scenes, camera, xy).inverse_depth
        valid = inverse > 0
        depth = 1 / torch.where(valid, inverse, 1.0)
        world = camera.unproject(xy, depth)
        in_one = world @ one.rotation.transpose(1, 2) + one.translation[:, None]
        points.append(torch.where(valid[..., None], in_one, 0.0).reshape(count, height, width, 3))
        depths.append(torch.where(valid, depth, 0.0).reshape(count, height, width))
        valids.append(valid.reshape(count, height, width))
    return PairBatch(
        (images[0], images[1]), scenes, (one, other), (points[0], points[1]), (depths[0], depths[1]), (valids[0], valids[1]), shared
    )


def flat_share(batch: PairBatch) -> Tensor:
    """(B,) the largest share that one flat surface has in the points of image 1, on a coarse grid, that image 2 sees too."""
    scenes, facets = batch.scenes, batch.scenes.corner.shape[1]
    xy = pixel_grid(*batch.shape, *GRID, batch.overlap.device).expand(len(batch.overlap), -1, -1)
    surface = cast(scenes, batch.cameras[0], xy).surface
    _, visible = batch.warp(xy)
    flat = visible & ((surface < facets) | (scenes.height < FLAT_RELIEF)[:, None])
    counts = torch.stack([(flat & (surface == i)).sum(1) for i in range(facets + 1)])
    return counts.amax(0) / visible.sum(1).clamp(min=1)


@dataclass(frozen=True)
class HeldOutPair:
    """One pair for evaluation, on the host.

    Attributes:
        name: of the pair in its set.
        image0, image1: uint8 (H, W, 3).
        K0, K1: intrinsics, float64 (3, 3); the centre of the first pixel is (0, 0).
        T_0to1: float64 (4, 4), from camera 0's frame to camera 1's; the length of its translation is in the scene's units.
        overlap: the smaller share of an image that the other one sees too.
        warp: pixels (N, 2) of image 0 -> pixels (N, 2) of image 1, and whether each is seen there.
    """

    name: str
    image0: NDArray[np.uint8]
    image1: NDArray[np.uint8]
    K0: NDArray[np.float64]
    K1: NDArray[np.float64]
    T_0to1: NDArray[np.float64]
    overlap: float
    warp: Callable[[NDArray[Any]], tuple[NDArray[np.float32], NDArray[np.bool_]]]


class HeldOutPairs:
    """The evaluation set: scenes of seeds, and photographs of a set, that training never sees.

    Pairs that show one flat surface and little else are left out. Two poses explain the points of a plane seen twice equally well, so
    that the most exact matches give a wrong one as often as not.

    Iterating draws the pairs anew each time, `CHUNK` at once. On the CPU they are the same on every machine, to rounding. A GPU has a set
    of its own: torch draws other numbers there from the same seed, and they may depend on the kind of GPU.
    """

    CHUNK = 10

    def __init__(
        self,
        count: int = 500,
        seed: int = 0,
        shape: tuple[int, int] = (384, 512),
        photographs_folder: Path | None = None,
        difficulty: Difficulty | None = None,
        textures: int = 96,
        texture_side: int = 512,
        device: str = "cpu",
    ) -> None:
        """`photographs_folder` is the `held-out` folder of packed photographs; without one, all textures are noise.

        `textures` of `texture_side` texels are drawn for each chunk, on `device`, "cpu" or "cuda"; the pairs come to the host.
        """
        self.count, self.seed, self.shape = count, seed, shape
        self.difficulty = difficulty or Difficulty()
        self.textures, self.texture_side = textures, texture_side
        self.device = torch.device(device)
        self._photographs = None if photographs_folder is None else photographs.load(photographs_folder, self.device)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[HeldOutPair]:
        return itertools.islice(self._all(), self.count)

    def _all(self) -> Iterator[HeldOutPair]:
        """Without end."""
        number = itertools.count()
        for chunk in itertools.count():
            # A generator a chunk: the first pairs of a long set are those of a short one.
            generator = Generator(self.device).manual_seed(HELD_OUT_SEED + (self.seed << 20) + chunk)
            textures = draw_textures(generator, self._photographs, self.textures, self.texture_side)
            batch = draw_batch(generator, textures, self.CHUNK, *self.shape, self.difficulty)
            for i in (flat_share(batch) <= LARGEST_FLAT_SHARE).nonzero()[:, 0].tolist():
                yield _held_out_pair(batch, i, f"scene{self.seed}-{next(number):05d}")


def _held_out_pair(batch: PairBatch, i: int, name: str) -> HeldOutPair:
    device = batch.overlap.device
    index = torch.tensor([i], device=device)
    scenes, one, other = pick(batch.scenes, index), pick(batch.cameras[0], index), pick(batch.cameras[1], index)
    shape = batch.shape

    def warp_pixels(xy: NDArray[Any]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        found, visible = warp(scenes, one, other, torch.as_tensor(xy, dtype=torch.float32, device=device)[None], *shape)
        return found[0].cpu().numpy(), visible[0].cpu().numpy()

    image0, image1 = (image[i].permute(1, 2, 0).cpu().contiguous().numpy() for image in batch.images)
    return HeldOutPair(
        name=name,
        image0=image0,
        image1=image1,
        K0=one.intrinsics()[0].cpu().double().numpy(),
        K1=other.intrinsics()[0].cpu().double().numpy(),
        T_0to1=batch.relative_pose()[i].cpu().double().numpy(),
        overlap=float(batch.overlap[i]),
        warp=warp_pixels,
    )
