from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from smc.passes.base import Refusal
from smc.passes.channels import Column, Columns, LinearTrace
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, normal

SIZE = 4


def columns(write: Callable[[Builder], str]) -> list[Column]:
    b = Builder()
    b.input("x", ["n", SIZE]), b.input("y", ["n", SIZE]), b.input("ids", ["n"], np.int64)
    b.output(b.op("Relu", write(b)))
    found = Columns().of(prepare(b.model()).nodes[-1].inputs[0])
    assert found is not None
    return found


@pytest.mark.parametrize(
    "write",
    [
        lambda b: b.op("Concat", "x", "x", axis=-1),
        lambda b: b.op("Cos", b.op("Concat", "x", b.op("Neg", "x"), axis=1)),
        lambda b: b.op("Concat", b.op("Sin", "x"), b.op("Neg", b.op("Sin", b.op("Neg", "x"))), axis=1),
        lambda b: b.op("Concat", b.op("Mul", "x", "y"), b.op("Mul", "y", "x"), axis=1),
        lambda b: b.op("Concat", b.op("Add", "x", "y"), b.op("Add", "y", "x"), axis=1),
        lambda b: b.op("Concat", b.op("Sub", "x", "y"), b.op("Add", b.op("Neg", "y"), "x"), axis=1),
        lambda b: b.op("Concat", *(b.op("Cast", b.op("Cast", "x", to=10), to=1) for _ in "ab"), axis=1),
        lambda b: b.op("Gather", np.tile(normal(9, SIZE), 2), "ids", axis=0),
        lambda b: b.op("Concat", *2 * [b.op("Gather", normal(9, SIZE), "ids", axis=0)], axis=1),
        lambda b: b.op("Gather", b.op("Cos", np.tile(normal(9, SIZE), 2)), "ids", axis=0),
        lambda b: b.op("Gather", "x", np.array([0, 1, 2, 3, 0, 1, 2, 3]), axis=1),
        lambda b: b.op("Mul", b.op("Unsqueeze", b.op("Gather", "x", np.array(0), axis=1), np.array([1])), np.tile(normal(SIZE), 2)),
        lambda b: b.op("Concat", *(b.op("Reshape", b.op("Unsqueeze", "x", np.array([1])), np.array([-1, SIZE])) for _ in "ab"), axis=1),
        lambda b: b.op("Concat", *(b.op("Transpose", b.op("Unsqueeze", "x", np.array([1])), perm=[1, 0, 2]) for _ in "ab"), axis=2),
    ],
)
def test_equal_channels_are_found_equal(write: Callable[[Builder], str]) -> None:
    found = columns(write)
    assert len(found) == 2 * SIZE
    assert found[:SIZE] == found[SIZE:]
    assert len(set(found)) == SIZE


@pytest.mark.parametrize(
    "write",
    [
        lambda b: b.op("Concat", "x", "y", axis=-1),
        lambda b: b.op("Concat", "x", b.op("Neg", "x"), axis=-1),
        lambda b: b.op("Sin", b.op("Concat", "x", b.op("Neg", "x"), axis=1)),
        lambda b: b.op("Concat", b.op("Sin", "x"), b.op("Cos", "x"), axis=1),
        lambda b: b.op("Concat", b.op("Sub", "x", "y"), b.op("Sub", "y", "x"), axis=1),
        lambda b: b.op("Concat", b.op("Div", "x", "y"), b.op("Div", "y", "x"), axis=1),
        lambda b: b.op("Concat", b.op("Gather", "x", "ids", axis=0), "x", axis=1),
        lambda b: b.op("Concat", b.op("Gather", "x", "ids", axis=0), b.op("Gather", "y", "ids", axis=0), axis=1),
        # Rows and columns of a grid: the same table along different axes.
        lambda b: b.op("Concat", *(b.op("Expand", b.op("Unsqueeze", "x", np.array([axis])), grid(b)) for axis in (0, 1)), axis=-1),
        lambda b: b.op("Concat", *(b.op("Slice", b.op("Concat", "x", "x", axis=0), *bounds(i)) for i in (0, 1)), axis=1),
    ],
)
def test_different_channels_are_not(write: Callable[[Builder], str]) -> None:
    found = columns(write)
    assert len(set(found)) == 2 * SIZE


def grid(b: Builder) -> str:
    rows = b.op("Shape", "x", start=0, end=1)
    return b.op("Concat", rows, rows, np.array([SIZE]), axis=0)


def bounds(start: int) -> list[np.ndarray]:
    return [np.array([start]), np.array([start + 1]), np.array([0])]


def test_constants_are_compared_by_value_up_to_sign() -> None:
    table = np.concatenate([normal(5, 2), -normal(5, 2), [[0.0, -0.0]] * 5], axis=1, dtype=np.float32)
    a, b, c, d, zero, negative_zero = columns(lambda b: b.op("Concat", b.op("Identity", table), axis=1))
    assert (a[1], b[1]) == (c[1], d[1])
    assert (a[0], b[0]) == (-c[0], -d[0])
    assert zero == negative_zero


def test_terms_of_x() -> None:
    b = Builder()
    b.input("x", ["n", SIZE]), b.input("table", ["n", 2])
    first, second = b.split("x", 2, 1)
    turned = b.op("Concat", b.op("Neg", second), b.op("Mul", first, np.float32(3)), axis=1)
    b.output(b.op("Concat", b.op("Mul", "table", b.op("Sub", first, second)), turned, axis=1))
    graph = prepare(b.model())
    found = LinearTrace(graph.inputs[0], SIZE, Columns()).channels(graph.outputs[0])
    assert found == [
        {(0, ("table", 0)): 1.0, (2, ("table", 0)): -1.0},
        {(1, ("table", 1)): 1.0, (3, ("table", 1)): -1.0},
        {(2, None): -1.0},
        {(3, None): -1.0},
        {(0, None): 3.0},
        {(1, None): 3.0},
    ]


@pytest.mark.parametrize(
    ("write", "why"),
    [
        (lambda b: b.op("Mul", "x", "x", name="it"), "it (Mul) mixes channels of x with something else"),
        (lambda b: b.op("Add", "x", "table", name="it"), "it (Add) mixes channels of x with something else"),
        (lambda b: b.op("Div", "x", "table", name="it"), "it (Div) mixes channels of x with something else"),
        (lambda b: b.op("Concat", "x", "x", axis=0, name="it"), "it (Concat) joins along another axis than the last"),
        (lambda b: b.op("Gather", "x", np.array([0]), axis=0, name="it"), "it (Gather) does not pick channels by constants"),
        (lambda b: b.op("Mul", "table", b.op("Mul", "x", "table"), name="it"), "it (Mul) multiplies what was multiplied before"),
    ],
)
def test_what_is_no_sum_of_terms(write: Callable[[Builder], str], why: str) -> None:
    b = Builder()
    b.input("x", ["n", SIZE]), b.input("table", ["n", SIZE])
    b.output(write(b))
    graph = prepare(b.model())
    with pytest.raises(Refusal) as refusal:
        LinearTrace(graph.inputs[0], SIZE, Columns()).channels(graph.outputs[0])
    assert str(refusal.value) == why
