"""Figures from errors, by hand and against the plain loop."""

from __future__ import annotations

import numpy as np
import pytest

from smc.compiler.evaluation.metrics import accuracy, auc, columns_of, figures
from smc.compiler.evaluation.records import Estimate, PairResult


def area_by_hand(errors: list[float], threshold: float) -> float:
    """Recall over error, one trapezoid after the other."""
    area, x, y = 0.0, 0.0, 0.0
    for place, error in enumerate(sorted(errors), start=1):
        if error >= threshold:
            break
        recall = place / len(errors)
        area += (error - x) * (y + recall) / 2
        x, y = error, recall
    return (area + (threshold - x) * y) / threshold


def test_two_errors_by_hand() -> None:
    # Recall rises to 1/2 at 2, to 1 at 4, and stays there up to 10: 0.5 + 1.5 + 6 = 8 of 10.
    assert auc(np.array([4.0, 2.0]), [10])[0] == pytest.approx(0.8)
    # Up to 3 only the first is counted, flat after it: 0.5 + 0.5 = 1 of 3.
    assert auc(np.array([4.0, 2.0]), [3])[0] == pytest.approx(1 / 3)


@pytest.mark.parametrize("errors", [[np.inf], [np.inf, np.inf], [7.0], [180.0, np.inf]])
def test_nothing_below_the_threshold_is_zero(errors: list[float]) -> None:
    assert auc(np.array(errors), [5])[0] == 0


def test_a_pair_without_an_estimate_counts_as_one_that_failed() -> None:
    assert auc(np.array([0.0, np.inf]), [5])[0] == pytest.approx(0.5)
    assert accuracy(np.array([0.0, np.inf]), 5) == 0.5


def test_areas_of_many_resamples_at_once_are_those_of_each() -> None:
    random = np.random.default_rng(1)
    errors = random.choice([0, 0.5, 1, 1, 3, 4.99, 5, 5.01, 12, np.inf], (50, 23))  # with ties
    for threshold, areas in zip((1, 5, 20), auc(errors, (1, 5, 20)), strict=True):
        np.testing.assert_allclose(areas, [area_by_hand(list(row), threshold) for row in errors], atol=1e-12)


def test_figures_of_poses_by_hand() -> None:
    rows = [row("a", 0.5, 100, 0.5), row("b", 3.5, 50, 1.0), row("c", None, 0, 0.0)]
    found = figures("pose", columns_of(rows))
    # Below 1, 2 and 3 degrees one of three, from 4 on two of three.
    assert found["mAA"] == pytest.approx((3 * 1 + 7 * 2) / 30)
    assert found["AUC@5°"] == pytest.approx(area_by_hand([0.5, 3.5, np.inf], 5))
    assert found["mean AUC"] == pytest.approx(np.mean([found[f"AUC@{n}°"] for n in (5, 10, 20)]))
    assert found["precision@1 px"] == pytest.approx(0.5)
    assert found["matches"] == 50


def test_figures_of_homographies_by_hand() -> None:
    found = figures("homography", columns_of([row("a", 0.9, 10, 1.0), row("b", 4.0, 10, 1.0)]))
    assert [found[f"accuracy@{n} px"] for n in (1, 3, 5, 10)] == [0.5, 0.5, 1, 1]
    assert found["AUC@10 px"] == pytest.approx(area_by_hand([0.9, 4.0], 10))
    assert "mAA" not in found


def test_figures_of_draws_are_means_of_what_each_gives() -> None:
    draws = [[0.5, 4.0], [3.5, None], [30.0, 2.0]]
    found = figures("pose", columns_of([row(str(i), list(errors), 10, 1.0) for i, errors in enumerate(draws)]))
    single = [figures("pose", columns_of([row(str(i), errors[draw], 10, 1.0) for i, errors in enumerate(draws)])) for draw in (0, 1)]
    assert single[0]["AUC@5°"] != single[1]["AUC@5°"]
    for name, value in found.items():
        assert value == pytest.approx((single[0][name] + single[1][name]) / 2)


def row(name: str, error: float | list[float | None] | None, matches: int, precision: float) -> PairResult:
    errors = error if isinstance(error, list) else [error]
    return PairResult("planted", name, matches, [Estimate(0, each) for each in errors], {"1 px": precision}, {"match": 0.1})
