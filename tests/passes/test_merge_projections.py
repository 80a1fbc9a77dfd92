from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest

from smc.passes.merge_projections import MergeProjections
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal, weights

SIZE = 8


def linear(b: Builder, x: str, width: int, name: str, bias_first: bool = False) -> str:
    product = b.op("MatMul", x, weights(SIZE, width, seed=len(name)), name=name)
    bias = weights(width, seed=len(name))
    return b.op("Add", bias, product) if bias_first else b.op("Add", product, bias)


def projections(widths: Sequence[int], bias_first: bool = False) -> onnx.ModelProto:
    b = Builder()
    x = b.input("x", ["batch", "n", SIZE])
    parts = [linear(b, x, width, "k" * (i + 1), bias_first) for i, width in enumerate(widths)]
    b.output(b.op("Concat", *(b.op("Relu", part) for part in reversed(parts)), axis=-1))
    return b.model()


@pytest.mark.parametrize("bias_first", [False, True])
@pytest.mark.parametrize("widths", [(8, 8), (8, 8, 8), (4, 12)])
def test_layers_of_one_input_become_one(widths: tuple[int, ...], bias_first: bool) -> None:
    model = projections(widths, bias_first)
    graph, report = apply(model, MergeProjections())
    assert (report.rewrites, report.declined) == (len(widths), [])
    counts = count(graph)
    assert (counts["MatMul"], counts["Add"], counts["Split"]) == (1, 1, 1)
    product = next(node for node in graph.nodes if node.op == "MatMul")
    assert product.inputs[1].shape == (SIZE, sum(widths))
    assert list(product.outputs[0].shape) == ["batch", "n", sum(widths)]
    assert_same(model, graph, {"x": normal(2, 5, SIZE)}, {"x": normal(1, 3, SIZE)})


def test_layers_that_are_rotated_come_first() -> None:
    """v (8 channels, as they are), qk (16, half of them rotated) and k (8, all rotated) are merged as k, qk, v."""
    b = Builder()
    x = b.input("x", [2, 5, SIZE])
    tables = [np.cos(normal(2, 5, 4)), np.sin(normal(2, 5, 4))]

    def rotated(part: str) -> str:
        heads = b.op("Transpose", b.op("Reshape", part, np.array([2, 5, 1, 8])), perm=[0, 2, 1, 3])
        return b.op("RotaryEmbedding", heads, *tables)

    v, qk, k = linear(b, x, 8, "v"), linear(b, x, 16, "qk_"), linear(b, x, 8, "k")
    half = b.op("Slice", qk, np.array([0]), np.array([8]), np.array([2]))
    for part in (b.op("Relu", v), b.op("Relu", qk), rotated(half), rotated(k)):
        b.output(part)
    model = b.model()
    graph, report = apply(model, MergeProjections())
    assert report.rewrites == 3
    (split,) = (node for node in graph.nodes if node.op == "Split")
    assert [tensor.outputs[0].op for tensor in split.outputs] == ["Reshape", split.outputs[1].outputs[0].op, "Relu"]
    assert split.inputs[1].values.tolist() == [8, 16, 8]
    assert_same(model, graph, {"x": normal(2, 5, SIZE)})


def test_outputs_of_the_graph_keep_their_names() -> None:
    b = Builder()
    x = b.input("x", ["n", SIZE])
    for name in ("k", "kv"):
        b.output(linear(b, x, 4, name))
    model = b.model()
    graph, report = apply(model, MergeProjections())
    assert report.rewrites == 2
    assert count(graph) == {"MatMul": 1, "Add": 1, "Split": 1}
    assert_same(model, graph, {"x": normal(5, SIZE)})


def test_layers_of_different_inputs_stay() -> None:
    b = Builder()
    b.output(b.op("Add", linear(b, b.input("x", ["n", SIZE]), 4, "k"), linear(b, b.input("y", ["n", SIZE]), 4, "kv")))
    assert left_alone(b.model(), MergeProjections()) == []


def test_products_with_computed_matrices_stay() -> None:
    b = Builder()
    x, y = b.input("x", ["n", SIZE]), b.input("y", [SIZE, 4])
    b.output(b.op("Add", linear(b, x, 4, "k"), b.op("MatMul", x, y)))
    assert left_alone(b.model(), MergeProjections()) == []


def near_miss(kind: str) -> onnx.ModelProto:
    """Two layers of x, of which the second, `other`, does not qualify."""
    b = Builder()
    x = b.input("x", ["batch", "n", SIZE])
    first = linear(b, x, 4, "first")
    weight = b.constant(weights(SIZE, 4))
    bias = b.constant(weights(4))
    product = b.op("MatMul", x, weight, name="other")
    if kind == "no bias":
        second = b.op("Relu", product, name="relu")
    elif kind == "a matrix for a bias":
        second = b.op("Add", product, weights(1, 4), name="add")
    elif kind == "a number for a bias":
        second = b.op("Add", product, weights(1), name="add")
    elif kind == "a computed bias":
        second = b.op("Add", product, b.input("y", [4]), name="add")
    else:
        second = b.op("Add", product, bias, name="add")
    if kind == "shared weights":
        second = b.op("Add", second, b.op("ReduceSum", weight, name="sum"))
    elif kind == "a shared bias":
        second = b.op("Mul", second, bias, name="mul")
    elif kind == "a product read elsewhere":
        second = b.op("Add", second, b.op("Relu", product, name="relu"))
    b.output(b.op("Sub", first, second))
    if kind == "an output":
        b.output(product)
    return b.model()


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("no bias", "relu (Relu) reads it, which adds no bias"),
        ("a matrix for a bias", "add adds constant_9 of shape [1, 4], which is not a constant vector of 4"),
        ("a number for a bias", "add adds constant_9 of shape [1], which is not a constant vector of 4"),
        ("a computed bias", "add adds y of shape [4], which is not a constant vector of 4"),
        ("shared weights", "constant_5 is also read by sum"),
        ("a shared bias", "constant_6 is also read by mul"),
        ("a product read elsewhere", "other_out0 is read by add, relu, not by one node alone"),
        ("an output", "other_out0 is an output of the graph"),
    ],
)
def test_near_misses_are_left_alone(kind: str, why: str) -> None:
    assert left_alone(near_miss(kind), MergeProjections()) == [("other", why)]


def test_one_layer_that_does_not_qualify_leaves_the_others() -> None:
    b = Builder()
    x = b.input("x", ["n", SIZE])
    b.output(b.op("Concat", linear(b, x, 4, "k"), b.op("MatMul", x, weights(SIZE, 4), name="bare"), linear(b, x, 4, "kv"), axis=-1))
    model = b.model()
    graph, report = apply(model, MergeProjections())
    assert report.rewrites == 2
    assert [declined.node for declined in report.declined] == ["bare"]
    assert count(graph)["MatMul"] == 2
    assert_same(model, graph, {"x": normal(5, SIZE)})


def test_weights_of_the_model_stay() -> None:
    model = projections((8, 8))
    before = {weight.name: weight.raw_data for weight in model.graph.initializer}
    apply(model, MergeProjections())
    assert {weight.name: weight.raw_data for weight in model.graph.initializer} == before
