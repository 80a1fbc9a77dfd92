from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from smc.passes.prepare import prepare
from smc.passes.tensors import Editor, constant_value, last_axis_selection, may_differ, scalar_value, slices, unscaled
from tests.passes.graphs import Builder, normal


def output(b: Builder, tensor: str) -> Any:
    """The tensor that becomes the graph's output."""
    b.output(tensor)
    return prepare(b.model()).outputs[0]


@pytest.mark.parametrize("constant_nodes", [False, True])
def test_value_of_arithmetic_on_static_dimensions(constant_nodes: bool) -> None:
    b = Builder(constant_nodes=constant_nodes)
    shape = b.op("Shape", b.input("x", ["batch", 3, 16]))
    width = b.op("Cast", b.op("Slice", shape, np.array([-1]), np.array([2**63 - 1])), to=onnx.TensorProto.FLOAT)
    value = scalar_value(output(b, b.op("Div", np.float32(1), b.op("Sqrt", width))))
    assert value == 0.25


def test_value_of_constant_nodes_with_plain_numbers() -> None:
    for attrs, expected in (({"value_float": 2.5}, 2.5), ({"value_floats": [2.5]}, 2.5)):
        b = Builder()
        assert scalar_value(output(b, b.op("Identity", b.op("Constant", **attrs)))) == expected


def test_dynamic_dimensions_have_no_value() -> None:
    for index, expected in ((0, None), (1, 3)):
        b = Builder()
        chosen = b.op("Gather", b.op("Shape", b.input("x", ["batch", 3])), np.array([index]))
        b.output(b.op("Add", chosen, np.array([1])), np.int64)
        value = constant_value(prepare(b.model()).nodes[-1].inputs[0])
        assert (None if value is None else value.tolist()) == (None if expected is None else [expected])


def test_arithmetic_with_a_dynamic_dimension_has_no_value() -> None:
    b = Builder()
    b.output(b.op("Neg", b.op("Mul", b.op("Shape", b.input("x", ["batch", 3])), np.array([2, 2]))), np.int64)
    assert constant_value(prepare(b.model()).outputs[0]) is None


@pytest.mark.parametrize(
    ("op", "operands"),
    [
        ("Slice", (np.arange(9), [0], "size", [0])),
        ("Slice", (np.arange(9), "size", [9], [0])),
        ("Gather", (np.arange(9), "size")),
        ("Reshape", (np.arange(9), "size")),
        ("Concat", ([1], "size")),
        ("Concat", ("size", [1])),
    ],
)
def test_a_dynamic_dimension_decides_nothing(op: str, operands: tuple[Any, ...]) -> None:
    b = Builder()
    b.op("Shape", b.input("x", ["batch", 3]), end=1, name="shape")
    arrays = ["shape_out0" if isinstance(operand, str) else np.array(operand) for operand in operands]
    b.output(b.op(op, *arrays, **({"axis": 0} if op in ("Concat", "Gather") else {})), np.int64)
    assert constant_value(prepare(b.model()).outputs[0]) is None


@pytest.mark.parametrize(("values", "expected"), [(np.float32(2), 2), ([np.float32(2)], 2), ([[np.float32(2)]], None), (normal(2), None)])
def test_scalars_change_no_shape(values: Any, expected: float | None) -> None:
    b = Builder()
    b.output(b.op("Mul", b.input("x", [2]), values))
    (node,) = prepare(b.model()).nodes
    assert scalar_value(node.inputs[1]) == expected


@pytest.mark.parametrize(
    ("op", "operands", "factor"),
    [
        ("Mul", ("x", np.float32(2)), 2.0),
        ("Mul", (np.float32(2), "x"), 2.0),
        ("Div", ("x", np.float32(2)), 0.5),
        ("Div", (np.float32(2), "x"), None),
        ("Div", ("x", np.float32(0)), None),
        ("Mul", ("x", "x"), None),
        ("Add", ("x", np.float32(2)), None),
    ],
)
def test_unscaled(op: str, operands: tuple[Any, Any], factor: float | None) -> None:
    b = Builder()
    b.input("x", [2])
    b.output(b.op(op, *operands))
    (node,) = prepare(b.model()).nodes
    found = unscaled(node)
    assert (None if found is None else (found[0].name, found[1])) == (None if factor is None else ("x", factor))


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (2, 2, False),
        (2, 3, True),
        (1, "n", True),
        ("n", 1, True),
        (4, "n", False),
        ("n", "m", True),
        ("n", "made_up", False),
        (None, "n", False),
    ],
)
def test_may_differ(a: Any, b: Any, expected: bool) -> None:
    assert may_differ(a, b, frozenset({"n", "m"})) is expected


@pytest.mark.parametrize(
    ("start", "stop", "step"), [(0, 3, 1), (1, 2**63 - 1, 2), (-3, -1, 1), (-1, -(2**63), -1), (5, -7, -2), (-1, 1, -1), (4, -9, -1)]
)
def test_slices_pick_what_the_runtime_picks(start: int, stop: int, step: int) -> None:
    b = Builder()
    b.input("x", [2, 6])
    b.output(b.op("Slice", "x", *(np.array([value]) for value in (start, stop, 1, step))))
    (node,) = prepare(b.model()).nodes
    expected = onnx.reference.ReferenceEvaluator(b.model()).run(None, {"x": np.tile(np.arange(6, dtype=np.float32), (2, 1))})[0][0]
    assert np.arange(6)[slices(node)[1]].tolist() == expected.tolist()
    assert last_axis_selection(node, node.outputs[0], 6).tolist() == expected.tolist()


def test_editor_makes_new_names_and_each_constant_once() -> None:
    b = Builder()
    b.output(b.op("Relu", b.input("x", [2]), name="relu"))
    graph = prepare(b.model())
    edit = Editor(graph)
    assert [edit.fresh("relu"), edit.fresh("relu"), edit.fresh("new"), edit.fresh("x")] == ["relu_2", "relu_3", "new", "x_2"]
    assert edit.integers([1], "one") is edit.integers([1], "other")
    assert edit.integers([1], "one") is not edit.integers([1, 1], "ones")
    scalar = edit.constant(np.array(1, dtype=np.int64), "scalar")
    assert scalar.shape == ()
