from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder, normal

SHAPE = [2, 3, 5, 7]


@pytest.mark.parametrize("op", ["Relu", "Gelu", "Exp"])
def test_functions_of_one(op: str) -> None:
    b = Builder()
    b.output(b.op(op, b.input("x", SHAPE)))
    assert kinds(check(b.model())) == [op.lower()]


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
@pytest.mark.parametrize("shape", [SHAPE, [7], [5, 1], [2, 1, 1, 7], [1], []])
def test_functions_of_two_with_a_broadcast_on_either_side(op: str, shape: list[int]) -> None:
    b = Builder()
    x, y = b.input("x", SHAPE), b.input("y", shape)
    b.output(b.op(op, x, y))
    b.output(b.op(op, y, x))
    assert len(check(b.model())) == 2


def test_both_operands_broadcast() -> None:
    b = Builder()
    b.output(b.op("Mul", b.input("x", [3, 1, 7]), b.input("y", [2, 1, 5, 1])))
    assert kinds(check(b.model())) == ["mul"]


def test_constants_and_parts() -> None:
    b = Builder()
    x = b.op("Slice", b.op("Transpose", b.input("x", SHAPE), perm=[3, 1, 0, 2]), np.array([1]), np.array([4]), np.array([0]))
    b.output(b.op("Sub", normal(2, 5), x))
    assert kinds(check(b.model())) == ["sub"]


def test_a_root() -> None:
    b = Builder()
    x = b.input("x", SHAPE)
    b.output(b.op("Sqrt", b.op("Mul", x, x)))
    assert kinds(check(b.model())) == ["mul", "sqrt"]


def test_results_in_float16_are_rounded_once() -> None:
    b = Builder()
    b.output(b.op("Gelu", b.op("Mul", half(b, b.input("x", SHAPE)), np.float16(3))), np.float16)
    assert kinds(check(b.model(), TOLERANCES[HALF])) == ["copy", "mul", "gelu"]


def test_integers() -> None:
    b = Builder()
    b.output(b.op("Add", b.input("x", SHAPE, np.int32), b.input("y", [7], np.int32)), np.int32)
    assert kinds(check(b.model())) == ["add"]


@pytest.mark.parametrize(
    ("limits", "calls"), [((np.float32(-0.5), np.float32(0.5)), 2), ((np.float32(0.1),), 1), (("", np.float32(0.1)), 1)]
)
def test_limits(limits: tuple[Any, ...], calls: int) -> None:
    b = Builder()
    b.output(b.op("Clip", b.input("x", SHAPE), *limits))
    assert len(check(b.model())) == calls


def test_no_limits_are_nothing() -> None:
    b = Builder()
    b.output(b.op("Exp", b.op("Clip", b.input("x", SHAPE))))
    assert kinds(check(b.model())) == ["exp"]


@pytest.mark.parametrize("op", ["ReduceL2", "ReduceSum"])
@pytest.mark.parametrize("keepdims", [0, 1])
def test_sums_of_rows(op: str, keepdims: int) -> None:
    b = Builder()
    b.output(b.op(op, b.input("x", SHAPE), np.array([-1]), keepdims=keepdims))
    assert kinds(check(b.model())) == ["Reduction"]


def test_sums_of_columns_of_a_part() -> None:
    """Rows are any equal steps; of more than one kind of step a copy is taken."""
    b = Builder()
    x = b.op("Slice", b.op("Transpose", b.input("x", [6, 10]), perm=[1, 0]), np.array([1]), np.array([10]), np.array([0]), np.array([3]))
    b.output(b.op("ReduceL2", x, np.array([1])))
    (call,) = check(b.model())
    assert (call.operation.x_row, call.operation.x_column, call.operation.x_offset) == (3, 10, 1)

    b = Builder()
    x = b.op("Transpose", b.input("x", SHAPE), perm=[1, 0, 2, 3])
    b.output(b.op("ReduceSum", x, np.array([3])))
    assert kinds(check(b.model())) == ["copy", "Reduction"]


def test_maps_stay_as_they_lie_in_memory() -> None:
    """Of a map whose channels are last, sums and casts are so, too: only the output is brought into the graph's order."""
    b = Builder()
    x = b.op("Transpose", b.input("x", SHAPE), perm=[0, 3, 1, 2])
    y = b.op("Exp", b.op("Cast", b.op("Add", x, np.float32(1)), to=HALF))
    b.output(b.op("Transpose", b.op("Relu", b.op("Gelu", y)), perm=[0, 2, 3, 1]), np.float16)
    calls = check(b.model(), 2 * TOLERANCES[HALF])
    assert kinds(calls) == ["add", "copy", "exp", "gelu", "relu"]
    assert all(call.operation.out.strides == call.operation.inputs[0].strides for call in calls)


@pytest.mark.parametrize(
    ("op", "operands", "attrs"),
    [
        ("Neg", (), {}),
        ("Max", (normal(7), normal(5, 7)), {}),
        ("ReduceL2", (np.array([1]),), {}),
        ("ReduceSum", (), {}),
        ("Gelu", (), {"approximate": "tanh"}),
    ],
)
def test_what_no_kernel_does_is_refused(op: str, operands: tuple[Any, ...], attrs: dict[str, Any]) -> None:
    b = Builder()
    b.output(b.op(op, b.input("x", SHAPE), *operands, name="odd_one", **attrs))
    refused(b.model(), f"odd_one.*{op}")


def test_too_many_axes_are_refused() -> None:
    b = Builder()
    shape = [2] * 8
    x, y = b.input("x", shape), b.op("Transpose", b.input("y", shape), perm=[7, 6, 5, 4, 3, 2, 1, 0])
    b.output(b.op("Add", x, y, name="odd_one"))
    refused(b.model(), "odd_one .*8 axes")
