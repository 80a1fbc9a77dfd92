from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.cancel_layout import CancelLayout
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal

Layout = Callable[[Builder, str], str]
"""From x (batch, n, 4, 6) to another layout of it."""


def wrapped(layout: Layout, shape: list[int | str] | None = None, dtype: Any = np.float32) -> onnx.ModelProto:
    """Neg(layout(Relu(x))), so that neither an input nor an output of the graph is at stake."""
    b = Builder()
    x = b.input("x", shape or ["batch", "n", 4, 6], dtype)
    b.output(b.op("Neg", layout(b, b.op("Relu", x))), dtype)
    return b.model()


def left(graph: gs.Graph) -> dict[str, int]:
    """The operations between Relu and Neg."""
    return {op: number for op, number in count(graph).items() if op not in ("Relu", "Neg")}


FEEDS = ({"x": normal(2, 5, 4, 6)}, {"x": normal(1, 3, 4, 6)})


def sizes(b: Builder, x: str, *dims: int) -> str:
    """A shape whose positive entries are axes of x, the others sizes negated."""
    parts = [b.op("Shape", x, start=d, end=d + 1) if d >= 0 else np.array([-d]) for d in dims]
    return b.op("Concat", *parts, axis=0)


IDLE: dict[str, Layout] = {
    "Identity": lambda b, x: b.op("Identity", x),
    "Transpose that moves nothing": lambda b, x: b.op("Transpose", x, perm=[0, 1, 2, 3]),
    "Reshape to the same shape": lambda b, x: b.op("Reshape", x, np.array([0, 0, 4, 6])),
    "Reshape to the same shape, computed": lambda b, x: b.op("Reshape", x, sizes(b, x, 0, 1, -4, -6), allowzero=1),
    "Reshape with one dimension inferred": lambda b, x: b.op("Reshape", x, np.array([0, -1, 4, 6])),
    "Expand to the same shape": lambda b, x: b.op("Expand", x, np.array([1, 1, 4, 1])),
    "Slice of everything": lambda b, x: b.op("Slice", x, np.array([0]), np.array([2**31]), np.array([2])),
    "two transposes": lambda b, x: b.op("Transpose", b.op("Transpose", x, perm=[0, 2, 3, 1]), perm=[0, 3, 1, 2]),
    "three transposes": lambda b, x: b.op(
        "Transpose", b.op("Transpose", b.op("Transpose", x, perm=[1, 2, 3, 0]), perm=[1, 2, 3, 0]), perm=[2, 3, 0, 1]
    ),
    "Squeeze of Unsqueeze": lambda b, x: b.op("Squeeze", b.op("Unsqueeze", x, np.array([1])), np.array([1])),
    "Squeeze of Unsqueeze, from the end": lambda b, x: b.op("Squeeze", b.op("Unsqueeze", x, np.array([-1])), np.array([4])),
    "Reshape there and back": lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([0, 0, 24])), np.array([0, 0, 4, 6])),
    "Reshape there and back, computed": lambda b, x: b.op(
        "Reshape", b.op("Reshape", x, np.array([-1, 24])), sizes(b, x, 0, 1, -4, -6), allowzero=1
    ),
    "Flatten and back": lambda b, x: b.op("Reshape", b.op("Flatten", x, axis=3), sizes(b, x, 0, 1, -4, -6), allowzero=1),
}


@pytest.mark.parametrize("layout", IDLE.values(), ids=IDLE.keys())
def test_what_does_nothing_goes(layout: Layout) -> None:
    model = wrapped(layout)
    graph, report = apply(model, CancelLayout())
    assert report.rewrites > 0
    assert report.declined == []
    assert left(graph) == {}
    assert_same(model, graph, *FEEDS)


@pytest.mark.parametrize("layout", IDLE.values(), ids=IDLE.keys())
def test_what_does_nothing_goes_from_static_shapes(layout: Layout) -> None:
    model = wrapped(layout, [2, 5, 4, 6])
    graph, _ = apply(model, CancelLayout())
    assert left(graph) == {}
    assert_same(model, graph, FEEDS[0])


CONSIDERED: dict[str, tuple[Layout, dict[str, int]]] = {
    "transposes that compose": (
        lambda b, x: b.op("Transpose", b.op("Transpose", x, perm=[0, 2, 1, 3]), perm=[0, 1, 3, 2]),
        {"Transpose": 1},
    ),
    "transposes with the default order": (lambda b, x: b.op("Transpose", b.op("Transpose", x), perm=[3, 1, 2, 0]), {"Transpose": 1}),
    "reshapes that compose": (
        lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([0, 0, 24])), np.array([0, 0, 2, 12])),
        {"Reshape": 1},
    ),
    "reshapes that compose over two dynamic dimensions": (
        lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([0, -1, 6])), np.array([-1, 24])),
        {"Reshape": 1},
    ),
    "a zero that means a dimension of the first reshape": (
        lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([-1, 24])), np.array([0, 6, 4])),
        {"Reshape": 1},
    ),
    "Reshape of Unsqueeze": (lambda b, x: b.op("Reshape", b.op("Unsqueeze", x, np.array([0])), np.array([-1, 4, 6])), {"Reshape": 1}),
    "Unsqueeze of Reshape": (lambda b, x: b.op("Unsqueeze", b.op("Reshape", x, np.array([0, 0, 24])), np.array([1])), {"Reshape": 1}),
    "a computed shape that a constant can state": (lambda b, x: b.op("Reshape", x, sizes(b, x, 0, 1, -24), allowzero=1), {"Reshape": 1}),
}


@pytest.mark.parametrize(("layout", "expected"), CONSIDERED.values(), ids=CONSIDERED.keys())
def test_what_can_be_one_node_is(layout: Layout, expected: dict[str, int]) -> None:
    model = wrapped(layout)
    graph, report = apply(model, CancelLayout())
    assert report.rewrites > 0
    assert left(graph) == expected
    assert_same(model, graph, *FEEDS)


def test_a_shape_that_needs_computing_is_kept_and_read_by_the_reshape_that_stays() -> None:
    model = wrapped(lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([-1])), sizes(b, x, 1, 0, -24), allowzero=1))
    graph, report = apply(model, CancelLayout())
    assert (report.rewrites, report.declined) == (1, [])
    assert left(graph) == {"Reshape": 1, "Shape": 2, "Concat": 1}
    assert_same(model, graph, *FEEDS)


def test_a_computed_zero_may_mean_the_dimension_that_is_there() -> None:
    # Without allowzero a 0 in the second shape would be the first Reshape's dimension.
    model = wrapped(lambda b, x: b.op("Reshape", b.op("Reshape", x, np.array([-1])), sizes(b, x, 1, 0, -24)))
    ((node, why),) = left_alone(model, CancelLayout())
    assert node.startswith("reshape")
    assert "['n', 'batch', 24]" in why
    assert "cannot be written as constants" in why


@pytest.mark.parametrize(
    ("perm", "shape", "feed"),
    [
        ([0, 2, 1, 3], ["batch", 1, 5, 1], (3, 1, 5, 1)),
        ([1, 0, 3, 2], ["batch", 1, 5, 1], (3, 1, 5, 1)),
        ([0, 2, 1, 3], ["batch", "n", 1, 6], (3, 7, 1, 6)),
        ([2, 0, 1, 3], [2, 3, 1, "n"], (2, 3, 1, 7)),
    ],
)
def test_moving_axes_of_size_one_is_a_reshape(perm: list[int], shape: list[int | str], feed: tuple[int, ...]) -> None:
    model = wrapped(lambda b, x: b.op("Transpose", x, perm=perm), shape)
    graph, report = apply(model, CancelLayout())
    assert (report.rewrites, report.declined) == (1, [])
    assert left(graph) == {"Reshape": 1}
    assert_same(model, graph, {"x": normal(*feed)})


def test_the_transpose_of_a_single_head_merges_with_the_reshape_that_split_it() -> None:
    model = wrapped(lambda b, x: b.op("Transpose", b.op("Reshape", x, np.array([0, 0, 1, 24])), perm=[0, 2, 1, 3]))
    graph, _ = apply(model, CancelLayout())
    assert left(graph) == {"Reshape": 1}
    assert_same(model, graph, *FEEDS)


AROUND: dict[str, Layout] = {
    "unary": lambda b, x: b.op("Transpose", b.op("Sigmoid", b.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]),
    "a number": lambda b, x: b.op("Transpose", b.op("Mul", np.float32(3), b.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]),
    "several": lambda b, x: b.op(
        "Transpose", b.op("Exp", b.op("Sub", b.op("Tanh", b.op("Transpose", x, perm=[0, 2, 1, 3])), np.float32(1))), perm=[0, 2, 1, 3]
    ),
    "two operands": lambda b, x: b.op(
        "Transpose",
        b.op("Add", b.op("Transpose", x, perm=[0, 2, 3, 1]), b.op("Relu", b.op("Transpose", b.op("Neg", x), perm=[0, 2, 3, 1]))),
        perm=[0, 3, 1, 2],
    ),
    "reshape": lambda b, x: b.op("Reshape", b.op("Gelu", b.op("Reshape", x, np.array([0, 0, 24]))), np.array([0, 0, 4, 6])),
    "flatten and back": lambda b, x: b.op("Reshape", b.op("Sqrt", b.op("Flatten", x, axis=2)), sizes(b, x, 0, 1, -4, -6), allowzero=1),
    "unsqueeze and squeeze": lambda b, x: b.op("Squeeze", b.op("Sigmoid", b.op("Unsqueeze", x, np.array([1]))), np.array([1])),
}


@pytest.mark.parametrize("layout", AROUND.values(), ids=AROUND.keys())
def test_layouts_around_elementwise_operations_cancel(layout: Layout) -> None:
    model = wrapped(layout)
    graph, report = apply(model, CancelLayout())
    assert report.rewrites > 0
    assert report.declined == []
    assert not {"Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Concat", "Shape"} & set(left(graph))
    assert_same(model, graph, *FEEDS)
    shape = next(node for node in graph.nodes if node.op == "Neg" and node.outputs[0] is graph.outputs[0]).inputs[0].shape
    assert list(shape) == ["batch", "n", 4, 6]


def test_outputs_of_the_graph_keep_their_names() -> None:
    b = Builder()
    made = b.op("Relu", b.input("x", ["batch", 4]))
    b.output(b.op("Identity", made, name="same"))
    b.output(b.op("Neg", made))
    model = b.model()
    graph, report = apply(model, CancelLayout())
    assert (report.rewrites, report.declined) == (1, [])
    assert count(graph) == {"Relu": 1, "Neg": 1}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_two_names_for_one_output_stay() -> None:
    b = Builder()
    made = b.op("Relu", b.input("x", ["batch", 4]))
    b.output(made)
    b.output(b.op("Identity", made, name="same"))
    ((node, why),) = left_alone(b.model(), CancelLayout())
    assert node == "same"
    assert why == f"same_out0 is an output of the graph and {made} is another, an input or a constant"


def test_an_input_that_is_an_output_stays() -> None:
    b = Builder()
    b.output(b.op("Transpose", b.input("x", ["batch", 4]), perm=[0, 1], name="same"))
    assert left_alone(b.model(), CancelLayout()) == [
        ("same", "same_out0 is an output of the graph and x is another, an input or a constant")
    ]


def test_other_readers_of_what_is_between_stay() -> None:
    b = Builder()
    inside = b.op("Transpose", b.op("Relu", b.input("x", ["batch", "n", 4, 6])), perm=[0, 2, 3, 1])
    b.output(b.op("Neg", b.op("Transpose", inside, perm=[0, 3, 1, 2])))
    b.output(b.op("Softmax", inside))
    model = b.model()
    graph, _ = apply(model, CancelLayout())
    assert count(graph) == {"Relu": 1, "Transpose": 1, "Neg": 1, "Softmax": 1}
    assert_same(model, graph, *FEEDS)


STAY: dict[str, Layout] = {
    "Transpose": lambda b, x: b.op("Transpose", x, perm=[0, 2, 1, 3]),
    "Reshape that merges": lambda b, x: b.op("Reshape", x, np.array([0, 0, 24])),
    "Slice of a part": lambda b, x: b.op("Slice", x, np.array([0]), np.array([3]), np.array([2])),
    "Slice backwards": lambda b, x: b.op("Slice", x, np.array([-1]), np.array([-(2**31)]), np.array([2]), np.array([-1])),
    "Expand of a new axis": lambda b, x: b.op("Expand", x, np.array([2, 1, 1, 1, 1])),
    "Transpose, softmax, Transpose": lambda b, x: b.op(
        "Transpose", b.op("Softmax", b.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 3, 1, 2]
    ),
    "Transposes around a node that are no inverses": lambda b, x: b.op(
        "Transpose", b.op("Sigmoid", b.op("Transpose", x, perm=[0, 2, 3, 1])), perm=[0, 2, 3, 1]
    ),
    "swapped equal sizes": lambda b, x: b.op("Reshape", b.op("Transpose", x, perm=[1, 0, 2, 3]), np.array([-1, 24])),
}


@pytest.mark.parametrize("layout", STAY.values(), ids=STAY.keys())
def test_what_does_something_stays(layout: Layout) -> None:
    assert left_alone(wrapped(layout), CancelLayout()) == []


def test_a_transpose_of_equal_sizes_stays() -> None:
    assert left_alone(wrapped(lambda b, x: b.op("Transpose", x, perm=[0, 2, 1]), ["batch", 4, 4]), CancelLayout()) == []


def test_a_vector_added_between_transposes_stays() -> None:
    def layout(b: Builder, x: str) -> str:
        inside = b.op("Add", b.op("Transpose", x, perm=[0, 2, 3, 1], name="first"), normal(6, 1))
        return b.op("Transpose", inside, perm=[0, 3, 1, 2], name="last")

    assert left_alone(wrapped(layout), CancelLayout()) == [("last", "constant_4 does not come from the inverse of it, as first_out0 does")]


def test_reshapes_that_are_broadcast_against_each_other_stay() -> None:
    b = Builder()
    x, y = (b.op("Relu", b.input(name, ["batch", "n", 4, 6])) for name in ("x", "y"))
    flat, long = b.op("Reshape", x, np.array([-1, 24]), name="flat"), b.op("Reshape", y, np.array([1, -1, 24]), name="long")
    back = b.op("Reshape", b.op("Add", flat, long), sizes(b, x, 0, 1, -4, -6), name="back", allowzero=1)
    b.output(b.op("Neg", back))
    graph, report = apply(b.model(), CancelLayout())
    assert "back" in [declined.node for declined in report.declined]
    assert any("not known to be of one shape" in declined.why for declined in report.declined)
    assert_same(b.model(), graph, {"x": normal(2, 3, 4, 6), "y": normal(2, 3, 4, 6)})


def test_a_broadcast_between_reshapes_stays() -> None:
    def layout(b: Builder, x: str) -> str:
        inside = b.op("Add", b.op("Reshape", x, np.array([0, 0, 24]), name="first"), b.op("Relu", normal(1, 1, 24), name="row"))
        return b.op("Reshape", inside, np.array([0, 0, 4, 6]), name="last")

    assert [node for node, _ in left_alone(wrapped(layout), CancelLayout())] == ["last"]


def test_an_elementwise_result_that_others_read_stays() -> None:
    b = Builder()
    inside = b.op("Sigmoid", b.op("Transpose", b.op("Relu", b.input("x", ["batch", "n", 4, 6])), perm=[0, 2, 3, 1]))
    b.output(b.op("Neg", b.op("Transpose", inside, perm=[0, 3, 1, 2])))
    b.output(b.op("Softmax", inside))
    assert left_alone(b.model(), CancelLayout()) == []


def test_an_elementwise_result_that_is_an_output_stays() -> None:
    b = Builder()
    inside = b.op("Sigmoid", b.op("Transpose", b.op("Relu", b.input("x", ["batch", "n", 4, 6])), perm=[0, 2, 3, 1]))
    b.output(b.op("Neg", b.op("Transpose", inside, perm=[0, 3, 1, 2])))
    b.output(inside)
    assert left_alone(b.model(), CancelLayout()) == []


def test_axes_of_size_one_among_several_dynamic_ones_stay() -> None:
    model = wrapped(lambda b, x: b.op("Transpose", x, perm=[2, 0, 1], name="turn"), ["batch", "n", 1])
    assert left_alone(model, CancelLayout()) == [
        ("turn", "the shape [1, 'batch', 'n'] of turn_out0 cannot be written as constants when relu_1_out0 is ['batch', 'n', 1]")
    ]
