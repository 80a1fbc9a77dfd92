from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.batch_twins import BatchTwins
from smc.passes.common_subexpressions import CommonSubexpressions
from smc.passes.fix_shapes import FixShapes
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_constants import FoldConstants
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.prepare import prepare
from smc.passes.rotary_fusion import RotaryFusion
from smc.passes.twin_norms import TwinNorms
from tests.passes.graphs import Builder, apply, assert_same, count, normal, weights

N, C, HEADS = 6, 8, 2
TOKENS: list[int | str] = ["batch", N, C]
MAPS: list[int | str] = ["batch", C, 4, 5]
LAYOUT = {"Concat", "Constant", "Gather", "Reshape", "Split", "Squeeze", "Transpose", "Unsqueeze"}

Branch = Callable[[Builder, str, str, int], str]
"""(builder, this view's tensor, the other's, view) -> the view's result. Weights of `view` differ between the views."""


def twins(
    branch: Branch, shape: list[int | str] = TOKENS, other: Branch | None = None, shape2: list[int | str] | None = None
) -> onnx.ModelProto:
    """out1 = branch(x1, x2, 1), out2 = branch(x2, x1, 2), or of `other` for the second view."""
    b = Builder()
    x1, x2 = b.input("x1", shape), b.input("x2", shape2 or shape)
    name(b, branch(b, x1, x2, 1), "out1")
    name(b, (other or branch)(b, x2, x1, 2), "out2")
    return b.model()


def name(b: Builder, tensor: str, new: str, dtype: Any = np.float32) -> None:
    """Make a tensor that no node reads yet the output `new`."""
    for node in b.nodes:
        node.output[:] = [new if output == tensor else output for output in node.output]
    b.output(new, dtype)


def feeds(shape: list[int | str], batch: int) -> dict[str, np.ndarray]:
    sizes = [batch if size == "batch" else int(size) for size in shape]
    return {"x1": normal(*sizes), "x2": normal(*sizes, 1)[..., 0]}


def linear(b: Builder, x: str, view: int, seed: int = 0, columns: int = C, rows: int = C) -> str:
    product = b.op("MatMul", x, weights(rows, columns, seed=10 * seed + view))
    return b.op("Add", product, weights(columns, seed=10 * seed + view))


def norm(b: Builder, x: str, view: int, seed: int = 0) -> str:
    return b.op("LayerNormalization", x, 1 + weights(C, seed=20 + seed + view), weights(C, seed=30 + seed + view), axis=-1, epsilon=1e-6)


def conv(b: Builder, x: str, view: int, seed: int = 0, group: int = 1) -> str:
    kernel = weights(C, C // group, 3, 3, seed=10 * seed + view)
    return b.op("Conv", x, kernel, weights(C, seed=10 * seed + view), pads=[1, 1, 1, 1], group=group)


def heads(b: Builder, x: str) -> str:
    return b.op("Transpose", b.op("Reshape", x, np.array([-1, N, HEADS, C // HEADS])), perm=[0, 2, 1, 3])


def attention(b: Builder, x: str, y: str, view: int, seed: int = 0) -> str:
    """Attention of x on y with projections."""
    q, k, v = (heads(b, linear(b, z, view, 3 * seed + i)) for i, z in enumerate((x, y, y)))
    out = b.op("Transpose", b.op("Attention", q, k, v, scale=0.5), perm=[0, 2, 1, 3])
    return linear(b, b.op("Reshape", out, np.array([-1, N, C])), view, 7 + seed)


def rotated(b: Builder, x: str, view: int) -> str:
    """Rotated by tables for every sample, whose number each view takes from its own input."""
    batch = b.op("Concat", b.op("Shape", x, start=0, end=1), np.array([1, 1]), axis=0)
    cos, sin = (b.op("Expand", normal(1, N, 2) + i, batch) for i in range(2))
    return b.op("Reshape", b.op("RotaryEmbedding", heads(b, linear(b, x, view)), cos, sin), np.array([-1, N, C]))


def packed_heads(b: Builder, x: str, view: int) -> str:
    """q, k and v of one product, taken apart along an axis in front of the batch."""
    qkv = b.op("Reshape", linear(b, x, view, columns=3 * C), np.array([-1, N, 3, HEADS, C // HEADS]))
    qkv = b.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q = b.op("Squeeze", b.op("Slice", qkv, np.array([0]), np.array([1]), np.array([0])), np.array([0]))
    k = b.op("Gather", qkv, np.array(1), axis=0)
    v = b.op("Squeeze", b.op("Slice", qkv, np.array([2]), np.array([3]), np.array([-5])), np.array([0]))
    return b.op("Reshape", b.op("Attention", q, k, v), np.array([-1, N, C]))


def plain_attention(b: Builder, x: str, y: str, view: int) -> str:
    q, k = heads(b, linear(b, x, view)), b.op("Transpose", heads(b, linear(b, y, view, 1)), perm=[0, 1, 3, 2])
    scores = b.op("Softmax", b.op("Mul", b.op("MatMul", q, k), np.float32(0.3)), axis=-1)
    return b.op("Reshape", b.op("MatMul", scores, heads(b, y)), np.array([-1, N, C]))


def refined(b: Builder, x: str, view: int) -> str:
    """Convolutions, a residual sum and a change of resolution, as in the DPT's second half."""
    inner = conv(b, b.op("Relu", conv(b, b.op("Relu", x), view)), view, 1)
    wide = b.op("Resize", b.op("Add", x, inner), "", np.array([1, 1, 2, 2], np.float32), mode="linear")
    return conv(b, wide, view, 2)


def points(b: Builder, x: str, view: int) -> str:
    """Channels to the end, then a direction and a length."""
    last = b.op("Transpose", conv(b, x, view), perm=[0, 2, 3, 1])
    xyz = b.op("Slice", last, np.array([0]), np.array([3]), np.array([3]))
    length = b.op("ReduceL2", xyz, np.array([-1]), keepdims=1)
    far = b.op("Exp", length)
    far = b.op("Sub", far, b.op("CastLike", np.array(1), far))
    return b.op("Mul", b.op("Div", xyz, b.op("Clip", length, np.float32(1e-8))), far)


def shuffled(b: Builder, x: str, view: int) -> str:
    maps = b.op("Reshape", b.op("Transpose", linear(b, x, view), perm=[0, 2, 1]), np.array([-1, C, 2, 3]))
    return b.op("DepthToSpace", maps, blocksize=2, mode="CRD")


BRANCHES: dict[str, tuple[Branch, list[int | str]]] = {
    "linear": (lambda b, x, y, view: linear(b, x, view), TOKENS),
    "linear layers in a row": (lambda b, x, y, view: linear(b, b.op("Gelu", linear(b, x, view)), view, 1), TOKENS),
    "linear, the bias first": (
        lambda b, x, y, view: b.op("Add", weights(C, seed=view), b.op("MatMul", x, weights(C, C, seed=view))),
        TOKENS,
    ),
    "linear, equal weights": (lambda b, x, y, view: linear(b, x, 1), TOKENS),
    "linear of maps": (lambda b, x, y, view: linear(b, x, view, rows=5), MAPS),
    "residual": (lambda b, x, y, view: b.op("Add", x, linear(b, linear(b, x, 1), view)), TOKENS),
    "norm": (lambda b, x, y, view: norm(b, x, view), TOKENS),
    "norm, equal weights": (lambda b, x, y, view: norm(b, x, 1), TOKENS),
    "norm without bias": (lambda b, x, y, view: b.op("LayerNormalization", x, 1 + weights(C, seed=view)), TOKENS),
    "self-attention": (lambda b, x, y, view: attention(b, x, x, view), TOKENS),
    "cross-attention": (lambda b, x, y, view: attention(b, x, y, view), TOKENS),
    "attention spelled out": (plain_attention, TOKENS),
    "packed heads": (lambda b, x, y, view: packed_heads(b, x, view), TOKENS),
    "rotation": (lambda b, x, y, view: rotated(b, x, view), TOKENS),
    "convolution": (lambda b, x, y, view: conv(b, x, view), MAPS),
    "convolution, equal weights": (lambda b, x, y, view: conv(b, x, 1), MAPS),
    "convolution in groups": (lambda b, x, y, view: conv(b, x, view, group=2), MAPS),
    "convolution, only the bias differs": (
        lambda b, x, y, view: b.op("Conv", x, weights(3, C, 1, 1), weights(3, seed=view)),
        MAPS,
    ),
    "convolution without bias": (lambda b, x, y, view: b.op("Conv", x, weights(3, C, 1, 1, seed=view)), MAPS),
    "transposed convolution": (
        lambda b, x, y, view: b.op("ConvTranspose", x, weights(C, 3, 2, 2, seed=view), weights(3, seed=view), strides=[2, 2]),
        MAPS,
    ),
    "refinement": (lambda b, x, y, view: refined(b, x, view), MAPS),
    "points": (lambda b, x, y, view: points(b, x, view), MAPS),
    "depth to space": (lambda b, x, y, view: shuffled(b, x, view), TOKENS),
    "resize of tokens' maps": (
        lambda b, x, y, view: b.op("Resize", b.op("Exp", x), "", np.array([1, 1, 2, 2], np.float32), mode="linear"),
        MAPS,
    ),
    "scale of channels": (lambda b, x, y, view: b.op("Mul", conv(b, x, view), weights(C, 1, 1, seed=view)), MAPS),
    "scale of rows": (lambda b, x, y, view: b.op("Mul", conv(b, x, view), weights(4, 1, seed=view)), MAPS),
    "scale of one number": (lambda b, x, y, view: b.op("Div", np.float32(view), b.op("Exp", conv(b, x, view))), MAPS),
    "shared table": (lambda b, x, y, view: b.op("Mul", linear(b, x, view), weights(N, C)), TOKENS),
    "concatenation of channels": (lambda b, x, y, view: b.op("Concat", x, linear(b, x, view), axis=-1), TOKENS),
    "concatenation of rows": (lambda b, x, y, view: b.op("Concat", x, linear(b, x, view), axis=1), TOKENS),
    "concatenation of maps": (lambda b, x, y, view: b.op("Concat", conv(b, x, view), conv(b, x, view, 1), axis=2), MAPS),
    "concatenation of maps' channels": (lambda b, x, y, view: b.op("Concat", conv(b, x, view), conv(b, x, view, 1), axis=1), MAPS),
    "concatenation of two layouts": (lambda b, x, y, view: b.op("Concat", x, conv(b, x, view), axis=1), MAPS),
    "concatenation of both views": (lambda b, x, y, view: b.op("Concat", x, y, axis=1), TOKENS),
    "split": (lambda b, x, y, view: b.op("Mul", *b.split(linear(b, x, view), 2, -1)), TOKENS),
    "unsqueeze and squeeze": (
        lambda b, x, y, view: b.op("Squeeze", b.op("Exp", b.op("Unsqueeze", x, np.array([0, 2]))), np.array([0, 2])),
        TOKENS,
    ),
    "depth of maps to space": (lambda b, x, y, view: b.op("DepthToSpace", conv(b, x, view), blocksize=2, mode="CRD"), MAPS),
    "resize of channels": (
        lambda b, x, y, view: b.op(
            "Resize",
            conv(b, x, view),
            "",
            np.array([1, 3, 1, 1], np.float32),
            mode="nearest",
            coordinate_transformation_mode="align_corners",
        ),
        MAPS,
    ),
    "a number of the other view's sample": (lambda b, x, y, view: b.op("Add", x, b.op("ReduceMean", y, np.array([1, 2]))), TOKENS),
}


@pytest.mark.parametrize(("branch", "shape"), BRANCHES.values(), ids=BRANCHES.keys())
@pytest.mark.parametrize("batch", ["batch", 1, 3])
def test_every_operation(branch: Branch, shape: list[int | str], batch: int | str) -> None:
    shape = [batch, *shape[1:]]
    model = twins(branch, shape)
    before = count(prepare(model))
    graph, report = apply(model, BatchTwins())
    assert report.declined == []
    assert report.rewrites > 0
    after = count(graph)
    for op in before.keys() - LAYOUT - {"Shape", "Expand", "Mul", "Add"}:
        assert (op, after[op]) == (op, before[op] / 2)
    assert_same(model, graph, *(feeds(shape, size) for size in ([1, 2] if batch == "batch" else [int(batch)])))


def test_products_become_batched_and_convolutions_grouped() -> None:
    model = twins(lambda b, x, y, view: linear(b, x, view))
    graph, _ = apply(model, BatchTwins())
    assert [node.op for node in graph.nodes] == ["Concat", "Reshape", "MatMul", "Add", "Reshape", "Split"]
    weight, bias = (next(node for node in graph.nodes if node.op == op).inputs[1] for op in ("MatMul", "Add"))
    assert (weight.values == np.stack([weights(C, C, seed=1), weights(C, C, seed=2)])).all()
    assert (bias.values == np.stack([weights(C, seed=1), weights(C, seed=2)])[:, None]).all()

    graph, _ = apply(twins(lambda b, x, y, view: conv(b, x, view, group=2), MAPS), BatchTwins())
    (node,) = [node for node in graph.nodes if node.op == "Conv"]
    assert node.attrs["group"] == 4
    assert list(node.inputs[1].shape) == [2 * C, C // 2, 3, 3]


def test_no_layout_changes_between_convolutions_and_none_in_a_residual_stream() -> None:
    def maps(b: Builder, x: str, y: str, view: int) -> str:
        x = b.op("Mul", conv(b, x, view), weights(C, 1, 1, seed=view))
        return refined(b, b.op("Concat", x, x, axis=2), view)

    graph, _ = apply(twins(maps, [1, *MAPS[1:]]), BatchTwins())
    ops = [node.op for node in graph.nodes]
    assert ops[0] == "Concat"
    assert ops[-2:] == ["Reshape", "Split"]
    assert ops.count("Reshape") == 2  # to the channels and back
    assert "Transpose" not in ops

    def stream(b: Builder, x: str, y: str, view: int) -> str:
        for i in range(3):
            x = b.op("Add", x, linear(b, norm(b, x, view, i), view, i))
        return x

    graph, _ = apply(twins(stream), BatchTwins())
    assert count(graph)["Reshape"] == 3  # for the first product, for the first sum, and back


def test_channels_go_to_the_end_by_the_transposition_that_was_there() -> None:
    graph, _ = apply(twins(lambda b, x, y, view: points(b, x, view), [1, *MAPS[1:]]), BatchTwins())
    assert count(graph)["Transpose"] == 1


def test_views_that_read_each_other_are_flipped_once_a_tensor() -> None:
    def decoder(order: Callable[[str, str], tuple[str, str]]) -> onnx.ModelProto:
        b = Builder()
        x = [b.input("x1", TOKENS), b.input("x2", TOKENS)]
        for layer in range(2):
            y = [norm(b, x[i], 1) for i in range(2)]
            x = [b.op("Add", *order(x[i], attention(b, y[i], y[i], i + 1, layer))) for i in range(2)]
            x = [b.op("Add", *order(x[i], attention(b, x[i], y[1 - i], i + 1, 2 + layer))) for i in range(2)]
        name(b, x[0], "out1")
        name(b, x[1], "out2")
        return b.model()

    for order in (lambda a, b: (a, b), lambda a, b: (b, a)):
        model = decoder(order)
        graph, report = apply(model, BatchTwins())
        assert report.rewrites == count(prepare(model)).total() / 2
        assert count(graph)["Gather"] == 2
        assert_same(model, graph, feeds(TOKENS, 2))


def test_several_outputs_share_one_stream() -> None:
    b = Builder()
    for view in (1, 2):
        x = linear(b, b.input(f"x{view}", TOKENS), view)
        name(b, b.op("Exp", x), f"near{view}")
        name(b, b.op("Relu", x), f"far{view}")
    model = b.model()
    graph, report = apply(model, BatchTwins())
    assert report.rewrites == 4
    assert count(graph)["MatMul"] == 1
    assert_same(model, graph, feeds(TOKENS, 2))
    assert [(output.name, output.shape) for output in graph.outputs] == [
        (f"{end}{view}", TOKENS) for view in (1, 2) for end in ("near", "far")
    ]


def test_what_both_views_read_is_computed_once() -> None:
    b = Builder()
    x1, x2 = b.input("x1", TOKENS), b.input("x2", TOKENS)
    shared = b.op("Exp", b.input("s", ["batch", 1, C]))
    for view, x in ((1, x1), (2, x2)):
        name(b, b.op("Mul", linear(b, x, view), shared), f"out{view}")
    name(b, b.op("Relu", shared), "other")
    model = b.model()
    graph, report = apply(model, BatchTwins())
    assert report.rewrites == 3
    assert count(graph)["Exp"] == 1
    assert_same(model, graph, {**feeds(TOKENS, 3), "s": normal(3, 1, C)})


def test_outputs_without_a_twin_are_no_reason_to_look_at_a_graph() -> None:
    b = Builder()
    x = b.input("x1", TOKENS)
    name(b, linear(b, x, 1), "image1")
    graph, report = apply(b.model(), BatchTwins())
    assert (report.rewrites, report.declined) == (0, [])
    assert count(graph)["MatMul"] == 1


def softsign(b: Builder, x: str, y: str, view: int) -> str:
    return b.op("Softsign", x, name=f"softsign{view}")


def scaled_axis(axis: int) -> Branch:
    return lambda b, x, y, view: b.op("Softmax", x, axis=axis, name=f"axis{axis}")


def clipped(b: Builder, x: str, y: str, view: int) -> str:
    return b.op("Clip", x, np.float32(-view), name=f"clip{view}")


def half(part: int) -> Branch:
    return lambda b, x, y, view: b.op("Relu", b.split(linear(b, x, view), 2, -1)[part])


MISSES: dict[str, tuple[onnx.ModelProto, str]] = {
    "views of two sizes": (
        twins(lambda b, x, y, view: b.op("Exp", x), ["batch", "n1", C], shape2=["batch", "n2", C]),
        "the views are not of one shape: x1 is float32 ['batch', 'n1', 8], x2 float32 ['batch', 'n2', 8]",
    ),
    "weights of two shapes": (
        twins(lambda b, x, y, view: b.op("ReduceMax", b.op("MatMul", x, weights(C, 3 + view), name=f"fc{view}"), np.array([-1]))),
        "fc1 (MatMul) and fc2 (MatMul) make float32 ['batch', 6, 4] and float32 ['batch', 6, 5]",
    ),
    "kernels of two shapes": (
        twins(lambda b, x, y, view: b.op("Conv", x, weights(C, C // view, 1, 1), group=view, name=f"conv{view}"), MAPS),
        "the attributes of conv1 (Conv) and conv2 (Conv) differ",
    ),
    "biases of two shapes": (
        twins(lambda b, x, y, view: b.op("Add", x, weights(*[1] * (view - 1), C))),
        "constant_2 is float32 [8], and its twin constant_4 float32 [1, 8]",
    ),
    "an attribute differs": (
        twins(scaled_axis(1), other=scaled_axis(2)),
        "the attributes of axis1 (Softmax) and axis2 (Softmax) differ",
    ),
    "an operation is missing": (
        twins(lambda b, x, y, view: linear(b, b.op("Relu", x, name="relu"), view), other=lambda b, x, y, view: linear(b, x, view)),
        "relu_out0 has no twin: it would be x2",
    ),
    "another operation": (
        twins(lambda b, x, y, view: b.op("Relu", x, name="a"), other=lambda b, x, y, view: b.op("Exp", x, name="b")),
        "a (Relu) and b (Exp) differ",
    ),
    "an operation without a rule": (
        twins(softsign),
        "softsign1 (Softsign) and softsign2 (Softsign) cannot be batched: there is no rule for Softsign",
    ),
    "an operation without a rule below others": (twins(lambda b, x, y, view: linear(b, softsign(b, x, y, view), view)), "softsign1"),
    "along the samples": (twins(scaled_axis(0)), "axis0 (Softmax) works along the axis that the views are joined on"),
    "another parameter": (twins(clipped), "clip1 (Clip) has another parameter in each view"),
    "other outputs of a split": (twins(half(0), other=half(1)), "different outputs of"),
    "two dynamic dimensions": (twins(lambda b, x, y, view: linear(b, x, view), ["batch", "n", "m", C]), "more than one dimension"),
    "an input in one view only": (
        twins(
            lambda b, x, y, view: b.op("Clip", x, "", np.float32(1)),
            other=lambda b, x, y, view: b.op("Clip", x, np.float32(0), np.float32(1)),
        ),
        "an input is given in one view only",
    ),
    "both operands are broadcast": (
        twins(
            lambda b, x, y, view: b.op("Mul", b.op("ReduceMax", x, np.array([1])), b.op("ReduceMax", x, np.array([2])), name=f"outer{view}")
        ),
        "outer1 (Mul) broadcasts both its operands",
    ),
}


@pytest.mark.parametrize(("model", "why"), MISSES.values(), ids=MISSES.keys())
def test_what_cannot_be_batched_stays_and_says_why(model: onnx.ModelProto, why: str) -> None:
    assert_declined(model, why)


def assert_declined(model: onnx.ModelProto, why: str) -> None:
    graph, report = apply(model, BatchTwins())
    untouched = prepare(model)
    assert [(node.name, node.inputs, node.outputs) for node in graph.nodes] == [
        (node.name, node.inputs, node.outputs) for node in untouched.nodes
    ]
    (declined,) = report.declined
    assert report.rewrites == 0
    assert why in declined.why
    assert declined.node in [node.name for node in graph.nodes]
    # What was tried has left nothing behind that would count as a reader.
    assert {name: len(tensor.outputs) for name, tensor in graph.tensors().items()} == {
        name: len(tensor.outputs) for name, tensor in untouched.tensors().items()
    }


def test_nodes_that_something_else_needs_stay() -> None:
    b = Builder()
    x1, x2 = b.input("x1", TOKENS), b.input("x2", TOKENS)
    deep = linear(b, x1, 1)
    name(b, b.op("Exp", deep, name="exp"), "out1")
    name(b, b.op("Exp", linear(b, x2, 2)), "out2")
    name(b, b.op("Relu", deep), "extra")
    assert_declined(b.model(), "has a twin, but more than the paired outputs needs it")

    b = Builder()
    x = [linear(b, b.input(f"x{view}", TOKENS), view) for view in (1, 2)]
    both = b.op("Exp", x[0])
    for i in range(2):
        name(b, b.op("Mul", x[i], both), f"out{i + 1}")
    assert_declined(b.model(), "has a twin, but more than the paired outputs needs it")


def test_weights_that_change_places() -> None:
    b = Builder()
    x = [b.input("x1", TOKENS), b.input("x2", TOKENS)]
    w = [b.constant(weights(C, seed=i)) for i in range(2)]
    for i in range(2):
        name(b, b.op("Add", b.op("Mul", x[i], w[i]), w[1 - i]), f"out{i + 1}")
    model = b.model()
    graph, report = apply(model, BatchTwins())
    assert report.rewrites == 2
    assert_same(model, graph, feeds(TOKENS, 2))


def test_weights_of_the_model_are_left_alone_and_equal_ones_stay_one() -> None:
    wide = 128
    model = twins(lambda b, x, y, view: linear(b, linear(b, x, 1, 5, columns=wide), view, rows=wide))
    before = [weight.SerializeToString() for weight in model.graph.initializer]
    graph, _ = apply(model, BatchTwins())
    assert [weight.SerializeToString() for weight in model.graph.initializer] == before
    ranks = [len(node.inputs[1].shape) for node in graph.nodes if node.op == "MatMul"]
    assert ranks == [2, 3]


def test_a_second_run_changes_nothing() -> None:
    graph, _ = apply(twins(lambda b, x, y, view: linear(b, x, view)), BatchTwins())
    before = len(graph.nodes)
    report = BatchTwins()(graph)
    assert report.rewrites == 0
    assert len(graph.nodes) == before


GRID = {"rows1": 3, "cols1": 4, "rows2": 3, "cols2": 4}


def tokens(batch: int, width: int) -> dict[str, np.ndarray]:
    return {"features1": normal(batch, 3, 4, width), "features2": normal(batch, 3, 4, width, 1)[..., 0]}


@pytest.fixture(scope="module")
def decoder(tiny_bundle: Path) -> onnx.ModelProto:
    return onnx.load(tiny_bundle / "decoder.onnx")


def optimised(model: onnx.ModelProto, dims: dict[str, int], *passes: Any) -> gs.Graph:
    graph = prepare(model)
    for one in (FlashMatch(), RotaryFusion(), FoldPermutation(), FixShapes(dims), *passes):
        one(graph)
    return graph


@pytest.mark.parametrize(("batch", "folded"), [(None, False), (1, True), (3, True)])
def test_decoders_and_heads_become_one(decoder: onnx.ModelProto, batch: int | None, folded: bool) -> None:
    more = [TwinNorms(), FoldConstants(), CommonSubexpressions()] if folded else []
    graph = optimised(decoder, GRID if batch is None else {**GRID, "batch": batch}, *more)
    before, outputs = count(graph), [(output.name, output.shape, output.dtype) for output in graph.outputs]
    report = BatchTwins()(graph)
    assert report.declined == []
    after = count(graph)
    for op in ("MatMul", "Conv", "ConvTranspose", "Attention", "RotaryEmbedding", "LayerNormalization", "Gelu", "Resize", "Relu"):
        assert after[op] == before[op] / 2 > 0
    assert after["Gather"] <= before["Gather"] + before["LayerNormalization"]
    assert [(output.name, output.shape, output.dtype) for output in graph.outputs] == outputs
    width = decoder.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    assert_same(decoder, graph, *(tokens(size, width) for size in ([1, 3] if batch is None else [batch])))


def test_the_plain_decoder_as_well(decoder: onnx.ModelProto) -> None:
    graph = prepare(decoder)
    FixShapes({**GRID, "batch": 1})(graph)
    before = count(graph)
    report = BatchTwins()(graph)
    assert report.declined == []
    assert count(graph)["Softmax"] == before["Softmax"] / 2 > 0
    width = decoder.graph.input[0].type.tensor_type.shape.dim[3].dim_value
    assert_same(decoder, graph, tokens(1, width))


def test_views_of_other_grids_stay_apart(decoder: onnx.ModelProto) -> None:
    for dims in ({}, {**GRID, "rows2": 4}):
        graph = optimised(decoder, dims)
        before = len(graph.nodes)
        report = BatchTwins()(graph)
        (declined,) = report.declined
        assert "the views are not of one shape" in declined.why or "make float32" in declined.why
        assert len(graph.nodes) == before
