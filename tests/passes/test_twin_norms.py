from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.base import Declined
from smc.passes.batch_twins import BatchTwins
from smc.passes.common_subexpressions import CommonSubexpressions
from smc.passes.twin_norms import TwinNorms
from tests.passes.graphs import Builder, apply, assert_same, count, normal, weights

N, C, K = 5, 8, 6
SCALE, BIAS = 1 + weights(C, seed=1), weights(C, seed=2)
FEED = {"x": normal(3, N, C)}


def norm(b: Builder, *parameters: np.ndarray, **attrs: object) -> str:
    x = b.input("x", ["batch", N, C])
    return b.op("LayerNormalization", x, *(parameters or (SCALE, BIAS)), name="norm", **{"axis": -1, "epsilon": 1e-6, **attrs})


def linear(b: Builder, y: str, seed: int = 3) -> str:
    return b.op("Add", b.op("MatMul", y, weights(C, K, seed=seed)), weights(K, seed=seed))


def read_by(reader: Callable[[Builder, str], str]) -> onnx.ModelProto:
    b = Builder()
    b.output(reader(b, norm(b)))
    return b.model()


READERS: dict[str, Callable[[Builder, str], str]] = {
    "a linear layer": linear,
    "the bias first": lambda b, y: b.op("Add", weights(K), b.op("MatMul", y, weights(C, K))),
    "several linear layers": lambda b, y: b.op("Mul", linear(b, y), linear(b, y, 4)),
    "no bias": lambda b, y: b.op("MatMul", y, weights(C, K)),
    "no bias, read twice": lambda b, y: (lambda z: b.op("Add", z, b.op("Relu", z)))(b.op("MatMul", y, weights(C, K))),
    "no bias, added to itself": lambda b, y: (lambda z: b.op("Add", z, z))(b.op("MatMul", y, weights(C, K))),
    "a residual sum": lambda b, y: b.op("Add", b.op("MatMul", y, weights(C, C)), "x"),
    "a bias of another shape": lambda b, y: b.op("Add", b.op("MatMul", y, weights(C, K)), weights(N, 1)),
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
def test_scale_and_bias_move_into_the_products(reader: Callable[[Builder, str], str]) -> None:
    model = read_by(reader)
    graph, report = apply(model, TwinNorms())
    assert (report.rewrites, report.declined) == (1, [])
    assert (the_norm(graph).inputs[1].values == 1).all()
    assert len(the_norm(graph).inputs) == 2
    assert_same(model, graph, FEED)


def the_norm(graph: gs.Graph) -> gs.Node:
    (node,) = [node for node in graph.nodes if node.op == "LayerNormalization"]
    return node


def test_no_node_is_added_where_there_is_a_bias() -> None:
    graph, _ = apply(read_by(linear), TwinNorms())
    assert [node.op for node in graph.nodes] == ["LayerNormalization", "MatMul", "Add"]


@pytest.mark.parametrize("parameters", [(SCALE,), (np.ones(C, np.float32), BIAS), (SCALE, np.zeros(C, np.float32))])
def test_without_a_scale_or_a_bias(parameters: tuple[np.ndarray, ...]) -> None:
    b = Builder()
    b.output(b.op("MatMul", norm(b, *parameters), weights(C, K)))
    model = b.model()
    graph, report = apply(model, TwinNorms())
    assert report.rewrites == 1
    assert count(graph)["Add"] == sum(parameter is BIAS for parameter in parameters)
    assert_same(model, graph, FEED)


def test_a_second_run_and_a_norm_with_neither_change_nothing() -> None:
    graph, _ = apply(read_by(linear), TwinNorms())
    report = TwinNorms()(graph)
    assert (report.rewrites, report.declined) == (0, [])


def test_weights_that_others_read_keep_their_values() -> None:
    b = Builder()
    y = norm(b)
    weight = b.constant(weights(C, K))
    b.output(b.op("Add", b.op("MatMul", y, weight), b.op("MatMul", "x", weight)))
    model = b.model()
    before = model.SerializeToString()
    graph, report = apply(model, TwinNorms())
    assert report.rewrites == 1
    assert model.SerializeToString() == before
    assert_same(model, graph, FEED)


def as_output(b: Builder, y: str) -> str:
    b.output(y)
    return linear(b, y)


MISSES: dict[str, tuple[Callable[[Builder, str], str], str]] = {
    "read by something else as well": (
        lambda b, y: b.op("Mul", b.op("MatMul", y, weights(C, C)), b.op("Exp", y, name="exp")),
        "exp (Exp) reads it, which is not a product with weights on the right",
    ),
    "on the right": (lambda b, y: b.op("MatMul", weights(K, N), y, name="left"), "left (MatMul) reads it"),
    "weights that are computed": (
        lambda b, y: b.op("MatMul", y, b.op("Exp", weights(C, K)), name="computed"),
        "computed multiplies by exp_4_out0, which is not a constant matrix",
    ),
    "weights for each sample": (lambda b, y: b.op("MatMul", y, weights(1, C, K), name="batched"), "batched multiplies by constant_"),
    "an output": (as_output, "norm_out0 is an output of the graph"),
}


@pytest.mark.parametrize(("reader", "why"), MISSES.values(), ids=MISSES.keys())
def test_other_readers_stop_it(reader: Callable[[Builder, str], str], why: str) -> None:
    assert_declined(read_by(reader), why)


def assert_declined(model: onnx.ModelProto, why: str) -> None:
    graph, report = apply(model, TwinNorms())
    (declined,) = report.declined
    assert isinstance(declined, Declined)
    assert declined.node == "norm"
    assert why in declined.why
    assert report.rewrites == 0
    assert len(the_norm(graph).inputs) == 3
    assert_same(model, graph, FEED, tolerance=0)


def test_norms_over_several_axes_and_with_statistics_stay() -> None:
    b = Builder()
    b.output(linear(b, norm(b, weights(N, C), weights(N, C), axis=1)))
    assert_declined(b.model(), "not a constant vector")

    b = Builder()
    y, mean = b.op("LayerNormalization", b.input("x", ["batch", N, C]), SCALE, BIAS, name="norm", axis=-1, outputs=2)
    b.output(b.op("Add", linear(b, y), mean))
    assert_declined(b.model(), "its statistics are read")


def test_norms_of_one_tensor_become_one_and_twins_equal() -> None:
    b = Builder()
    for view in (1, 2):
        x = b.input(f"x{view}", ["batch", N, C])
        y, z = (b.op("LayerNormalization", x, 1 + weights(C, seed=view + i), weights(C, seed=view + i)) for i in (10, 20))
        b.op("Mul", linear(b, y, view), linear(b, z, 30 + view))
        b.nodes[-1].output[0] = f"out{view}"
        b.output(f"out{view}")
    model = b.model()
    graph, report = apply(model, TwinNorms(), CommonSubexpressions(), BatchTwins())
    assert report.declined == []
    assert count(graph)["LayerNormalization"] == 1
    assert count(graph)["Mul"] == 1
    assert_same(model, graph, {"x1": normal(2, N, C), "x2": normal(2, N, C, 1)[..., 0]})
