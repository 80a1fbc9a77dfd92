"""Reciprocal matching: the original's results, and what must hold for any descriptors."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from smc.exported import matching
from smc.exported.errors import BadInput
from smc.exported.matching import fast_reciprocal_nn, nearest_neighbours, reciprocal_nn_both_ways
from tests.conformance import load_case

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Machines may be slow."""

CASES = ["fastnn_48x64", "fastnn_40x72_noisy"]

Case = dict[str, np.ndarray]
Maps = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return load_case(request.param)


def random_map(seed: int, height: int, width: int, dim: int = 24) -> NDArray[np.float32]:
    """Unit descriptors."""
    desc = np.random.RandomState(seed).standard_normal((height, width, dim)).astype(np.float32)
    return desc / np.linalg.norm(desc, axis=2, keepdims=True)


# --- the original's results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_grid_matches_the_original(case: Case, step: int) -> None:
    xy1, xy2 = fast_reciprocal_nn(case["desc1"], case["desc2"], subsample=step)
    np.testing.assert_array_equal(xy1, case[f"xy1_s{step}"])
    np.testing.assert_array_equal(xy2, case[f"xy2_s{step}"])
    assert xy1.dtype == xy2.dtype == np.int64


@pytest.mark.parametrize("form", ["default grid", "pair of arrays", "one array"])
@pytest.mark.parametrize("tolerance", [3, 5])
def test_pixel_tolerance_matches_the_original(case: Case, tolerance: int, form: str) -> None:
    height, width = case["desc1"].shape[:2]
    y, x = np.mgrid[4:height:8, 4:width:8]
    start: Any = {"default grid": None, "pair of arrays": (x, y), "one array": np.stack([x.ravel(), y.ravel()], axis=1)}[form]
    xy1, xy2 = fast_reciprocal_nn(case["desc1"], case["desc2"], pixel_tol=tolerance, start_xy=start)
    np.testing.assert_array_equal(xy1, case[f"xy1_tol{tolerance}"])
    np.testing.assert_array_equal(xy2, case[f"xy2_tol{tolerance}"])


def test_nearest_neighbours_match_the_original(case: Case) -> None:
    points1, points2 = (case[name].reshape(-1, 24) for name in ("desc1", "desc2"))
    np.testing.assert_array_equal(nearest_neighbours(points1, points2), case["nn_1to2"])
    np.testing.assert_array_equal(nearest_neighbours(points2, points1), case["nn_2to1"])


def test_both_ways_match_the_original(case: Case) -> None:
    xy1, xy2, confidence = reciprocal_nn_both_ways(case["desc1"], case["desc2"], case["conf1"], case["conf2"], subsample=4)
    np.testing.assert_array_equal(xy1, case["sym_xy1"])
    np.testing.assert_array_equal(xy2, case["sym_xy2"])
    np.testing.assert_array_equal(confidence, case["sym_conf"])
    assert confidence.dtype == np.float32


# --- nearest neighbours ------------------------------------------------------------------------------------------------------


@FUZZ
@given(seed=st.integers(0, 2**31), queries=st.integers(0, 40), points=st.integers(1, 200), dim=st.integers(1, 24))
def test_nearest_neighbour_has_the_largest_score(seed: int, queries: int, points: int, dim: int) -> None:
    asked, given_points = random_map(seed, queries, 1, dim)[:, 0], random_map(seed + 1, points, 1, dim)[:, 0]
    found = nearest_neighbours(asked, given_points)
    scores = asked.astype(np.float64) @ given_points.T.astype(np.float64)
    assert found.shape == (queries,)
    assert found.dtype == np.int64
    np.testing.assert_allclose(scores[np.arange(queries), found], scores.max(axis=1), atol=1e-6)


@FUZZ
@given(seed=st.integers(0, 2**31), queries=st.integers(1, 40), points=st.integers(1, 200))
def test_of_equal_scores_the_first_wins(seed: int, queries: int, points: int) -> None:
    random = np.random.RandomState(seed)
    # Small whole numbers: float32 is exact on them, and equal scores are common.
    asked, given_points = (random.randint(-2, 3, (count, 4)).astype(np.float32) for count in (queries, points))
    wanted = (asked.astype(np.int64) @ given_points.T.astype(np.int64)).argmax(axis=1)
    np.testing.assert_array_equal(nearest_neighbours(asked, given_points), wanted)


@pytest.mark.parametrize("score_bytes", [1, 4 * 3072 * 7, 4 * 3072 * 3071, 1 << 40])
def test_size_of_the_blocks_changes_nothing(case: Case, score_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matching, "SCORE_BYTES", score_bytes)
    points1, points2 = (case[name].reshape(-1, 24) for name in ("desc1", "desc2"))
    np.testing.assert_array_equal(nearest_neighbours(points1, points2), case["nn_1to2"])
    xy1, xy2 = fast_reciprocal_nn(case["desc1"], case["desc2"])
    np.testing.assert_array_equal(np.hstack([xy1, xy2]), np.hstack([case["xy1_s8"], case["xy2_s8"]]))


def test_memory_is_that_of_one_block_beside_the_maps() -> None:
    desc1, desc2 = random_map(0, 384, 512), random_map(1, 384, 512)
    tracemalloc.start()
    try:
        fast_reciprocal_nn(desc1, desc2, subsample=32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < matching.SCORE_BYTES + desc1.nbytes + desc2.nbytes + (4 << 20)
    assert peak < 4 * 384 * 512 * 192 / 2, "half of all scores at once"


# --- reciprocal matches ------------------------------------------------------------------------------------------------------


@st.composite
def map_pairs(draw: st.DrawFn) -> Maps:
    """Two maps of any sizes, the second sharing some of the first's descriptors."""
    seed = draw(st.integers(0, 2**31))
    shapes = [(draw(st.integers(1, 20)), draw(st.integers(1, 20))) for _ in range(2)]
    desc1, desc2 = (random_map(seed + i, *shape, dim=8) for i, shape in enumerate(shapes))
    count = min(desc1[..., 0].size, desc2[..., 0].size) // 2
    desc2.reshape(-1, 8)[:count] = desc1.reshape(-1, 8)[:count]
    return desc1, desc2


def check_pairs(xy1: NDArray[np.int64], xy2: NDArray[np.int64], desc1: NDArray[Any], desc2: NDArray[Any]) -> None:
    """Inside both maps, unique, and sorted by row-major position in the first, then in the second."""
    assert xy1.shape == xy2.shape == (len(xy1), 2)
    assert xy1.dtype == xy2.dtype == np.int64
    for xy, desc in ((xy1, desc1), (xy2, desc2)):
        assert (xy >= 0).all()
        assert (xy < desc.shape[1::-1]).all()
    keys = list(zip(xy1[:, 1].tolist(), xy1[:, 0].tolist(), xy2[:, 1].tolist(), xy2[:, 0].tolist(), strict=True))
    assert keys == sorted(set(keys))


@FUZZ
@given(maps=map_pairs(), step=st.integers(1, 9))
def test_every_match_is_mutual(maps: Maps, step: int) -> None:
    desc1, desc2 = maps
    xy1, xy2 = fast_reciprocal_nn(desc1, desc2, step)
    check_pairs(xy1, xy2, desc1, desc2)
    chosen1, chosen2 = desc1[xy1[:, 1], xy1[:, 0]], desc2[xy2[:, 1], xy2[:, 0]]
    own = np.sum(chosen1.astype(np.float64) * chosen2, axis=1)
    for chosen, others in ((chosen1, desc2), (chosen2, desc1)):
        scores = chosen.astype(np.float64) @ others.reshape(-1, 8).T.astype(np.float64)
        if len(scores):
            np.testing.assert_allclose(own, scores.max(axis=1), atol=1e-6)


@FUZZ
@given(maps=map_pairs(), step=st.integers(1, 9), tolerance=st.floats(0.1, 30))
def test_with_a_tolerancestarting_points_stay_in_place(maps: Maps, step: int, tolerance: float) -> None:
    desc1, desc2 = maps
    xy1, xy2 = fast_reciprocal_nn(desc1, desc2, step, pixel_tol=tolerance)
    check_pairs(xy1, xy2, desc1, desc2)
    assert (xy1 % step == step // 2).all()
    back = nearest_neighbours(desc2[xy2[:, 1], xy2[:, 0]], desc1.reshape(-1, 8))
    returned = np.stack([back % desc1.shape[1], back // desc1.shape[1]], axis=1)
    assert (np.hypot(*(returned - xy1).T) < tolerance).all()


@FUZZ
@given(maps=map_pairs(), step=st.integers(1, 9))
def test_both_ways_are_the_union_of_either_way(maps: Maps, step: int) -> None:
    desc1, desc2 = maps
    conf1, conf2 = desc1[..., 0], desc2[..., 1]
    xy1, xy2, confidence = reciprocal_nn_both_ways(desc1, desc2, conf1, conf2, step)
    check_pairs(xy1, xy2, desc1, desc2)
    forth, back = fast_reciprocal_nn(desc1, desc2, step), fast_reciprocal_nn(desc2, desc1, step)[::-1]
    wanted = {tuple(row) for one, two in (forth, back) for row in np.hstack([one, two]).tolist()}
    assert {tuple(row) for row in np.hstack([xy1, xy2]).tolist()} == wanted
    np.testing.assert_array_equal(confidence, np.minimum(conf1[xy1[:, 1], xy1[:, 0]], conf2[xy2[:, 1], xy2[:, 0]]))


def test_a_map_matches_itself_pixel_by_pixel() -> None:
    desc = random_map(0, 24, 40)
    xy1, xy2 = fast_reciprocal_nn(desc, desc, subsample=1)
    assert len(xy1) == 24 * 40
    np.testing.assert_array_equal(xy1, xy2)


def test_constant_descriptors_match_at_the_first_pixel_only() -> None:
    desc = np.ones((10, 12, 4), np.float32)
    xy1, xy2 = fast_reciprocal_nn(desc, desc)
    assert xy1.tolist() == xy2.tolist() == [[0, 0]]


def test_givenstarting_points_make_one_round_trip() -> None:
    desc = random_map(0, 6, 8)
    start = np.array([[7, 5], [0, 0], [3, 2], [3, 2]])
    xy1, xy2 = fast_reciprocal_nn(desc, desc, start_xy=start)
    assert xy1.tolist() == xy2.tolist() == [[0, 0], [3, 2], [7, 5]]


def test_a_walk_that_does_not_close_in_time_gives_no_match() -> None:
    """Points of both images in turn along an arc, ever closer: each one's nearest neighbour is the next, to the end."""
    angles = np.cumsum(0.15 * 0.93 ** np.arange(60))
    points = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    desc1, desc2 = points[None, ::2], points[None, 1::2]
    xy1, xy2 = fast_reciprocal_nn(desc1, desc2, subsample=1)
    assert xy1.tolist() == xy2.tolist() == [[29, 0]], "from the last ten or so; the others are still on their way"
    assert [len(xy) for xy in fast_reciprocal_nn(desc1, desc2, start_xy=np.array([[5, 0]]))] == [0, 0]


def test_the_tolerance_itself_is_too_far() -> None:
    desc1 = np.zeros((5, 4, 1), np.float32)
    desc1[4, 3] = 1  # where every walk comes back to: 5 pixels from the first pixel
    start = np.array([[0, 0]])
    for tolerance, count in ((5, 0), (5.001, 1)):
        xy1, xy2 = fast_reciprocal_nn(desc1, desc1[4:, 3:], pixel_tol=tolerance, start_xy=start)
        assert len(xy1) == len(xy2) == count


@pytest.mark.parametrize("options", [{"subsample": 1000}, {"start_xy": np.empty((0, 2), np.int64)}, {"subsample": 1000, "pixel_tol": 3}])
def test_no_matches_have_their_shape(options: dict[str, Any]) -> None:
    desc = random_map(0, 6, 8)
    for xy in fast_reciprocal_nn(desc, desc, **options):
        assert xy.shape == (0, 2)
        assert xy.dtype == np.int64


def test_no_matches_both_ways_have_their_shape() -> None:
    desc = random_map(0, 6, 8)
    xy1, xy2, confidence = reciprocal_nn_both_ways(desc, desc, desc[..., 0], desc[..., 1], 1000)
    assert (xy1.shape, xy2.shape, confidence.shape) == ((0, 2), (0, 2), (0,))


@pytest.mark.parametrize("change", [np.asfortranarray, lambda desc: desc.astype(np.float64), lambda desc: desc[::-1][::-1]])
def test_other_layouts_and_types_of_the_same_descriptors(case: Case, change: Any) -> None:
    xy1, xy2 = fast_reciprocal_nn(change(case["desc1"]), change(case["desc2"]))
    np.testing.assert_array_equal(np.hstack([xy1, xy2]), np.hstack([case["xy1_s8"], case["xy2_s8"]]))


DESC = np.ones((4, 5, 3), np.float32)


@pytest.mark.parametrize(
    ("desc1", "desc2", "options", "message"),
    [
        (DESC[0], DESC, {}, r"\(H, W, D\)"),
        (DESC, DESC[None], {}, r"\(H, W, D\)"),
        (DESC[:0], DESC, {}, r"\(H, W, D\)"),
        (DESC, DESC[:, :0], {}, r"\(H, W, D\)"),
        (DESC, DESC[..., :2], {}, "differ: 3 and 2"),
        (DESC, DESC, {"subsample": 0}, "1 or more"),
        (DESC, DESC, {"subsample": -8}, "1 or more"),
        (DESC, DESC, {"subsample": 2.5}, "whole number"),
        (DESC, DESC, {"pixel_tol": -1}, "0 or more"),
        (DESC, DESC, {"pixel_tol": float("nan")}, "0 or more"),
        (DESC, DESC, {"start_xy": np.array([[5, 0]])}, "outside the 5x4"),
        (DESC, DESC, {"start_xy": np.array([[0, 4]])}, "outside the 5x4"),
        (DESC, DESC, {"start_xy": np.array([[-1, 0]])}, "outside the 5x4"),
        (DESC, DESC, {"start_xy": np.array([[0.5, 0]])}, "integers"),
        (DESC, DESC, {"start_xy": np.array([1, 2])}, "integers"),
        (DESC, DESC, {"start_xy": np.array([[1, 2, 3]])}, "integers"),
        (DESC, DESC, {"start_xy": (np.array([1, 2]), np.array([1]))}, "as many x as y"),
        (DESC, DESC, {"start_xy": (np.array([1, 2]),)}, "as many x as y"),
    ],
)
def test_bad_arguments_are_refused(desc1: NDArray[Any], desc2: NDArray[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fast_reciprocal_nn(desc1, desc2, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_descriptor_that_is_not_finite_is_refused(bad: float) -> None:
    maps = [np.random.default_rng(seed).standard_normal((6, 8, 24)).astype(np.float32) for seed in (1, 2)]
    for damaged in range(2):
        copies = [m.copy() for m in maps]
        copies[damaged][3, 4, 5] = bad
        with pytest.raises(BadInput, match="NaN or infinite"):
            fast_reciprocal_nn(*copies)
