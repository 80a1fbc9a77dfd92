"""Rendered pairs: ground truth that agrees with itself, and with the images."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch import Generator

from smc.compiler.scenes.draw import CLOSEST, Difficulty, draw_pairs
from smc.compiler.scenes.geometry import Cameras, Scenes, cast, pixel_grid, relief_height, warp
from smc.compiler.scenes.pairs import HeldOutPairs, PairBatch, draw_batch, flat_share
from smc.compiler.scenes.textures import draw_textures

pytestmark = pytest.mark.usefixtures("one_thread")

HEIGHT, WIDTH, COUNT = 48, 64, 6


def drawn(seed: int) -> PairBatch:
    generator = Generator().manual_seed(seed)
    return draw_batch(generator, draw_textures(generator, None, 8, 64), COUNT, HEIGHT, WIDTH)


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    return drawn(3)


def wall(distance: float, width: float = 40.0) -> tuple[Scenes, Cameras]:
    """A fronto-parallel facet at a distance, the relief far behind it, one camera at the origin."""
    corner = torch.tensor([[[-width / 2, -width / 2, distance]]])
    side1, side2 = torch.tensor([[[width, 0.0, 0.0]]]), torch.tensor([[[0.0, width, 0.0]]])
    scenes = Scenes(
        corner=corner,
        side1=side1,
        side2=side2,
        base=torch.tensor([[-50.0, -50.0, 90.0]]),
        along1=torch.tensor([[0.0, 100.0, 0.0]]),
        along2=torch.tensor([[100.0, 0.0, 0.0]]),
        height=torch.tensor([1e-4]),
        waves=torch.tensor([[[1.0, 0.0, 0.0, 1.0]]]),
        texture=torch.zeros(1, 2, dtype=torch.int64),
        window=torch.tensor([[[0.0, 0.0, 1.0, 1.0]] * 2]),
        light=torch.tensor([[0.0, 0.0, -1.0]]),
        ambient=torch.tensor([1.0]),
    )
    camera = Cameras(torch.tensor([50.0]), torch.tensor([[31.5, 23.5]]), torch.eye(3)[None], torch.zeros(1, 3))
    return scenes, camera


def test_a_wall_is_where_it_was_put() -> None:
    scenes, camera = wall(4.0, width=2.0)
    xy = torch.tensor([[[31.5, 23.5], [31.5 + 12.0, 23.5], [31.5 + 13.0, 23.5], [31.5, 23.5 - 12.4]]])
    hits = cast(scenes, camera, xy)
    # The third ray passes beside the wall, whose edge is at 50 * 1 / 4 = 12.5 pixels, and meets the relief's top at 90 - 1e-4.
    torch.testing.assert_close(1 / hits.inverse_depth, torch.tensor([[4.0, 4.0, 90.0, 4.0]]), rtol=1e-5, atol=0)
    assert hits.surface.tolist() == [[0, 0, 1, 0]]
    torch.testing.assert_close(hits.a[0, :2], torch.tensor([0.5, 0.98]))


def test_a_point_behind_a_wall_is_hidden_and_one_beside_it_is_not() -> None:
    scenes, camera = wall(4.0, width=2.0)
    moved = Cameras(camera.focal, camera.centre, camera.rotation, torch.tensor([[-1.0, 0.0, 0.0]]))  # one to the right
    # Points of the background: x = 14 / 50 * 90 = 25.2; from the second camera the wall spans -25 to 0 pixels about its centre.
    xy = torch.tensor([[[31.5 + 14.0, 23.5], [31.5 - 14.0, 23.5], [31.5 + 40.0, 23.5]]])
    where, visible = warp(scenes, camera, moved, xy, HEIGHT, WIDTH)
    assert visible.tolist() == [[True, False, False]]  # the last is outside the image
    torch.testing.assert_close(where[0, 0, 0], torch.tensor(31.5 + 50 * (25.2 - 1) / 90), rtol=0, atol=1e-3)


def test_relief_is_met_on_its_surface() -> None:
    generator = Generator().manual_seed(1)
    scenes, one, _, _ = draw_pairs(generator, 24, HEIGHT, WIDTH, 4, Difficulty())
    xy = pixel_grid(HEIGHT, WIDTH, 24, 32, torch.device("cpu")).expand(24, -1, -1)
    hits = cast(scenes, one, xy)
    relief = (hits.surface == scenes.corner.shape[1]) & (hits.inverse_depth > 0)
    assert relief.sum() > 1000
    world = one.unproject(xy, 1 / hits.inverse_depth.clamp(min=1e-6))
    up = torch.nn.functional.normalize(torch.linalg.cross(scenes.along1, scenes.along2), dim=-1)
    height = ((world - scenes.base[:, None]) * up[:, None]).sum(-1)
    top = relief_height(scenes, hits.a, hits.b)
    side = (torch.stack([hits.a, hits.b], dim=-1) - 0.5).abs().amax(-1) > 0.5 - 1e-5
    error = (height - top).abs()[relief & ~side & (height > 1e-5)]
    assert error.max() < 2e-4


def test_ground_truth_agrees_between_views_to_a_twentieth_of_a_pixel(batch: PairBatch) -> None:
    xy = torch.rand(COUNT, 400, 2, generator=Generator().manual_seed(0)) * torch.tensor([WIDTH - 1.0, HEIGHT - 1.0])
    there, visible = batch.warp(xy)
    back, seen = warp(batch.scenes, batch.cameras[1], batch.cameras[0], there, HEIGHT, WIDTH)
    assert visible.sum() > 500
    both = visible & seen
    assert both.sum() / visible.sum() > 0.99  # rays through a facet's very edge may miss it on the way back
    assert (back - xy).norm(dim=-1)[both].max() < 0.05


def test_points_depth_and_poses_agree(batch: PairBatch) -> None:
    xy = pixel_grid(HEIGHT, WIDTH, HEIGHT, WIDTH, torch.device("cpu")).expand(COUNT, -1, -1)
    relative = batch.relative_pose()
    for view in (0, 1):
        points, valid = batch.points[view].flatten(1, 2), batch.valid[view].flatten(1)
        own = points if view == 0 else points @ relative[:, :3, :3].transpose(1, 2) + relative[:, None, :3, 3]
        torch.testing.assert_close(own[..., 2][valid], batch.depth[view].flatten(1)[valid], rtol=1e-4, atol=1e-4)
        projected = own @ batch.cameras[view].intrinsics().transpose(1, 2)
        found = projected[..., :2] / projected[..., 2:].clamp(min=1e-6)
        assert (found - xy).norm(dim=-1)[valid].max() < 0.05
        rotation = batch.cameras[view].rotation
        torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(3).expand_as(rotation), rtol=0, atol=1e-5)
        assert torch.linalg.det(rotation).min() > 0.99


def test_swapped_pairs_are_the_same_seen_from_the_other_camera(batch: PairBatch) -> None:
    swapped = batch.swapped()
    assert swapped.images[0] is batch.images[1]
    for points, valid in zip(swapped.points, reversed(batch.valid), strict=True):
        assert (points[~valid] == 0).all()
    # Image 2 is first now: its points are in its own camera's frame, where z is the depth.
    torch.testing.assert_close(swapped.points[0][..., 2], batch.depth[1], rtol=1e-4, atol=1e-4)
    # Image 1's points, in that frame, are at the pixels of image 2 that the warp gives.
    xy = pixel_grid(HEIGHT, WIDTH, HEIGHT, WIDTH, torch.device("cpu")).expand(COUNT, -1, -1)
    there, visible = batch.warp(xy)
    x, y, z = swapped.points[1].flatten(1, 2).unbind(-1)
    camera = batch.cameras[1]
    found = torch.stack([x, y], dim=-1) / z[..., None] * camera.focal[:, None, None] + camera.centre[:, None]
    assert (found - there)[visible].abs().max() < 1e-3
    back = swapped.swapped()
    torch.testing.assert_close(back.points[1], batch.points[1], rtol=1e-4, atol=1e-4)


def test_the_same_point_looks_alike_in_both_images() -> None:
    """Without the cameras' faults; so the correspondences are those of the images, not only of the geometry."""
    from smc.compiler.scenes.render import render

    generator = Generator().manual_seed(4)
    textures = draw_textures(generator, None, 8, 64)
    scenes, one, other, _ = draw_pairs(generator, COUNT, HEIGHT, WIDTH, 8, Difficulty(view_angle=20, zoom=1.1))
    images = [render(scenes, textures, camera, HEIGHT, WIDTH) for camera in (one, other)]
    xy = pixel_grid(HEIGHT, WIDTH, HEIGHT, WIDTH, torch.device("cpu")).expand(COUNT, -1, -1)
    there, visible = warp(scenes, one, other, xy, HEIGHT, WIDTH)
    grid = (there + 0.5) / torch.tensor([WIDTH, HEIGHT]) * 2 - 1
    seen = torch.nn.functional.grid_sample(images[1], grid[:, None], align_corners=False)[:, :, 0]
    difference = (seen - images[0].flatten(2)).abs().mean(1)[visible]
    shuffled = (seen.roll(37, 2) - images[0].flatten(2)).abs().mean(1)[visible]
    assert difference.mean() < 0.4 * shuffled.mean()


def test_overlap_is_within_bounds() -> None:
    bounds = Difficulty(overlap=(0.3, 0.6))
    scenes, one, other, shared = draw_pairs(Generator().manual_seed(2), 20, HEIGHT, WIDTH, 4, bounds)
    assert len(shared) == 20
    assert shared.min() >= 0.3
    assert shared.max() <= 0.6
    # The share, measured again with other rays.
    xy = torch.rand(20, 800, 2, generator=Generator().manual_seed(0)) * torch.tensor([WIDTH - 1.0, HEIGHT - 1.0])
    again = torch.minimum(*(warp(scenes, a, b, xy, HEIGHT, WIDTH)[1].float().mean(1) for a, b in ((one, other), (other, one))))
    assert (again - shared).abs().max() < 0.1
    assert (1 / cast(scenes, one, xy).inverse_depth.amax(1)).min() > 0.5 * CLOSEST


def test_cameras_differ_as_asked() -> None:
    _, one, other, _ = draw_pairs(Generator().manual_seed(5), 60, HEIGHT, WIDTH, 4, Difficulty())
    angle = torch.rad2deg(torch.arccos((one.rotation[:, 2] * other.rotation[:, 2]).sum(-1).clamp(-1, 1)))
    assert angle.max() < 61
    assert (angle > 30).sum() > 5
    assert (one.focal / other.focal).std() > 0.1


def test_everything_follows_from_the_seed(batch: PairBatch) -> None:
    again, other = drawn(3), drawn(4)
    for view in (0, 1):
        assert torch.equal(batch.images[view], again.images[view])
        assert torch.equal(batch.points[view], again.points[view])
        assert not torch.equal(batch.images[view], other.images[view])
    assert all(torch.equal(getattr(batch.scenes, f.name), getattr(again.scenes, f.name)) for f in fields(Scenes))


def test_images_are_neither_empty_nor_flat(batch: PairBatch) -> None:
    for images in batch.images:
        assert images.dtype == torch.uint8
        assert images.shape == (COUNT, 3, HEIGHT, WIDTH)
        assert images.float().std((1, 2, 3)).min() > 1
    assert torch.stack(batch.valid).float().mean() > 0.99


def off_a_plane(xy: torch.Tensor, there: torch.Tensor) -> float:
    """How far pixels (N, 2) of two images, scaled to about 1, are from obeying one homography, as a plane's do."""
    (x, y), (u, v) = xy.double().unbind(-1), there.double().unbind(-1)
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    first = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y, -u], dim=1)
    second = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y, -v], dim=1)
    return float(torch.linalg.svdvals(torch.cat([first, second]))[-1]) / len(x) ** 0.5


def test_flat_share_is_all_where_one_homography_explains_what_both_see() -> None:
    generator = Generator().manual_seed(5)
    batch = draw_batch(generator, draw_textures(generator, None, 8, 64), 40, 24, 32)
    share = flat_share(batch)
    xy = pixel_grid(24, 32, 24, 32, torch.device("cpu")).expand(40, -1, -1)
    there, visible = batch.warp(xy)
    apart = torch.tensor([off_a_plane(xy[i][visible[i]] / 32, there[i][visible[i]] / 32) for i in range(40)])
    assert torch.equal(apart < 1e-5, share == 1)
    assert 0 < (share == 1).sum() < 20
    assert ((share > 0) & (share < 0.9)).any()


def test_held_out_pairs_show_more_than_a_plane() -> None:
    xy = pixel_grid(24, 32, 24, 32, torch.device("cpu"))
    pairs = list(HeldOutPairs(30, seed=2, shape=(24, 32), textures=4, texture_side=32))
    for pair in pairs:
        there, visible = map(torch.from_numpy, pair.warp(xy.numpy()))
        assert off_a_plane(xy[visible] / 32, there[visible] / 32) > 1e-5
    assert [pair.name for pair in pairs] == [f"scene2-{i:05d}" for i in range(30)]


def test_held_out_pairs_begin_alike_however_many_and_warp() -> None:
    few, more = (list(HeldOutPairs(count, shape=(HEIGHT, WIDTH), textures=4, texture_side=32)) for count in (2, 3))
    assert [pair.name for pair in more] == [f"scene0-{i:05d}" for i in range(3)]
    for one, other in zip(few, more, strict=False):
        assert np.array_equal(one.image0, other.image0)
        assert np.array_equal(one.T_0to1, other.T_0to1)
    pair = few[0]
    xy = np.stack(np.meshgrid(np.arange(4, WIDTH, 8), np.arange(4, HEIGHT, 8)), axis=-1).reshape(-1, 2)
    there, visible = pair.warp(xy)
    assert 0.1 < visible.mean() <= 1
    # Epipolar geometry from the matrices alone.
    rotation, t = pair.T_0to1[:3, :3], pair.T_0to1[:3, 3]
    cross = np.array([[0, -t[2], t[1]], [t[2], 0, -t[0]], [-t[1], t[0], 0]])
    fundamental = np.linalg.inv(pair.K1).T @ cross @ rotation @ np.linalg.inv(pair.K0)
    lines = np.column_stack([xy, np.ones(len(xy))]) @ fundamental.T
    distance = np.abs((np.column_stack([there, np.ones(len(xy))]) * lines).sum(1)) / np.linalg.norm(lines[:, :2], axis=1)
    assert distance[visible].max() < 0.05


def test_the_gpu_kernel_casts_as_torch_does() -> None:
    code = """
import torch
from smc.compiler.scenes import draw, geometry
from smc.compiler.scenes.cast_kernel import cast_on_gpu
scenes, one, _, _ = draw.draw_pairs(torch.Generator().manual_seed(1), 3, 24, 32, 4, draw.Difficulty())
xy = geometry.pixel_grid(24, 32, 17, 19, torch.device("cpu")).expand(3, -1, -1)
wanted = geometry.cast(scenes, one, xy)
inverse, surface, a, b = cast_on_gpu(geometry.view_of(scenes, one), one.directions(xy))
assert torch.equal(surface, wanted.surface)
for found, value in ((inverse, wanted.inverse_depth), (a, wanted.a), (b, wanted.b)):
    torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)
"""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
