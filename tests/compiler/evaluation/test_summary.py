"""Two runs compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from smc.compiler.evaluation.records import SCHEMA, Config, DataConfig, Estimate, Header, PairResult
from smc.compiler.evaluation.results import open_results
from smc.compiler.evaluation.summary import RESAMPLES, compare
from smc.compiler.evaluation.tables import comparison_tables
from smc.exported.errors import UsageError

DATA = DataConfig("planted", "pose", 100, "digest", "own size")


def write(path: Path, errors: list[float | None], names: list[str] | None = None, precision: float = 0.5, **config: Any) -> Path:
    made = Config({"matcher": path.name}, [DATA], None, 0, 1, 1000, 1.0, 3.0, "poselib 2")
    header = Header(SCHEMA, msgspec.structs.replace(made, **config), "2026-01-01", {}, {})
    with open_results(path, header) as file:
        for name, error in zip(names or [f"pair {i}" for i in range(len(errors))], errors, strict=True):
            file.add(PairResult("planted", name, 100, [Estimate(50, error, error, error)], {"1 px": precision}, {"match": 0.1}))
    return path


def test_a_run_does_not_differ_from_itself(tmp_path: Path) -> None:
    errors = np.random.default_rng(0).uniform(0, 30, 40).tolist()
    (found,) = compare(write(tmp_path / "a", errors), write(tmp_path / "b", errors))
    assert (found.pairs, found.only_first, found.only_second) == (40, 0, 0)
    for figure in found.figures.values():
        assert (figure.difference, figure.low, figure.high) == (0, 0, 0)


def test_interval_of_a_mean_is_the_one_of_the_normal_distribution(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    # Precision is a mean of pairs: of n values of spread s its difference is within 1.96 s / sqrt(n).
    first, second = tmp_path / "a", tmp_path / "b"
    values = random.normal(0.5, 0.1, 400)
    for path, precisions in ((first, np.full(400, 0.5)), (second, values)):
        write(path, [])
        with open_results(
            path, Header(SCHEMA, Config({"matcher": path.name}, [DATA], None, 0, 1, 1000, 1.0, 3.0, "poselib 2"), "", {}, {})
        ) as file:
            for i, precision in enumerate(precisions):
                file.add(PairResult("planted", str(i), 1, [Estimate(1, 1.0, 1.0, 1.0)], {"1 px": float(precision)}, {}))
    (found,) = compare(first, second)
    figure = found.figures["precision@1 px"]
    half = 1.96 * values.std() / 20
    assert figure.difference == pytest.approx(values.mean() - 0.5)
    assert figure.low == pytest.approx(figure.difference - half, abs=0.05 * half)
    assert figure.high == pytest.approx(figure.difference + half, abs=0.05 * half)


def test_pairs_count_together_so_that_a_small_common_shift_shows(tmp_path: Path) -> None:
    errors = np.random.default_rng(0).uniform(0.5, 30, 300)
    (found,) = compare(write(tmp_path / "a", errors.tolist()), write(tmp_path / "b", (errors - 0.4).tolist()))
    figure = found.figures["AUC@20°"]
    assert 0 < figure.low < figure.difference < figure.high
    # Drawn apart, the interval of 300 pairs would be ten times as wide.
    assert figure.high - figure.low < 0.02


def test_only_pairs_of_both_runs_count(tmp_path: Path) -> None:
    first = write(tmp_path / "a", [1.0, 2.0, None], ["x", "y", "z"])
    second = write(tmp_path / "b", [2.0, None, 1.0], ["y", "z", "w"], limit=3)
    (found,) = compare(first, second)
    assert (found.pairs, found.only_first, found.only_second) == (2, 1, 1)
    assert found.figures["AUC@5°"].difference == 0
    (table,) = comparison_tables([found])
    assert "2 that only one run has are left out" in str(table.title)


def test_the_seed_decides_the_resamples(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    paths = [write(tmp_path / name, random.uniform(0, 20, 30).tolist()) for name in "ab"]
    first, again, other = (compare(*paths, seed)[0].figures["AUC@10°"] for seed in (0, 0, 1))
    assert first == again
    assert (first.low, first.high) != (other.low, other.high)
    assert RESAMPLES >= 10_000  # of fewer, the ends of an interval still move


def test_runs_on_data_that_another_torch_rendered_are_compared(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, [1.0, 2.0], data=[msgspec.structs.replace(DATA, origin=f"rendered by torch {name}")]) for name in "ab"]
    (found,) = compare(*paths)
    assert found.pairs == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pose_threshold": 2.0}, "pose_threshold is 1.0 there, 2.0 here"),
        ({"seed": 3}, "seed"),
        ({"data": [msgspec.structs.replace(DATA, digest="other")]}, "digest"),
        ({"data": [msgspec.structs.replace(DATA, kind="other")]}, "no pairs in common"),
    ],
)
def test_runs_that_cannot_be_compared(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    first, second = write(tmp_path / "a", [1.0]), write(tmp_path / "b", [1.0], **config)
    with pytest.raises(UsageError, match=message):
        compare(first, second)
