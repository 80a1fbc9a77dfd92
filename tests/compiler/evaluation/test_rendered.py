"""Pairs with exact correspondence in files, and scenes that are read in order."""

from __future__ import annotations

import errno
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smc.compiler.evaluation import held_out
from smc.compiler.evaluation.data import open_data
from smc.compiler.evaluation.geometry import epipolar_error
from smc.compiler.evaluation.held_out import InOrder, held_out_scenes
from smc.compiler.evaluation.pairs import ListedPair, PosePair
from smc.compiler.evaluation.rendered import between_pixels, read_pair, render, write_pair
from smc.compiler.scenes import pairs
from smc.compiler.scenes.pairs import HeldOutPairs
from smc.exported.errors import BadImage, BadInput, DiskError, InputMissing, NoTarget, UsageError
from tests.compiler.evaluation.made import CAMERA, HEIGHT, WIDTH, noise_image, pose

PLANE = np.array([[0.9, -0.1, 30], [0.05, 1.1, -10], [1e-4, 2e-5, 1]])


def plane_pair(name: str = "a") -> ListedPair:
    """All on a plane, but for a step of 30 pixels on the right; the lowest tenth is hidden."""

    def warp(xy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # type: ignore[type-arg]
        mapped = np.column_stack([xy, np.ones(len(xy))]) @ PLANE.T
        step = np.where(xy[:, :1] > WIDTH / 2, [30, 0], [0, 0])
        return mapped[:, :2] / mapped[:, 2:] + step, xy[:, 1] < 0.9 * HEIGHT

    return ListedPair(name, noise_image(), noise_image(1), CAMERA, CAMERA, pose(), warp)


def test_a_pair_comes_back_from_its_file(tmp_path: Path) -> None:
    pair = plane_pair()
    for name in ("0-00000", "0-00001"):
        write_pair(tmp_path / f"{name}.npz", pair)
    data = open_data(f"rendered:{tmp_path}")
    assert list(data.names) == ["0-00000", "0-00001"]
    found = data.load(1)
    assert isinstance(found, ListedPair)
    assert found.name == "0-00001"
    for name in ("image0", "image1", "K0", "K1", "T_0to1"):
        np.testing.assert_array_equal(getattr(found, name), getattr(pair, name))
    assert pair.warp is not None
    assert found.warp is not None
    random = np.random.default_rng(0)
    pixels = random.integers(0, (WIDTH, HEIGHT), (500, 2)).astype(np.float64)
    for xy, allowed in ((pixels, 1e-4), (random.uniform(0, (WIDTH - 1, 0.9 * HEIGHT - 2), (500, 2)), 0.01)):
        (expected, visible), (mapped, seen) = pair.warp(xy), found.warp(xy)
        far = np.abs(xy[:, 0] - WIDTH / 2) > 1  # no pixel says on which side of the step a point between two is
        assert np.abs(mapped - expected)[far | (allowed < 0.01)].max() < allowed
        np.testing.assert_array_equal(seen, visible)


def test_between_pixels_at_edges() -> None:
    to1 = np.zeros((2, 3, 2))
    to1[:, 2] = 50  # another surface
    seen = np.array([[True, True, True], [False, True, True]])
    mapped, found = between_pixels(to1, seen)(np.array([[1.4, 0], [1.6, 0], [0.3, 0.9], [0, 0], [-0.6, 0], [2.4, 1.4]]))
    np.testing.assert_allclose(mapped[:4], [[0.4, 0], [49.6, 50], [0.3, -0.1], [0, 0]], atol=1e-12)
    assert found.tolist() == [True, True, False, True, False, True]


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no rendered pairs"):
        open_data(f"rendered:{tmp_path}")
    np.savez(tmp_path / "a.npz", image0=noise_image())
    with pytest.raises(BadInput, match=r"a.npz: not a rendered pair \('K0'\)"):
        read_pair(tmp_path / "a.npz")
    with pytest.raises(BadInput, match="hold their images"):
        open_data(f"rendered:{tmp_path}:{tmp_path}")


def test_pairs_that_are_iterated_over_are_made_once_when_read_in_order() -> None:
    class Counting:
        made = 0

        def __iter__(self):  # type: ignore[no-untyped-def]
            for i in range(10):
                self.made += 1
                yield plane_pair(str(i))

    counted = Counting()
    reader = InOrder(counted)
    assert [reader.load(i).name for i in (0, 2, 3, 9)] == ["0", "2", "3", "9"]
    assert counted.made == 10
    assert reader.load(1).name == "1"


@pytest.fixture
def in_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "SHAPE", (48, 64))
    monkeypatch.setattr(HeldOutPairs, "CHUNK", 1)
    monkeypatch.setattr(pairs, "HeldOutPairs", partial(HeldOutPairs, textures=2, texture_side=32))


@pytest.mark.usefixtures("in_small")
def test_held_out_scenes_in_small(tmp_path: Path) -> None:
    data = held_out_scenes(Path("2"), None)
    assert list(data.names) == ["scene0-00000", "scene0-00001"]
    pair = data.load(1)
    assert isinstance(pair, PosePair)
    assert pair.name == data.names[1]
    write_pair(tmp_path / f"{pair.name}.npz", pair)
    for each in (pair, read_pair(tmp_path / f"{pair.name}.npz")):
        assert each.warp is not None
        xy = np.random.default_rng(0).integers(0, (64, 48), (300, 2)).astype(np.float64)
        mapped, seen = each.warp(xy)
        assert seen.mean() > 0.1
        errors = epipolar_error(xy[seen], mapped[seen].astype(np.float64), each.K0, each.K1, each.T_0to1)
        assert errors.max() < 1e-8  # pose and correspondence are of one truth


@pytest.mark.usefixtures("in_small")
def test_rendering_goes_on_and_keeps_to_its_set(tmp_path: Path) -> None:
    out = tmp_path / "set"
    done: list[int] = []
    render(1, None, "cpu", out, done.append)
    first = (out / "scene0-00000.npz").read_bytes()
    render(2, None, "cpu", out, done.append)
    assert done == [1, 2]
    assert (out / "scene0-00000.npz").read_bytes() == first
    data = open_data(f"rendered:{out}")
    assert len(data) == 2
    assert data.origin.startswith("seed 0, 64x48, 0 photographs, rendered on cpu by torch ")
    (tmp_path / "held-out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "held-out" / "a.jpg")
    with pytest.raises(UsageError, match="holds pairs of another set: seed 0"):
        render(2, tmp_path / "held-out", "cpu", out)
    (out / "set.json").write_text(json.dumps({"digest": "0123"}))
    with pytest.raises(UsageError, match="holds pairs of another set: 0123"):
        render(2, None, "cpu", out)


@pytest.mark.usefixtures("in_small")
def test_a_full_disk_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **arrays: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(DiskError, match="No space left"):
        render(1, None, "cpu", tmp_path / "set")


def test_at_least_one_pair_is_rendered(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 pairs: at least 1"):
        render(0, None, "cpu", tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_of_a_folder_of_photographs_the_photographs_count(tmp_path: Path) -> None:
    folder = tmp_path / "held-out"
    folder.mkdir()
    with pytest.raises(InputMissing, match="no photographs") as missing:
        held_out_scenes(Path("1"), folder)
    assert "smc.compiler.scenes.photographs" in missing.value.fix
    Image.new("RGB", (8, 8)).save(folder / "a.jpg")
    alone = held_out_scenes(Path("1"), folder)
    (folder / "notes.txt").write_text("of a.jpg")
    (folder / "more").mkdir()
    data = held_out_scenes(Path("1"), folder)
    assert data.digest == alone.digest
    assert ", 1 photographs," in data.origin
    with pytest.raises(InputMissing, match="no photographs") as above:
        held_out_scenes(Path("1"), tmp_path)
    assert above.value.fix == f"name {folder}"
    (folder / "b.jpg").write_bytes(b"no image")
    with pytest.raises(BadImage, match=r"b\.jpg: cannot be read"):
        held_out_scenes(Path("1"), folder)


@pytest.mark.usefixtures("in_small")
@pytest.mark.parametrize("record", [None, {}, {"origin": "somewhere"}])
def test_pairs_of_which_nothing_says_what_they_are_are_not_added_to(tmp_path: Path, record: dict[str, str] | None) -> None:
    write_pair(tmp_path / "scene0-00000.npz", plane_pair())
    if record is not None:
        (tmp_path / "set.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"holds pairs, and no set\.json says of which set"):
        render(2, None, "cpu", tmp_path)
    assert not (tmp_path / "scene0-00001.npz").exists()


def test_a_set_is_known_by_its_record_else_by_its_files(tmp_path: Path) -> None:
    write_pair(tmp_path / "a.npz", plane_pair())
    by_files = open_data(f"rendered:{tmp_path}").digest
    write_pair(tmp_path / "b.npz", plane_pair())
    assert open_data(f"rendered:{tmp_path}").digest not in ("", by_files)
    (tmp_path / "set.json").write_text(json.dumps({"origin": "made", "digest": "0123"}))
    data = open_data(f"rendered:{tmp_path}")
    assert (data.digest, data.origin) == ("0123", "made")


def test_records_that_are_none(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image0=noise_image())
    for text in ("[]", "{", '{"digest": 1}'):
        (tmp_path / "set.json").write_text(text)
        with pytest.raises(BadInput, match="not a record"):
            open_data(f"rendered:{tmp_path}")
    (tmp_path / "set.json").unlink()
    (tmp_path / "set.json").mkdir()
    with pytest.raises(InputMissing, match=r"set\.json: Is a directory"):
        open_data(f"rendered:{tmp_path}")


def test_each_device_has_a_set_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = held_out_scenes(Path("2"), None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoTarget, match="finds no GPU"):
        held_out_scenes(Path("2"), None, "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA X")
    monkeypatch.setattr("smc.compiler.packages._is_installed", lambda name: True)
    cuda = held_out_scenes(Path("2"), None, "cuda")
    assert "rendered on NVIDIA X by torch" in cuda.origin
    assert cuda.digest != cpu.digest


@pytest.mark.parametrize("count", ["0", "many", "-3"])
def test_scenes_are_asked_for_by_number(count: str) -> None:
    with pytest.raises(UsageError, match="a number of pairs was expected"):
        held_out_scenes(Path(count), None)
