"""Homographies and the images they belong to."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from smc.compiler.evaluation.data import open_data
from smc.compiler.evaluation.geometry import transform
from smc.compiler.evaluation.homographies import homography_folder, hpatches, read_homography
from smc.compiler.evaluation.pairs import HomographyPair
from smc.exported.errors import BadInput, InputMissing
from tests.compiler.evaluation.made import save_image


def test_the_shipped_pair(examples: Path) -> None:
    data = open_data(f"homography:{examples}")
    pair = data.load(0)
    assert isinstance(pair, HomographyPair)
    assert (list(data.names), pair.image0, pair.image1) == (["graf1.png graf3.png"], examples / "graf1.png", examples / "graf3.png")
    np.testing.assert_allclose(pair.homography[0], [7.6285898e-01, -2.9922929e-01, 2.2567123e02])
    np.testing.assert_allclose(pair.homography[2], [3.4663091e-04, -1.4364524e-05, 1])
    assert (data.task, str(data.scale)) == ("homography", "own size")


def write_sequence(folder: Path, *, count: int = 6) -> None:
    folder.mkdir(parents=True)
    for i in range(1, count + 1):
        save_image(folder / f"{i}.ppm", i)
    for i in range(2, 7):
        (folder / f"H_1_{i}").write_text(f"1 0 {i}\n0 1 0\n0 0 1\n")


def test_hpatches_without_the_large_sequences(tmp_path: Path) -> None:
    for name in ("v_wall", "i_ajuntament", "i_dc"):
        write_sequence(tmp_path / name)
    data = open_data(f"hpatches:{tmp_path}")
    assert list(data.names) == [f"{name} 1-{i}" for name in ("i_ajuntament", "v_wall") for i in range(2, 7)]
    pair = data.load(6)
    assert isinstance(pair, HomographyPair)
    assert (pair.image0, pair.image1) == (tmp_path / "v_wall" / "1.ppm", tmp_path / "v_wall" / "3.ppm")
    assert pair.homography[0, 2] == 3
    assert str(data.scale) == "short side 480 px"


def test_hpatches_that_is_not_whole(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no folders"):
        hpatches(tmp_path, None)
    write_sequence(tmp_path / "v_wall", count=5)
    with pytest.raises(InputMissing, match=r"v_wall/6.ppm: no such image, of hpatches; 1 of its 6 are missing"):
        open_data(f"hpatches:{tmp_path}")
    (tmp_path / "v_wall" / "H_1_4").unlink()
    with pytest.raises(InputMissing, match="H_1_4"):
        hpatches(tmp_path, None)
    with pytest.raises(BadInput, match="beside their images"):
        hpatches(tmp_path, tmp_path)


def test_a_folder_of_which_it_is_not_clear_what_belongs_together(examples: Path, tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match="no files of homographies"):
        homography_folder(tmp_path, None)
    shutil.copy(examples / "H1to3p.xml", tmp_path)
    with pytest.raises(BadInput, match="0 pairs of images"):
        homography_folder(tmp_path, None)
    for name in ("a1.png", "a3.png", "b1.png", "b3.png"):
        save_image(tmp_path / name)
    with pytest.raises(BadInput, match="2 pairs of images"):
        homography_folder(tmp_path, None)
    with pytest.raises(InputMissing, match="no such folder"):
        homography_folder(tmp_path / "absent", None)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("H.xml", "<opencv_storage><H><rows>3</rows>", "no element found"),
        ("H.xml", "<opencv_storage><H><rows>2</rows><cols>3</cols><data>1 0 0 0 1 0</data></H></opencv_storage>", "3 rows and 3 columns"),
        ("H.xml", "<opencv_storage><H><rows>3</rows><cols>3</cols><data>1 0 0</data></H></opencv_storage>", "expected, found 3"),
        ("H.xml", "<opencv_storage><H><rows>3</rows><cols>3</cols></H></opencv_storage>", "nine numbers were expected, found 0"),
        ("H.txt", "1 0 0 0 1 0 0 0", "nine numbers were expected, found 8"),
        ("H.txt", "1 0 0 0 1 0 0 0 x", "could not convert"),
        ("H.txt", "1 0 0 0 1 0 0 0 nan", "not finite"),
        ("H.txt", "1 0 0 0 1 0 0 0 0", "no inverse"),
        ("H.txt", "0 0 0 0 0 0 0 0 0", "no inverse"),
        ("H.txt", "1e8 2e8 3e8 4e8 5e8 6e8 7e8 8e8 9e8", "no inverse"),
    ],
)
def test_damaged_homographies(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadInput, match=message) as caught:
        read_homography(tmp_path / name)
    assert "nine numbers" in caught.value.fix


@pytest.mark.parametrize("scale", [1e-4, 1e-9, -1.0, 1e6])
def test_a_homography_is_one_at_any_scale(tmp_path: Path, examples: Path, scale: float) -> None:
    truth = read_homography(examples / "H1to3p.xml")
    np.savetxt(tmp_path / "H", scale * truth)
    np.testing.assert_allclose(read_homography(tmp_path / "H"), scale * truth)


def test_a_strong_view_of_large_images_is_no_singular_matrix(tmp_path: Path) -> None:
    corners0 = np.array([[0, 0], [20000, 0], [20000, 15000], [0, 15000]], np.float64)
    corners1 = np.array([[9000, 9000], [9050, 9000], [20000, 15000], [0, 15000]], np.float64)
    rows = []
    for (x, y), (u, v) in zip(corners0, corners1, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y, -u], [0, 0, 0, x, y, 1, -v * x, -v * y, -v]]
    np.savetxt(tmp_path / "H", np.linalg.svd(np.array(rows))[2][-1])
    found = read_homography(tmp_path / "H")
    np.testing.assert_allclose(transform(found, corners0), corners1, atol=0.1)
