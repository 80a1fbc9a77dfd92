from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from smc.passes.common_subexpressions import CommonSubexpressions
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal, weights


def test_equal_nodes_become_one() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    b.output(b.op("Add", b.op("Cos", x, name="first"), b.op("Mul", b.op("Cos", x), b.op("Cos", x))))
    model = b.model()
    graph, report = apply(model, CommonSubexpressions())
    assert (report.rewrites, report.declined) == (2, [])
    assert count(graph) == {"Cos": 1, "Mul": 1, "Add": 1}
    assert "first" in {node.name for node in graph.nodes}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_what_equal_nodes_make_is_equal() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    a, c = (b.op("Exp", b.op("Mul", b.op("Cos", x), np.float32(0.5))) for _ in range(2))
    b.output(b.op("Sub", a, b.op("Neg", c)))
    model = b.model()
    graph, report = apply(model, CommonSubexpressions())
    assert report.rewrites == 3
    assert count(graph) == {"Cos": 1, "Mul": 1, "Exp": 1, "Neg": 1, "Sub": 1}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_constants_are_compared_by_value() -> None:
    b = Builder()
    x = b.input("x", ["n", 8])
    products = [b.op("MatMul", x, weights(8, 300, seed=seed)) for seed in (0, 1, 0, 1)]
    b.output(b.op("Concat", *products, axis=1))
    model = b.model()
    graph, report = apply(model, CommonSubexpressions())
    assert report.rewrites == 2
    assert count(graph) == {"MatMul": 2, "Concat": 1}
    assert_same(model, graph, {"x": normal(3, 8)})


def test_all_outputs_are_merged() -> None:
    b = Builder()
    x = b.input("x", ["n", 6])
    (a, c), (d, e) = b.split(x, 2, 1), b.split(x, 2, 1)
    b.output(b.op("Add", b.op("Sub", a, e), b.op("Mul", d, c)))
    model = b.model()
    graph, report = apply(model, CommonSubexpressions())
    assert report.rewrites == 1
    assert count(graph)["Split"] == 1
    assert_same(model, graph, {"x": normal(3, 6)})


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_one_that_makes_an_output_stays(place: int) -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    made = [b.op("Cos", x, name=f"cos{i}") for i in range(3)]
    b.output(b.op("Add", b.op("Neg", made[0]), b.op("Mul", made[1], made[2])))
    b.output(made[place])
    model = b.model()
    graph, report = apply(model, CommonSubexpressions())
    assert (report.rewrites, report.declined) == (2, [])
    assert count(graph)["Cos"] == 1
    assert_same(model, graph, {"x": normal(3, 4)})


def test_two_that_make_outputs_stay() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    b.output(b.op("Cos", x, name="first"))
    b.output(b.op("Cos", x, name="second"))
    expected = [("second", "it computes the same as first, and both make outputs of the graph")]
    assert left_alone(b.model(), CommonSubexpressions()) == expected


@pytest.mark.parametrize(
    ("op", "operands", "attrs"),
    [
        ("Transpose", ([], []), ({"perm": [0, 2, 1]}, {"perm": [1, 0, 2]})),
        ("Mul", ([np.float32(2)], [np.float32(3)]), ({}, {})),
        ("Mul", ([np.float32(2)], [np.ones(1, dtype=np.float32) * 2]), ({}, {})),
        ("Mul", ([np.float32(0.0)], [np.float32(-0.0)]), ({}, {})),
        ("Clip", (["", np.float32(1)], [np.float32(1)]), ({}, {})),
        ("RandomUniformLike", ([], []), ({}, {})),
    ],
    ids=["attributes", "values", "shapes of constants", "signs of zero", "places of inputs", "random"],
)
def test_different_nodes_stay(op: str, operands: tuple[list[Any], list[Any]], attrs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    b = Builder()
    x = b.input("x", [2, 2, 2])
    b.output(b.op("Sub", *(b.op(op, x, *more, **named) for more, named in zip(operands, attrs, strict=True))))
    assert left_alone(b.model(), CommonSubexpressions()) == []


def test_operations_of_different_domains_stay() -> None:
    b = Builder()
    x = b.input("x", [2])
    b.output(b.op("Sub", b.op("Neg", x), b.op("Neg", x)))
    model = b.model()
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    model.graph.node[0].domain = "elsewhere"
    assert left_alone(model, CommonSubexpressions()) == []
