from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.fold_permutation import FoldPermutation
from tests.passes.graphs import Builder, apply, assert_same, count, normal, weights

WIDTH, HEADS, SIZE = 10, 3, 4
CHANNELS = HEADS * SIZE
ORDER = np.array([2, 0, 3, 1])
OTHER_ORDER = np.array([1, 2, 3, 0])

Path = Callable[[Builder, str], tuple[str, str, str]]
"""From a product's result (B, N, 3 * heads * d) to q, k and v."""


def project(b: Builder, outputs: int = 3, *, bias: bool = True, bias_first: bool = False) -> str:
    product = b.op("MatMul", "x", weights(WIDTH, outputs * CHANNELS), name="product")
    if not bias:
        return product
    operands = [normal(outputs * CHANNELS), product] if bias_first else [product, normal(outputs * CHANNELS)]
    return b.op("Add", *operands, name="bias")


def five_axes(b: Builder, y: str) -> str:
    """(3, B, heads, N, d)"""
    return b.op("Transpose", b.op("Reshape", y, np.array([0, 0, 3, HEADS, SIZE])), perm=[2, 0, 3, 1, 4])


def slice_and_squeeze(b: Builder, y: str) -> tuple[str, str, str]:
    qkv, zero = five_axes(b, y), np.array([0])
    parts = [b.op("Slice", qkv, np.array([i]), np.array([i + 1]), zero) for i in range(3)]
    return tuple(b.op("Squeeze", part, zero) for part in parts)


def slice_backwards(b: Builder, y: str) -> tuple[str, str, str]:
    """v, k, q by a Slice of negative step."""
    turned = b.op("Slice", five_axes(b, y), np.array([-1]), np.array([-(2**63)]), np.array([0]), np.array([-1]))
    v, k, q = (b.op("Gather", turned, np.array(i), axis=0) for i in range(3))
    return q, k, v


def split_and_squeeze(b: Builder, y: str) -> tuple[str, str, str]:
    return tuple(b.op("Squeeze", part, np.array([0])) for part in b.split(five_axes(b, y), 3, 0))


def gather_scalars(b: Builder, y: str) -> tuple[str, str, str]:
    return tuple(b.op("Gather", five_axes(b, y), np.array(i), axis=0) for i in range(3))


def split_channels_first(b: Builder, y: str) -> tuple[str, str, str]:
    parts = b.split(y, 3, 2)
    return tuple(b.op("Transpose", b.op("Reshape", part, np.array([0, 0, HEADS, SIZE])), perm=[0, 2, 1, 3]) for part in parts)


def slices_of_channels(b: Builder, y: str) -> tuple[str, str, str]:
    bounds = [(0, CHANNELS), (CHANNELS, 2 * CHANNELS), (2 * CHANNELS, 2**63 - 1)]
    parts = [b.op("Slice", y, np.array([start]), np.array([stop]), np.array([-1])) for start, stop in bounds]
    return tuple(b.op("Transpose", b.op("Reshape", part, np.array([0, 0, HEADS, SIZE])), perm=[0, 2, 1, 3]) for part in parts)


def heads_before_parts(b: Builder, y: str) -> tuple[str, str, str]:
    """(B, N, heads, 3 * d): the three of every head side by side."""
    parts = b.split(b.op("Reshape", y, np.array([0, 0, HEADS, 3 * SIZE])), 3, 3)
    return tuple(b.op("Transpose", part, perm=[0, 2, 1, 3]) for part in parts)


def heads_in_the_batch(b: Builder, y: str) -> tuple[str, str, str]:
    """(B * heads, N, d)"""
    shape = b.op("Concat", np.array([-1]), b.op("Shape", "x", start=1, end=2), np.array([SIZE]), axis=0)
    return tuple(b.op("Reshape", part, shape) for part in split_channels_first(b, y))


def twice_reshaped(b: Builder, y: str) -> tuple[str, str, str]:
    together = b.op("Reshape", b.op("Reshape", y, np.array([0, 0, 3 * HEADS, SIZE])), np.array([0, 0, 3, CHANNELS]))
    parts = b.split(together, 3, 2)
    parts = [b.op("Unsqueeze", b.op("Squeeze", part, np.array([2])), np.array([1])) for part in parts]
    return tuple(b.op("Transpose", b.op("Reshape", part, np.array([0, 0, -1, HEADS, SIZE])), perm=[0, 1, 3, 2, 4]) for part in parts)


def cast_and_scaled(b: Builder, y: str) -> tuple[str, str, str]:
    q, k, v = split_channels_first(b, b.op("Identity", y))
    return b.op("Mul", np.float32(0.5), q), b.op("Cast", b.op("Div", k, np.float32(3)), to=onnx.TensorProto.FLOAT), v


PATHS = {
    function.__name__: function
    for function in (
        slice_and_squeeze,
        slice_backwards,
        split_and_squeeze,
        gather_scalars,
        split_channels_first,
        slices_of_channels,
        heads_before_parts,
        heads_in_the_batch,
        twice_reshaped,
        cast_and_scaled,
    )
}


def three(path: Path, *, opset: int = 23, constant_nodes: bool = False, shape: Any = ("batch", "n"), **kwargs: Any) -> onnx.ModelProto:
    """q and k permuted differently, v as it is, each into an operation that sees the order."""
    b = Builder(opset, constant_nodes)
    b.input("x", [*shape, WIDTH])
    q, k, v = path(b, project(b, **kwargs))
    finish(b, b.op("Gather", q, ORDER, axis=-1, name="permute_q"))
    finish(b, b.op("Gather", k, OTHER_ORDER - SIZE, axis=-1, name="permute_k"))
    finish(b, v)
    return b.model()


def finish(b: Builder, tensor: str) -> None:
    b.output(b.op("CumSum", tensor, np.array(-1)))


def x(batch: int = 2, n: int = 5) -> dict[str, np.ndarray]:
    return {"x": normal(batch, n, WIDTH)}


def fold(model: onnx.ModelProto, rewrites: int) -> gs.Graph:
    graph, report = apply(model, FoldPermutation())
    assert (report.rewrites, report.declined) == (rewrites, [])
    assert not [node for node in graph.nodes if node.name.startswith("permute")]
    return graph


def reason(model: onnx.ModelProto, *feeds: dict[str, np.ndarray]) -> str:
    """Why the Gather stays; the graph and its weights must be what they were."""
    graph, report = apply(model, FoldPermutation())
    assert report.rewrites == 0
    assert report.nodes_before == report.nodes_after
    assert_same(model, graph, *feeds, tolerance=0.0)
    (only,) = report.declined
    assert only.node == "permute"
    return only.why


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "Constant nodes"])
def test_every_path_folds(path: Path, constant_nodes: bool) -> None:
    model = three(path, constant_nodes=constant_nodes)
    graph = fold(model, 2)
    assert_same(model, graph, x(), x(1, 1), x(3, 8))


@pytest.mark.parametrize("opset", range(17, 24))
@pytest.mark.parametrize("shape", [("batch", "n"), (2, "n"), (2, 5)])
@pytest.mark.parametrize("path", [slice_and_squeeze, split_and_squeeze, heads_in_the_batch], ids=lambda path: path.__name__)
def test_every_opset_static_and_dynamic(opset: int, shape: tuple[Any, Any], path: Path) -> None:
    model = three(path, opset=opset, shape=shape)
    assert_same(model, fold(model, 2), x())


@pytest.mark.parametrize("kwargs", [{"bias": False}, {"bias_first": True}])
def test_bias(kwargs: dict[str, bool]) -> None:
    model = three(split_and_squeeze, **kwargs)
    assert_same(model, fold(model, 2), x())


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm(transposed: int, bias: bool) -> None:
    b = Builder()
    b.input("x", ["batch", WIDTH])
    weight = weights(WIDTH, CHANNELS)
    operands = [weight.T.copy() if transposed else weight] + ([normal(CHANNELS)] if bias else [])
    y = b.op("Gemm", "x", *operands, transB=transposed, alpha=0.5, beta=2.0)
    finish(b, b.op("Gather", b.op("Reshape", y, np.array([0, HEADS, SIZE])), ORDER, axis=2, name="permute"))
    model = b.model()
    assert_same(model, fold(model, 1), {"x": normal(5, WIDTH)})


def test_only_the_permuted_columns_move() -> None:
    before, after = (apply(three(split_channels_first), *passes)[0] for passes in ([_Nothing()], [FoldPermutation()]))
    for name in ("product", "bias"):
        old, new = (next(node for node in graph.nodes if node.name == name).inputs[1].values for graph in (before, after))
        assert new.dtype == old.dtype
        heads = old.reshape(-1, 3, HEADS, SIZE)
        expected = np.stack([heads[:, 0][..., ORDER], heads[:, 1][..., OTHER_ORDER], heads[:, 2]], axis=1)
        assert (new == expected.reshape(old.shape)).all()


class _Nothing(FoldPermutation):
    def rewrite(self, graph: gs.Graph, report: Any) -> None:
        pass


def single(change: Callable[[Builder, str], str] = lambda b, y: y, *, weight: Any = None, order: Any = ORDER) -> Builder:
    """A product, `change` and the heads' split, permuted."""
    b = Builder()
    b.input("x", ["batch", "n", WIDTH])
    y = b.op("MatMul", "x", weights(WIDTH, CHANNELS) if weight is None else weight(b), name="product")
    heads = b.op("Transpose", b.op("Reshape", change(b, y), np.array([0, 0, HEADS, SIZE])), perm=[0, 2, 1, 3], name="heads")
    finish(b, b.op("Gather", heads, order, axis=-1, name="permute"))
    return b


def test_shared_weights_are_copied() -> None:
    b = Builder()
    b.input("x", ["batch", "n", WIDTH])
    weight, bias = b.constant(weights(WIDTH, CHANNELS)), b.constant(normal(CHANNELS))
    for name in ("permute", "plain"):
        y = b.op("Reshape", b.op("Add", b.op("MatMul", "x", weight), bias), np.array([0, 0, HEADS, SIZE]))
        finish(b, b.op("Gather", y, ORDER, axis=3, name=name) if name == "permute" else y)
    model = b.model()
    graph = fold(model, 1)
    assert len({node.inputs[1].name for node in graph.nodes if node.op == "MatMul"}) == 2
    assert_same(model, graph, x())
    # The model's own weights are what they were: the graph took them over without copying.
    assert (onnx.numpy_helper.to_array(model.graph.initializer[0]) == weights(WIDTH, CHANNELS)).all()


def test_weights_behind_a_transpose() -> None:
    model = single(weight=lambda b: b.op("Transpose", weights(CHANNELS, WIDTH), perm=[1, 0])).model()
    graph = fold(model, 1)
    assert count(graph)["Transpose"] == 1
    assert_same(model, graph, x())


def test_half_precision_stays() -> None:
    b = Builder()
    b.input("x", ["batch", "n", WIDTH], np.float16)
    y = b.op("MatMul", "x", weights(WIDTH, CHANNELS).astype(np.float16))
    b.output(b.op("Relu", b.op("Gather", b.op("Reshape", y, np.array([0, 0, HEADS, SIZE])), ORDER, axis=-1, name="permute")), np.float16)
    model = b.model()
    graph = fold(model, 1)
    assert graph.nodes[0].inputs[1].values.dtype == np.float16
    assert_same(model, graph, {"x": normal(2, 5, WIDTH, dtype=np.float16)}, tolerance=1e-3)  # float16's unit roundoff is 5e-4


def test_two_permutations_in_a_row() -> None:
    b = single()
    b.outputs.clear()
    finish(b, b.op("Gather", "permute_out0", OTHER_ORDER, axis=-1, name="permute_again"))
    model = b.model()
    assert_same(model, fold(model, 2), x())


def test_readers_of_the_shape_do_not_matter() -> None:
    b = single()
    b.output(b.op("Shape", "heads_out0"), np.int64)
    model = b.model()
    assert_same(model, fold(model, 1), x())


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda b, y: b.op("Relu", y, name="relu"), "relu (Relu) stands between the weights and the permutation"),
        (lambda b, y: b.op("Add", y, y, name="twice"), "twice (Add) stands between the weights and the permutation"),
        (lambda b, y: b.op("CumSum", y, np.array(1), name="sum"), "sum (CumSum) stands between the weights and the permutation"),
    ],
)
def test_what_stands_between(change: Callable[[Builder, str], str], why: str) -> None:
    assert reason(single(change).model(), x()) == why


def test_other_reads_of_the_same_columns() -> None:
    for tensor, why in (
        ("product_out0", "other (Neg) reads the same columns"),
        ("heads_out0", "other (Neg) reads the same columns"),
    ):
        b = single()
        b.output(b.op("Neg", tensor, name="other"))
        assert reason(b.model(), x()) == why


def test_other_reads_of_one_of_the_columns() -> None:
    b = single()
    first = b.op("Slice", "product_out0", np.array([0]), np.array([1]), np.array([2]))
    b.output(b.op("Neg", first, name="other"))
    assert reason(b.model(), x()) == "other (Neg) reads the same columns"


def test_product_that_is_an_output() -> None:
    b = single()
    b.output("product_out0")
    assert reason(b.model(), x()) == "the output product_out0 of the graph reads the same columns"


def test_permuted_tensor_that_is_an_output() -> None:
    b = single()
    b.output("permute_out0")
    assert reason(b.model(), x()) == "permute_out0 is an output of the graph"


def test_reads_of_other_columns_do_not_matter() -> None:
    b = single(lambda b, y: b.split(y, 2, 2)[0], weight=lambda b: weights(WIDTH, 2 * CHANNELS))
    b.output(b.op("Neg", b.op("Slice", "product_out0", np.array([CHANNELS]), np.array([2 * CHANNELS]), np.array([2]))))
    model = b.model()
    assert_same(model, fold(model, 1), x())


def test_weights_that_are_computed() -> None:
    model = single(weight=lambda b: b.op("Relu", weights(WIDTH, CHANNELS), name="relu")).model()
    assert reason(model, x()) == "product (MatMul) multiplies by relu_out0, which is not a constant matrix"


def test_bias_that_is_computed() -> None:
    b = Builder()
    b.input("x", ["batch", "n", WIDTH]), b.input("bias", [CHANNELS])
    y = b.op("Add", b.op("MatMul", "x", weights(WIDTH, CHANNELS)), "bias", name="add")
    finish(b, b.op("Gather", b.op("Reshape", y, np.array([0, 0, HEADS, SIZE])), ORDER, axis=-1, name="permute"))
    why = reason(b.model(), {**x(), "bias": normal(CHANNELS)})
    assert why == "add (Add) stands between the weights and the permutation"


def test_positions_mixed_into_the_channels() -> None:
    # The axis that is permuted holds N, not the weight's columns.
    b = Builder()
    b.input("x", ["batch", SIZE, WIDTH])
    y = b.op("Transpose", b.op("MatMul", "x", weights(WIDTH, CHANNELS)), perm=[0, 2, 1])
    finish(b, b.op("Gather", y, ORDER, axis=-1, name="permute"))
    assert reason(b.model(), x(2, SIZE)) == "the axis permuted is not one of the weights' columns"


def test_input_of_the_graph() -> None:
    b = Builder()
    finish(b, b.op("Gather", b.input("x", ["batch", "n", SIZE]), ORDER, axis=-1, name="permute"))
    assert reason(b.model(), {"x": normal(2, 3, SIZE)}) == "x is not made by a product with weights"


@pytest.mark.parametrize("order", [[0, 1, 1, 2], [0, 1, 2], [0, 1, 2, 3, 0], 2])
def test_other_gathers_are_not_looked_at(order: Any) -> None:
    model = single(order=np.array(order)).model()
    graph, report = apply(model, FoldPermutation())
    assert (report.rewrites, report.declined) == (0, [])
    assert_same(model, graph, x(), tolerance=0.0)
