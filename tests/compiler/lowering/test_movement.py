from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder

Move = Callable[[Builder, str], Any]

MOVES: dict[str, Move] = {
    "reshape": lambda b, x: b.op("Reshape", x, np.array([0, -1, 2])),
    "transpose": lambda b, x: b.op("Transpose", x, perm=[2, 0, 1, 3]),
    "transpose without an order": lambda b, x: b.op("Transpose", x),
    "unsqueeze and squeeze": lambda b, x: b.op("Squeeze", b.op("Unsqueeze", x, np.array([1, -1])), np.array([1])),
    "flatten": lambda b, x: b.op("Flatten", x, axis=2),
    "identity": lambda b, x: b.op("Identity", x),
    "expand": lambda b, x: b.op("Expand", b.op("Slice", x, np.array([1]), np.array([2]), np.array([2])), np.array([3, 1, 1, 6, 1])),
    "slice with steps": lambda b, x: b.op("Slice", x, np.array([1, 3]), np.array([9, -9]), np.array([2, 1]), np.array([2, -1])),
    "slice from the end": lambda b, x: b.op("Slice", x, np.array([-3]), np.array([-1]), np.array([2])),
    "gather of one": lambda b, x: b.op("Gather", x, np.array(-1), axis=2),
    "gather backwards": lambda b, x: b.op("Gather", x, np.array([5, 3, 1]), axis=2),
    "gather of the same": lambda b, x: b.op("Gather", x, np.array([2, 2, 2]), axis=2),
    "depth to space": lambda b, x: b.op("DepthToSpace", x, blocksize=2, mode="DCR"),
    "depth to space, columns first": lambda b, x: b.op("DepthToSpace", x, blocksize=2, mode="CRD"),
    "split": lambda b, x: b.op("Split", x, np.array([1, 2, 3]), axis=2, outputs=3)[1],
    "split in equal parts": lambda b, x: b.split(x, 3, axis=-2)[2],
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_movements_are_views(move: Move) -> None:
    """Nothing is moved: the one call is the function behind."""
    b = Builder()
    b.output(b.op("Exp", move(b, b.input("x", [2, 4, 6, 8]))))
    assert kinds(check(b.model())) == ["exp"]


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
def test_outputs_are_contiguous(move: Move) -> None:
    b = Builder()
    b.output(move(b, b.input("x", [2, 4, 6, 8])))
    assert set(kinds(check(b.model()))) <= {"copy"}


def test_a_reshape_across_a_transposition_takes_one_copy() -> None:
    b = Builder()
    x = b.op("Transpose", b.input("x", [4, 6, 8]), perm=[1, 0, 2])
    b.output(b.op("Exp", b.op("Reshape", x, np.array([8, 24]))))
    assert kinds(check(b.model())) == ["copy", "exp"]


def test_parts_side_by_side_are_joined_without_moving() -> None:
    """As the views' features, which lie one behind the other; in the other order they are the same memory backwards."""
    b = Builder()
    x, y = b.input("x", [2, 8, 16]), b.input("y", [2, 8, 16])
    b.output(b.op("Exp", b.op("Concat", x, y, axis=0)))
    b.output(b.op("Exp", b.op("Concat", y, x, axis=0)))
    assert kinds(check(b.model())) == ["exp", "exp"]


@pytest.mark.parametrize(("shape1", "shape2", "axis"), [([2, 3, 4], [2, 5, 4], 1), ([2, 3, 4], [1, 3, 4], -3), ([3, 5], [3, 5], 1)])
def test_other_parts_are_copied_to_their_places(shape1: list[int], shape2: list[int], axis: int) -> None:
    b = Builder()
    x = b.op("Exp", b.input("x", shape1))
    b.output(b.op("Concat", x, b.input("y", shape2), axis=axis))
    assert kinds(check(b.model())) == ["exp", "copy", "copy"]


def test_parts_of_which_one_is_constant() -> None:
    b = Builder()
    b.output(b.op("Concat", b.input("x", [2, 3]), np.ones((2, 1), np.float32), axis=1))
    assert kinds(check(b.model())) == ["copy", "copy"]


def test_a_cast_to_a_wider_type_moves_nothing() -> None:
    b = Builder()
    x = half(b, b.input("x", [3, 5]))
    b.output(b.op("Exp", single(b, x)))
    assert kinds(check(b.model(), TOLERANCES[HALF])) == ["copy", "exp"]


def test_an_output_has_its_own_type() -> None:
    b = Builder()
    b.output(single(b, half(b, b.input("x", [3, 5]))))
    assert kinds(check(b.model())) == ["copy", "copy"]


def test_a_cast_of_bytes() -> None:
    b = Builder()
    b.output(b.op("Exp", b.op("Mul", single(b, b.input("x", [3, 5], np.uint8)), np.float32(0.01))))
    assert kinds(check(b.model())) == ["copy", "mul", "exp"]


@pytest.mark.parametrize(
    "move",
    [
        lambda b, x: b.op("Gather", x, np.array([0, 1, 3]), axis=2, name="odd_one"),
        lambda b, x: b.op("Gather", x, np.array([[0, 1], [2, 3]]), axis=2, name="odd_one"),
        lambda b, x: b.op("Gather", x, b.input("i", [2], np.int64), axis=2, name="odd_one"),
    ],
)
def test_what_is_no_view_of_anything_is_refused(move: Move) -> None:
    b = Builder()
    b.output(b.op("Exp", move(b, b.input("x", [2, 4, 6, 8]))))
    refused(b.model(), r"odd_one .*Gather")


def test_an_unknown_operation_is_refused_with_its_name() -> None:
    b = Builder()
    b.output(b.op("Det", b.input("x", [2, 3, 3]), name="odd_one"))
    refused(b.model(), "odd_one.*Det is not known to this backend")


def test_an_output_that_is_a_constant_and_one_that_is_an_input() -> None:
    b = Builder()
    b.output(b.op("Exp", b.input("x", [2, 3])))
    b.output(b.op("Identity", "x"))
    b.output(b.op("Add", np.arange(6, dtype=np.float32), np.float32(1)))
    check(b.model())


def test_an_output_that_no_node_makes_is_refused() -> None:
    b = Builder()
    x = b.input("x", [2, 3])
    b.output(b.op("Exp", x))
    b.output(x, shape=[2, 3])
    refused(b.model(), "the output x is made by no node")
