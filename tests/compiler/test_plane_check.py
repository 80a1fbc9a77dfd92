"""Matches checked against a true homography: `smc match --homography`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from smc.compiler import cli
from smc.compiler.evaluation.geometry import transform
from smc.compiler.plane_check import FOUND_OUTLINE, RIGHT, WRONG, check_plane, draw_check, read_truth
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


def test_the_picture_shows_right_and_wrong_matches_and_both_outlines() -> None:
    images = Image.new("RGB", SIZE), Image.new("RGB", SIZE)
    matches = planted(100, wrong=30)
    pixels = np.asarray(draw_check(*images, matches, check_plane(matches, TRUTH))).reshape(-1, 3)
    magenta = np.array(Image.new("RGB", (1, 1), FOUND_OUTLINE))[0, 0]
    for color in (RIGHT, WRONG, magenta):
        assert (pixels == color).all(1).sum() > 100
    none = np.asarray(draw_check(*images, planted(0), check_plane(planted(0), TRUTH))).reshape(-1, 3)
    assert not (none == magenta).all(1).any()
    assert np.asarray(images[1]).max() == 0  # the images are left as they are


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
