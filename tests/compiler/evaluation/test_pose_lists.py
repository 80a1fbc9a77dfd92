"""Published lists, made small in their exact form; damaged ones; images that are absent or of another size."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from smc.compiler.evaluation.arrays import read_arrays
from smc.compiler.evaluation.data import open_data
from smc.compiler.evaluation.pairs import Floats, ListedPair, PairSet, PosePair
from smc.compiler.evaluation.pose_lists import megadepth, pose_list, scannet
from smc.exported.errors import BadInput, InputMissing, UsageError
from tests.compiler.evaluation.made import CAMERA, HEIGHT, WIDTH, pose, save_image, seen_points

HALF = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])


def loaded(data: PairSet, index: int = 0) -> ListedPair:
    pair = data.load(index)
    assert isinstance(pair, ListedPair)
    assert isinstance(pair, PosePair)
    return pair


def objects(values: list[Any]) -> np.ndarray[Any, np.dtype[np.object_]]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def write_scene(path: Path, images: list[str | None], poses: list[Floats], pairs: list[Any], **other: Any) -> None:
    """As LoFTR's: arrays of objects, None for images that were left out."""
    missing = [image is None for image in images]
    np.savez(
        path,
        image_paths=objects(images),
        depth_paths=objects(images),
        intrinsics=objects([None if gone else CAMERA for gone in missing]),
        poses=objects([None if gone else each for gone, each in zip(missing, poses, strict=True)]),
        pair_infos=objects(pairs),
        **other,
    )


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder with the list of two images, and one that was left out; the images beside it, under `data`."""
    folder = tmp_path / "scene_info"
    folder.mkdir()
    names = ["Undistorted_SfM/0015/images/a.png", None, "Undistorted_SfM/0015/images/b.png"]
    write_scene(folder / "0015_0.1_0.3.npz", names, [pose(30), np.eye(4), pose(-8)], [((0, 2), 0.2, np.zeros((3, 4)))])
    for i in (0, 2):
        save_image(tmp_path / "data" / str(names[i]), i)
    return folder


def test_loftr_list_of_megadepth(scene: Path) -> None:
    data = open_data(f"megadepth:{scene}:{scene.parent / 'data'}")
    pair = loaded(data)
    assert (data.kind, data.task, len(data), str(data.scale)) == ("megadepth", "pose", 1, "long side 1600 px")
    np.testing.assert_allclose(pair.T_0to1, pose(-8) @ np.linalg.inv(pose(30)))
    np.testing.assert_allclose(pair.K0, CAMERA - HALF)  # COLMAP's centre of the first pixel is (0.5, 0.5)
    assert pair.name == "Undistorted_SfM/0015/images/a.png Undistorted_SfM/0015/images/b.png"


def test_absent_images_are_counted_and_the_first_is_named(scene: Path) -> None:
    with pytest.raises(InputMissing, match=r"0015/images/a.png: no such image.*; 2 of its 2 are missing") as error:
        open_data(f"megadepth:{scene}")
    assert "--data megadepth:LIST:IMAGES" in error.value.fix


class Bomb:
    """What unpickling would run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_list_runs_no_code(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", image_paths=objects([Bomb(tmp_path / "ran")]))
    with pytest.raises(BadInput, match=r"bad.npz: not a .npz file of arrays .*posix.mkdir"):
        megadepth(tmp_path / "bad.npz", None)
    assert not (tmp_path / "ran").exists()


def test_arrays_of_objects_come_back(tmp_path: Path) -> None:
    nested = objects([((0, 2), 0.25, np.arange(3)), None, "text", np.float64(1.5)]).reshape(2, 2)
    np.savez(tmp_path / "a.npz", nested=nested, plain=np.arange(6).reshape(2, 3))
    found = read_arrays(tmp_path / "a.npz")
    assert found["nested"].shape == (2, 2)
    np.testing.assert_array_equal(found["nested"][0, 0][2], np.arange(3))
    assert list(found["nested"].ravel()[1:]) == [None, "text", 1.5]
    np.testing.assert_array_equal(found["plain"], np.arange(6).reshape(2, 3))


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_damaged_scene(scene: Path, damage: str) -> None:
    file = next(scene.glob("*.npz"))
    data = file.read_bytes()
    file.write_bytes({"cut": data[: len(data) // 2], "text": b"not a zip file", "empty": b""}[damage])
    with pytest.raises(BadInput, match=r"not a \.npz file of arrays"):
        megadepth(scene, None)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [([((0, 9), 0.2, None)], "IndexError"), ([((0, 1), 0.2, None)], "not a scene of LoFTR's list"), ([7], "not a scene of LoFTR's list")],
)
def test_scene_that_refers_to_what_is_not_there(tmp_path: Path, pairs: list[Any], message: str) -> None:
    write_scene(tmp_path / "0.npz", ["a.png", None], [np.eye(4)] * 2, pairs)
    with pytest.raises(BadInput, match=message):
        megadepth(tmp_path, None)


def test_scene_without_its_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "0.npz", names=np.arange(3))
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadInput, match="pair_infos were expected"):
        megadepth(tmp_path, None)
    with pytest.raises(InputMissing, match=r"no \.npz files"):
        megadepth(empty, None)


def superglue_line(names: tuple[str, str], turns: tuple[int, int] = (0, 0), T: Floats | None = None, K: Floats = CAMERA) -> str:  # noqa: N803
    values = [*turns, *K.ravel(), *K.ravel(), *(pose() if T is None else T).ravel()]
    return " ".join([*names, *(f"{value:.5f}" if i > 1 else str(value) for i, value in enumerate(values))])


def test_superglue_list(tmp_path: Path) -> None:
    (tmp_path / "pairs.txt").write_text("\n".join([superglue_line(("a.png", "b.png"))] * 2) + "\n\n")
    data = pose_list(tmp_path / "pairs.txt", None)
    assert list(data.names) == ["a.png b.png", "a.png b.png #2"]  # lists may hold a pair twice
    pair = loaded(data, 1)
    assert (pair.name, pair.image0) == ("a.png b.png #2", tmp_path / "a.png")
    np.testing.assert_allclose(pair.K1, CAMERA)
    np.testing.assert_allclose(pair.T_0to1, pose(), atol=1e-5)


@pytest.mark.parametrize("turns", [(1, 0), (0, 3), (2, 1)])
def test_turned_images_come_upright_with_their_cameras(tmp_path: Path, turns: tuple[int, int]) -> None:
    for seed, name in enumerate(("a.png", "b.png")):
        save_image(tmp_path / name, seed)
    (tmp_path / "pairs.txt").write_text(superglue_line(("a.png", "b.png"), turns))
    pair = loaded(pose_list(tmp_path / "pairs.txt", None))
    for image, quarters in zip((pair.image0, pair.image1), turns, strict=True):
        if quarters:
            assert isinstance(image, np.ndarray)
            assert image.shape[:2] == ((WIDTH, HEIGHT) if quarters % 2 else (HEIGHT, WIDTH))
    # A point before the turned cameras is where the turn takes its pixel.
    xy0, xy1 = seen_points(pose(), 20)
    for xy, quarters in ((xy0, turns[0]), (xy1, turns[1])):
        width, height = WIDTH, HEIGHT
        for _ in range(quarters):
            xy[:] = np.column_stack([xy[:, 1], width - 1 - xy[:, 0]])
            width, height = height, width
    rays = np.column_stack([xy0, np.ones(20)]) @ np.linalg.inv(pair.K0).T
    lines = rays @ pair.T_0to1[:3, :3].T
    translation = pair.T_0to1[:3, 3]
    seen = np.column_stack([xy1, np.ones(20)]) @ np.linalg.inv(pair.K1).T
    coplanar = np.abs((np.cross(translation, lines) * seen).sum(1))
    assert coplanar.max() < 1e-4  # five digits in the list


@pytest.mark.parametrize("form", ["3x4", "4x4"])
def test_gluefactory_list(tmp_path: Path, form: str) -> None:
    values = [*pose()[:3, :3].ravel(), *pose()[:3, 3]] if form == "3x4" else pose().ravel()
    (tmp_path / "pairs_calibrated.txt").write_text(" ".join(["a.png", "b.png", *map(str, [*CAMERA.ravel(), *CAMERA.ravel(), *values])]))
    data = megadepth(tmp_path / "pairs_calibrated.txt", tmp_path / "images")
    pair = loaded(data)
    assert pair.image1 == tmp_path / "images" / "b.png"
    np.testing.assert_allclose(pair.T_0to1, pose())
    np.testing.assert_allclose(pair.K0, CAMERA - HALF)
    assert str(data.scale) == "long side 1600 px"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a.png b.png", "line 2: 2 values"),
        (superglue_line(("a", "b")) + " 3", "line 2: 39 values"),
        (superglue_line(("a", "b")).replace("300.00000", "x", 1), "line 2: could not convert"),
        (superglue_line(("a", "b")).replace("300.00000", "nan", 1), "not finite"),
        (superglue_line(("a", "b")).replace("300.00000", "-300", 1), "the intrinsics of a are none"),
        (superglue_line(("a", "b"), T=2 * pose()), "has no rotation"),
        (superglue_line(("a", "b"), T=np.diag([-1.0, 1, 1, 1])), "has no rotation"),
        (superglue_line(("a", "b"), turns=(4, 0)), "turns 4 and 0"),
    ],
)
def test_damaged_lists_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "pairs.txt").write_text(superglue_line(("a", "b")) + "\n" + line + "\n")
    with pytest.raises(BadInput, match=message):
        pose_list(tmp_path / "pairs.txt", None)


def test_lists_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(BadInput, match=r"binary\.txt"):
        pose_list(tmp_path / "binary.txt", None)
    with pytest.raises(BadInput, match="no pairs in it"):
        pose_list(tmp_path / "empty.txt", None)
    with pytest.raises(InputMissing, match="No such file"):
        pose_list(tmp_path / "absent.txt", None)


def write_scannet(folder: Path, **other: Any) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / "test.npz", name=np.array([[707, 0, 15, 585]], np.uint16), **other)
    np.savez(folder / "intrinsics.npz", scene0707_00=np.diag([2.0, 2, 1]) @ CAMERA)  # for 640x480


def test_loftr_list_of_scannet_with_poses_in_it(tmp_path: Path) -> None:
    write_scannet(tmp_path, rel_pose=pose()[:3].reshape(1, 12))
    for seed, frame in enumerate((15, 585)):
        save_image(tmp_path / f"scene0707_00/color/{frame}.jpg", seed)  # 320x240
    data = open_data(f"scannet:{tmp_path}")
    pair = loaded(data)
    np.testing.assert_allclose(pair.T_0to1, pose())
    # Half the size: pixel centres stay whole numbers, so the principal point is not just halved.
    np.testing.assert_allclose(pair.K0, [[300, 0, (2 * 159.5 + 0.5) / 2 - 0.5], [0, 310, (2 * 119.5 + 0.5) / 2 - 0.5], [0, 0, 1]])
    assert str(data.scale) == "long side 640 px"


def test_loftr_list_of_scannet_with_poses_beside_the_images(tmp_path: Path) -> None:
    write_scannet(tmp_path)
    images = tmp_path / "images" / "scene0707_00"
    (images / "pose").mkdir(parents=True)
    to_world = [pose(50), pose(20)]
    for frame, each in zip((15, 585), to_world, strict=True):
        np.savetxt(images / "pose" / f"{frame}.txt", each)
        save_image(images / "color" / f"{frame}.jpg")
    pair = loaded(scannet(tmp_path, tmp_path / "images"))
    np.testing.assert_allclose(pair.T_0to1, np.linalg.inv(to_world[1]) @ to_world[0], atol=1e-12)
    (images / "pose" / "15.txt").unlink()
    with pytest.raises(InputMissing, match=r"pose/15.txt"):
        scannet(tmp_path, tmp_path / "images")


def test_superglue_list_of_scannet_finds_the_images_under_their_usual_names(tmp_path: Path) -> None:
    usual = [tmp_path / f"scene0707_00/color/{frame}.jpg" for frame in (15, 585)]
    for path in usual:
        save_image(path)
    large = np.diag([1296 / WIDTH, 968 / HEIGHT, 1]) @ CAMERA
    line = superglue_line(("scene0707_00_frame-000015.jpg", "scene0707_00_frame-000585.jpg"), K=large)
    (tmp_path / "scannet_test_pairs_with_gt.txt").write_text(line)
    pair = loaded(open_data(f"scannet:{tmp_path / 'scannet_test_pairs_with_gt.txt'}"))
    np.testing.assert_allclose(pair.K0[:2, :2], CAMERA[:2, :2], rtol=1e-6)  # fitted to images that are not 1296x968


@pytest.mark.parametrize("text", ["megadepth", "nonsense:/tmp", "pairs:", "pairs:a:b:c", ""])
def test_data_that_cannot_be_meant(text: str) -> None:
    with pytest.raises(UsageError, match="KIND one of megadepth, scannet, pairs, hpatches, homography, scenes"):
        open_data(text)
