from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from typing import Any
from unittest.mock import Mock

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.compiler import calibration
from smc.compiler.calibration import find_dominant, plan_precision, relative_error
from smc.compiler.graph_runner import GraphRunner
from smc.passes.hybrid_cast import HybridCast, TensorRange
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, normal, weights


def chain(large: float = 1.0, bad: int | None = None) -> onnx.ModelProto:
    """Ten products with a tanh each, the last one scaled by `large`; `bad` adds 1000 and takes it away, which costs ten bits."""
    b = Builder()
    x = b.input("x", ["n", 32])
    for i in range(10):
        x = b.op("Tanh", b.op("MatMul", x, weights(32, 32, seed=i), name=f"product{i}"), name=f"tanh{i}")
        if i == bad:
            x = b.op("Sub", b.op("Add", x, np.float32(1000), name="up"), np.float32(1000), name="down")
    b.output(b.op("Mul", x, np.float32(large), name="scaled"))
    return b.model()


def dominant(graph: gs.Graph, feed: dict[str, np.ndarray], **options: Any) -> dict[str, str]:
    reference = GraphRunner(graph).run(feed)
    return find_dominant(graph, lambda keep: HybridCast("hybrid", keep=keep), feed, reference, **options)


def ranges_of(graph: gs.Graph, feeds: list[dict[str, np.ndarray]]) -> Mapping[str, TensorRange]:
    return plan_precision(graph, "hybrid", feeds, lambda what: None).ranges


def test_ranges_of_what_is_computed() -> None:
    b = Builder()
    x = b.input("x", ["n", 512])
    moved = b.op("Transpose", b.op("Mul", x, np.float32(-3), name="scaled"), perm=[1, 0], name="moved")
    b.output(b.op("Mul", b.op("Relu", moved, name="positive"), np.float32(1e-5), name="small"))
    graph = prepare(b.model())
    before = gs.export_onnx(graph).SerializeToString()
    feeds = [{"x": normal(n, 512)} for n in (300, 400)]
    ranges = ranges_of(graph, feeds)
    assert gs.export_onnx(graph).SerializeToString() == before
    assert set(ranges) == {"x", "scaled_out0", "positive_out0", "small_out0"}, "and not what is only moved"
    largest, smallest = (max(f(feed["x"]) for feed in feeds) for f in (np.max, lambda x: -np.min(x)))
    assert ranges["x"].amax == pytest.approx(max(largest, smallest))
    assert ranges["scaled_out0"].amax == pytest.approx(3 * max(largest, smallest))
    assert ranges["positive_out0"].amax == pytest.approx(3 * smallest)
    # Of the values that are not zero, those below 2^-14 are where |x| < 6.1 / 3: 95.8 % of a normal distribution.
    assert ranges["small_out0"].subnormal == pytest.approx(0.958, abs=0.02)
    assert ranges["scaled_out0"].subnormal == 0
    assert all(found.finite for found in ranges.values())


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_value_that_is_not_finite(bad: float) -> None:
    b = Builder()
    b.output(b.op("Neg", b.input("x", ["n"])))
    values = normal(1000)
    values[501] = bad
    assert ranges_of(prepare(b.model()), [{"x": normal(10)}, {"x": values}])["x"].finite is False


def test_float32_is_not_searched_where_low_precision_is_good_enough() -> None:
    assert dominant(prepare(chain()), {"x": normal(8, 32)}) == {}


def test_the_node_that_moves_the_output_most_is_found() -> None:
    graph = prepare(chain(bad=4))
    feed = {"x": normal(8, 32)}
    keep = dominant(graph, feed)
    assert {"up"} <= set(keep) <= {"up", "down"}
    assert all("moves scaled_out0 by" in reason for reason in keep.values())
    reference = GraphRunner(graph).run(feed)["scaled_out0"]
    errors = []
    for kept in ({}, keep):
        typed = graph.copy()
        HybridCast("hybrid", keep=kept)(typed)
        errors.append(relative_error(reference, GraphRunner(typed).run(feed)["scaled_out0"]))
    assert errors[0] > 0.1
    assert errors[1] < 5e-3


def test_an_error_that_is_spread_is_left() -> None:
    assert dominant(prepare(chain()), {"x": normal(8, 32)}, tolerance=1e-5) == {}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts the runs of the search."""
    runner = Mock(wraps=GraphRunner)
    monkeypatch.setattr(calibration, "GraphRunner", runner)
    return runner


@pytest.mark.parametrize("runs", range(8))
def test_what_the_runs_do_not_allow_to_narrow_down_is_kept_whole(counted: Mock, runs: int) -> None:
    keep = dominant(prepare(chain(bad=2)), {"x": normal(8, 32)}, runs=runs)
    assert counted.call_count <= runs
    assert ("up" in keep) == (runs >= 3)
    largest = {3: 12, 4: 12, 5: 6, 6: 6, 7: 3}  # of 23 nodes: every two runs halve what is kept
    assert len(keep) <= largest.get(runs, 0)


def test_the_search_is_the_same_on_a_slow_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    feed = {"x": normal(8, 32)}
    wanted = dominant(prepare(chain(bad=2)), feed)
    for clock in ("monotonic", "perf_counter", "time", "process_time"):
        monkeypatch.setattr(time, clock, itertools.count(step=1e6).__next__)
    assert dominant(prepare(chain(bad=2)), feed) == wanted != {}


def test_the_plan_for_a_build() -> None:
    graph = prepare(chain(large=2e5))
    feeds = [{"x": normal(8, 32)}, {"x": normal(9, 32)}]
    said: list[str] = []
    plan = plan_precision(graph, "hybrid", feeds, said.append, include=["scaled"], exclude=["product3", "not here"])
    assert len(said) == 2
    assert plan.ranges["scaled_out0"].amax > 65504
    assert (plan.include, plan.exclude) == (["scaled"], ["product3"]), "what matches nothing here may match in the other graph"
    plan = plan_precision(graph, "hybrid", feeds, said.append)
    typed = graph.copy()
    assert [island.node for island in plan(typed).islands] == ["scaled"]
    assert np.isfinite(GraphRunner(typed).run(feeds[0])["scaled_out0"]).all()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_other_precisions_need_no_calibration(precision: Any) -> None:
    plan = plan_precision(prepare(chain()), precision, [], lambda what: pytest.fail(what))
    assert (plan.precision, plan.ranges, plan.keep) == (precision, {}, {})


def test_relative_error() -> None:
    wanted = np.array([3.0, 4.0], dtype=np.float32)
    assert relative_error(wanted, np.array([3.0, 4.5], dtype=np.float32)) == pytest.approx(0.1)
    assert relative_error(wanted, np.array([3.0, np.inf], dtype=np.float32)) == math.inf
    assert TensorRange(1.0).finite
