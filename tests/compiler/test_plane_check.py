"""Matches checked against a true homography: `smc match --homography`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from smc.compiler import cli
from smc.compiler.evaluation.geometry import transform
from smc.compiler.plane_check import (
    FOUND_OUTLINE,
    RIGHT,
    TRUE_OUTLINE,
    WRONG,
    PlaneCheck,
    check_plane,
    draw_check,
    outline,
    read_truth,
)
from smc.exported.drawing import GAP
from smc.exported.errors import BadInput, NoTarget
from smc.exported.matcher import Matches

SIZE = (200, 160)
TRUTH = np.array([[0.8, -0.1, 20], [0.1, 0.9, 5], [2e-4, 1e-4, 1]])


def planted(count: int, wrong: int = 0, noise: float = 0.0) -> Matches:
    """Matches that follow `TRUTH`, the first `wrong` of them 40 pixels off."""
    random = np.random.default_rng(0)
    xy0 = random.uniform((0, 0), SIZE, (count, 2))
    xy1 = transform(TRUTH, xy0) + random.normal(0, noise, (count, 2))
    xy1[:wrong] += 40
    return Matches(xy0.astype(np.float32), xy1.astype(np.float32), np.ones(count, np.float32), SIZE, SIZE, "apply")


def test_the_homography_is_recovered_and_errors_are_distances() -> None:
    check = check_plane(planted(100, wrong=30, noise=0.3), TRUTH)
    assert check.corner_error is not None
    assert 0 < check.corner_error < 1
    assert check.inliers == 70
    assert (check.errors[:30] > 30).all()
    assert (check.errors[30:] < 2).all()
    precision = check.summary()["precision"]
    assert precision["3 px"] == precision["5 px"] == 0.7
    assert precision["1 px"] == (check.errors < 1).mean() < 0.7


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_matches_give_no_homography(count: int) -> None:
    check = check_plane(planted(count), TRUTH)
    assert (check.found, check.inliers, check.corner_error) == (None, 0, None)
    assert check.summary()["precision"]["1 px"] == (1.0 if count else 0.0)


def test_the_picture_shows_right_and_wrong_matches() -> None:
    images = Image.new("RGB", SIZE), Image.new("RGB", SIZE)
    matches = planted(100, wrong=30)
    pixels = np.asarray(draw_check(*images, matches, check_plane(matches, TRUTH))).reshape(-1, 3)
    for color in (RIGHT, WRONG):
        assert (pixels == color).all(1).sum() > 100
    assert np.asarray(images[1]).max() == 0  # the images are left as they are


def rgb(color: str) -> NDArray[np.uint8]:
    return np.asarray(Image.new("RGB", (1, 1), color))[0, 0]


def along_border(picture: Image.Image, homography: NDArray[np.float64], color: str) -> float:
    """The share of the points on the first image's outline, as far as they are inside the second image, that have the colour."""
    across, down = (np.linspace(0, side - 1, 400) for side in SIZE)
    sides = [np.column_stack(np.broadcast_arrays(across, y)) for y in (0, SIZE[1] - 1)]
    sides += [np.column_stack(np.broadcast_arrays(x, down)) for x in (0, SIZE[0] - 1)]
    x, y = np.rint(transform(homography, np.concatenate(sides))).astype(int).T
    inside = (x >= 0) & (x < SIZE[0]) & (y >= 0) & (y < SIZE[1])
    assert inside.sum() > 400
    drawn = (np.asarray(picture)[:, SIZE[0] + GAP :] == rgb(color)).all(2)
    near = np.lib.stride_tricks.sliding_window_view(np.pad(drawn, 1), (3, 3)).any((2, 3))  # a thin line is rounded its own way
    return float(near[y[inside], x[inside]].mean())


def test_the_picture_shows_where_the_outline_is_and_where_it_was_found() -> None:
    images = Image.new("RGB", SIZE), Image.new("RGB", SIZE)
    off = TRUTH + np.array([[0, 0, 25], [0, 0, 15], [0, 0, 0]])  # far enough for the lines to be apart
    none = np.zeros((0, 2), np.float32)
    matches = Matches(none, none, np.zeros(0, np.float32), SIZE, SIZE, "apply")
    both = draw_check(*images, matches, PlaneCheck(TRUTH, off, 10, np.zeros(0), 30.0))
    assert along_border(both, TRUTH, TRUE_OUTLINE) > 0.95  # the other one crosses it
    assert along_border(both, off, FOUND_OUTLINE) == 1
    assert along_border(both, off, TRUE_OUTLINE) < 0.2
    truth_only = draw_check(*images, matches, check_plane(matches, TRUTH))
    assert along_border(truth_only, TRUTH, TRUE_OUTLINE) == 1
    assert not (np.asarray(truth_only) == rgb(FOUND_OUTLINE)).all(2).any()
    assert np.asarray(images[1]).max() == 0


def test_there_is_no_outline_where_the_horizon_crosses_the_image() -> None:
    images = Image.new("RGB", SIZE), Image.new("RGB", SIZE)
    across = np.array([[1, 0, 0], [0, 1, 0], [-0.01, 0, 1]])  # w is 0 at x = 100
    assert outline(across, *SIZE) is None
    assert outline(-across, *SIZE) is None
    found = draw_check(*images, planted(0), PlaneCheck(across, None, 0, np.zeros(0), None))
    assert not (np.asarray(found)[:, SIZE[0] + GAP :]).any()
    for homography in (TRUTH, -TRUTH):
        corners = outline(homography, *SIZE)
        assert corners is not None
        np.testing.assert_allclose(corners[0], [20, 5])


def test_a_file_that_is_no_homography(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "H"
    file.write_text("1 2 3")
    with pytest.raises(BadInput, match="not a homography"):
        read_truth(file)
    monkeypatch.setattr("smc.compiler.packages._is_installed", lambda name: name != "poselib")
    with pytest.raises(NoTarget, match="poselib"):
        read_truth(file)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_reports_it(
    tmp_path: Path, tiny_bundle: Path, examples: Path, capsys: pytest.CaptureFixture[str], as_json: bool
) -> None:
    pair = (str(examples / "graf1.png"), str(examples / "graf3.png"), "--bundle", str(tiny_bundle))
    picture = tmp_path / "picture.png"
    options = ["--homography", str(examples / "H1to3p.xml"), "--viz", str(picture), *(["--json"] if as_json else [])]
    assert cli._run(["match", *pair, *options]) == 0
    out = capsys.readouterr().out
    if as_json:
        assert json.loads(out)["homography"]["precision"].keys() == {"1 px", "3 px", "5 px"}
    else:
        assert "within 3 px" in out
        assert "homography" in out
    with Image.open(picture) as drawn:
        assert drawn.size == (1608, 640)
