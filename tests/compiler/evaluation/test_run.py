"""Evaluations from top to bottom."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import smc
from smc.compiler.evaluation.data import open_data
from smc.compiler.evaluation.matchers import BundleMatcher, Correspondences, SiftMatcher, mutual_nearest
from smc.compiler.evaluation.metrics import columns_of, figures
from smc.compiler.evaluation.pairs import HomographyPair, ListedPair, PairSet, Scale
from smc.compiler.evaluation.records import Estimate
from smc.compiler.evaluation.run import EvalRequest, Evaluation, evaluate
from smc.compiler.evaluation.summary import summarise
from smc.exported.errors import BadInput, UsageError
from tests.compiler.evaluation.made import CAMERA, HEIGHT, WIDTH, PlantedMatcher, noise_image, planted_set, pose, seen_points


def run(out: Path, matcher: Any, *data: PairSet, **options: Any) -> Evaluation:
    return evaluate(EvalRequest(matcher=matcher, data=data or [planted_set()], out=out, **options))


def test_planted_poses_are_found(tmp_path: Path) -> None:
    found = run(tmp_path / "r", PlantedMatcher())
    assert [row.name for row in found.rows] == [f"pair {i}" for i in range(4)]
    for row in found.rows:
        (found_pose,) = row.estimates
        assert found_pose.error is not None
        assert found_pose.error < 0.5
        assert found_pose.error == max(found_pose.rotation_error or 0, found_pose.translation_error or 0)
        assert found_pose.inliers > 290
        assert row.precision == {"epipolar 5e-4": 1, "epipolar 1e-4": 1}
        assert row.seconds.keys() == {"read", "match", "estimate"}
    (summary,) = summarise(found.header.config, found.rows)
    assert summary.figures["AUC@5°"] > 0.9
    assert (summary.pairs, summary.failed, summary.figures["matches"]) == (4, 0, 300)


def test_a_pair_without_matches_is_one_that_failed(tmp_path: Path) -> None:
    found = run(tmp_path / "r", PlantedMatcher(matches=0))
    assert all(row.estimates == [Estimate()] for row in found.rows)
    assert {value for row in found.rows for value in row.precision.values()} == {0.0}
    (summary,) = summarise(found.header.config, found.rows)
    assert (summary.failed, summary.median_error, summary.figures["AUC@20°"]) == (4, None, 0)


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", PlantedMatcher())
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "r", PlantedMatcher(at=3))
    matcher = PlantedMatcher()
    found = run(tmp_path / "r", matcher)
    assert (found.continued, matcher.calls) == (2, 2)
    assert [(row.name, row.estimates) for row in found.rows] == [(row.name, row.estimates) for row in whole.rows]
    again = PlantedMatcher()
    assert run(tmp_path / "r", again).rows == found.rows
    assert again.calls == 0


def test_another_evaluation_does_not_go_on_with_it(tmp_path: Path) -> None:
    run(tmp_path / "r", PlantedMatcher())
    with pytest.raises(UsageError, match=r"matcher.noise is 0.1 there, 0.2 here"):
        run(tmp_path / "r", PlantedMatcher(noise=0.2))
    with pytest.raises(UsageError, match="pose_threshold"):
        run(tmp_path / "r", PlantedMatcher(), pose_threshold=2.0)


def test_draws_are_those_of_the_next_seeds(tmp_path: Path) -> None:
    noisy = PlantedMatcher(matches=60, noise=2.0)
    drawn = run(tmp_path / "3", noisy, seed=5, draws=3)
    assert noisy.calls == len(drawn.rows)  # the matches are found once
    for draw in range(3):
        single = run(tmp_path / f"single {draw}", noisy, seed=5 + draw)
        assert [row.estimates[draw] for row in drawn.rows] == [row.estimates[0] for row in single.rows]
    (summary,) = summarise(drawn.header.config, drawn.rows)
    assert len({row.estimates[draw].error for row in drawn.rows for draw in range(3)}) > len(drawn.rows)
    assert summary.spread["AUC@20°"] > 0
    assert "matches" not in summary.spread
    with pytest.raises(UsageError, match="at least 1 of each"):
        run(tmp_path / "none", noisy, draws=0)


def test_parts_of_a_set_are_the_set(tmp_path: Path) -> None:
    data = planted_set(5)
    whole = run(tmp_path / "whole", PlantedMatcher(), data)
    parts = [run(tmp_path / f"part {i}", PlantedMatcher(), data.part(i, 2)) for i in range(2)]
    assert [len(part.rows) for part in parts] == [3, 2]
    found = {row.name: row.estimates for part in parts for row in part.rows}
    assert found == {row.name: row.estimates for row in whole.rows}


def test_a_limit_draws_pairs_by_the_seed(tmp_path: Path) -> None:
    data = planted_set(12)
    first, again, other = (
        [row.name for row in run(tmp_path / str(i), PlantedMatcher(), data, limit=4, seed=seed).rows] for i, seed in enumerate((0, 0, 1))
    )
    assert first == again
    assert first != other
    assert len(set(first)) == 4
    assert first == sorted(first, key=list(data.names).index)


def test_exact_correspondence_gives_precision_in_pixels(tmp_path: Path) -> None:
    truth = pose(10)
    xy0, xy1 = seen_points(truth, 100)
    seen = np.arange(100) < 80
    offsets = np.repeat([0.5, 2, 4, 8], 25)[:, None] * [0.6, 0.8]

    class Offset(PlantedMatcher):
        def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
            return Correspondences(xy0, xy1 + offsets, np.ones(100))

    pair = ListedPair("a", noise_image(), noise_image(1), CAMERA, CAMERA, truth, lambda points: (xy1, seen))
    data = PairSet("planted", "pose", ["a"], lambda index: pair, [], "planted")
    (row,) = run(tmp_path / "own", Offset(), data).rows
    assert {name: row.precision[name] for name in ("1 px", "3 px", "5 px")} == {"1 px": 0.25, "3 px": 0.5, "5 px": 0.75}
    # At a third of the size errors are a third.
    (row,) = run(tmp_path / "third", Offset(), replace(data, scale=Scale("long", round(WIDTH / 3)))).rows
    assert {name: row.precision[name] for name in ("1 px", "3 px", "5 px")} == {"1 px": 0.5, "3 px": 0.8, "5 px": 0.8}  # a fifth is hidden


def test_homographies_at_another_scale(tmp_path: Path) -> None:
    shift = np.array([[1, 0, 12], [0, 1, -9], [0, 0, 1.0]])
    pair = HomographyPair("a", noise_image(), noise_image(1), np.eye(3))
    xy0 = np.random.default_rng(0).uniform(10, 200, (50, 2))

    class Shifted(PlantedMatcher):
        def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
            return Correspondences(xy0, xy0 + shift[:2, 2], np.ones(50))

    data = PairSet("planted", "homography", ["a"], lambda index: pair, [], "planted")
    for name, scale, factor in (("own", Scale(), 1), ("half", Scale("short", HEIGHT // 2), 0.5)):
        (row,) = run(tmp_path / name, Shifted(), replace(data, scale=scale)).rows
        assert row.estimates[0].error == pytest.approx(15 * factor, abs=1e-4)
        assert row.precision == {"1 px": 0, "3 px": 0, "5 px": 0}


def test_intrinsics_for_images_of_another_size_are_refused(tmp_path: Path) -> None:
    data = planted_set()
    pair = data.load(0)
    assert isinstance(pair, ListedPair)
    wrong = replace(data, load=lambda index: replace(pair, K1=np.diag([4, 4, 1]) @ CAMERA))
    with pytest.raises(BadInput, match=r"planted pair 0, second image: .*outside of its 320x240 pixels"):
        run(tmp_path / "r", PlantedMatcher(), wrong)


def test_requests_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing to evaluate on"):
        evaluate(EvalRequest(matcher=PlantedMatcher(), data=[], out=tmp_path / "r"))
    with pytest.raises(UsageError, match="each has to be of another kind"):
        run(tmp_path / "r", PlantedMatcher(), planted_set(), planted_set())
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed -1 with 1 draws"),
        ({"seed": 2**64}, "seeds are from 0 to"),
        ({"seed": 2**64 - 2, "draws": 3}, "every draw takes the next one"),
        ({"iterations": 0}, "at least 1 of each"),
        *(({name: value}, f"{name} is {value}") for name in ("pose_threshold", "homography_threshold") for value in (0, np.nan, np.inf)),
    ],
)
def test_numbers_out_of_range_are_refused_before_any_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "r", PlantedMatcher(), **options)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("name", ["min_confidence", "pixel_tol"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_options_that_a_file_of_results_could_not_hold_are_refused(tiny_matcher: smc.Matcher, name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"{name} is {value}: a finite number was expected"):
        BundleMatcher(tiny_matcher, both_ways=False, **{name: value})


def test_the_largest_seeds_are_taken(tmp_path: Path) -> None:
    found = run(tmp_path / "r", PlantedMatcher(), seed=2**64 - 2, draws=2)
    assert len(found.rows[0].estimates) == 2
    assert run(tmp_path / "r", PlantedMatcher(), seed=2**64 - 2, draws=2).rows == found.rows


@pytest.mark.parametrize("keypoints", [np.zeros((3, 3)), np.zeros((4, 2)), np.full((3, 2), np.nan)])
def test_a_matcher_that_returns_no_keypoints_is_told(tmp_path: Path, keypoints: NDArray[np.float64]) -> None:
    class Odd(PlantedMatcher):
        def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> Correspondences:
            return Correspondences(np.zeros((3, 2)), keypoints, np.ones(3))

    with pytest.raises(BadInput, match="the matcher returned keypoints"):
        run(tmp_path / "r", Odd())


def test_sift_recovers_the_shipped_homography(tmp_path: Path, examples: Path) -> None:
    pytest.importorskip("cv2")
    found = run(tmp_path / "r", SiftMatcher(), open_data(f"homography:{examples}"))
    (row,) = found.rows
    (estimate,) = row.estimates
    assert estimate.error is not None
    assert estimate.error < 3
    assert row.precision["3 px"] > 0.5
    assert row.seconds.keys() == {"read", "detect", "match", "estimate"}
    assert figures("homography", columns_of(found.rows))["accuracy@3 px"] == 1


def test_sift_of_images_without_corners(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    blank = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    found = SiftMatcher().match(blank, blank)
    assert found.keypoints0.shape == found.keypoints1.shape == (0, 2)


def test_mutual_nearest_neighbours_by_hand() -> None:
    one = np.array([[0, 0], [10, 0], [0, 10], [10, 9]], np.float32)
    other = np.array([[0.5, 0], [10, 1], [50, 50], [0, 9]], np.float32)
    index0, index1, confidence = mutual_nearest(one, other)
    assert list(zip(index0.tolist(), index1.tolist(), strict=True)) == [(0, 0), (1, 1), (2, 3)]
    assert confidence[0] == pytest.approx(1 - 0.5 / 9, abs=1e-6)
    for empty in (np.zeros((0, 2), np.float32), one[:1]):
        assert len(mutual_nearest(one, empty)[0]) == 0


def test_mutual_nearest_neighbours_do_not_depend_on_how_they_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    one, other = random.random((2, 70, 4), np.float32)
    whole = mutual_nearest(one, other, 0.95)
    monkeypatch.setattr("smc.compiler.evaluation.matchers.ROWS", 16)
    for found, expected in zip(mutual_nearest(one, other, 0.95), whole, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert len(whole[0]) > 5


def test_a_bundle(tmp_path: Path, tiny_matcher: smc.Matcher, examples: Path) -> None:
    matcher = BundleMatcher(tiny_matcher, subsample=16, border=2)
    found = run(tmp_path / "r", matcher, open_data(f"homography:{examples}"))
    (row,) = found.rows
    expected = tiny_matcher.match(examples / "graf1.png", examples / "graf3.png", 16, border=2, exif="ignore")
    assert row.matches == len(expected)
    assert row.seconds.keys() == {"read", "encode", "decode and match", "estimate"}
    described = found.header.config.matcher
    assert (described["build_key"], described["options"]) == (tiny_matcher.manifest.build_key, {"subsample": 16, "border": 2})


def test_a_bundle_warns_once_of_images_that_it_crops(tiny_matcher: smc.Matcher) -> None:
    matcher = BundleMatcher(tiny_matcher)
    wide = np.random.default_rng(0).integers(0, 256, (96, 400, 3), np.uint8)
    with pytest.warns(UserWarning, match="keep only .* of a 400x96 image; .*the first of such images"):
        matcher.match(wide, wide)
    matcher.match(wide, wide)
