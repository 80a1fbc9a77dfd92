from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.base import PassReport
from smc.passes.flash_match import FlashMatch
from tests.passes.graphs import Builder, apply, assert_same, count, normal

HEADS, SIZE = 3, 8
SCALE = np.float32(0.3)

Spelling = Callable[[Builder, str, str], str]
"""From q (B, heads, N, d) and k (B, heads, M, d) to the softmax's input."""


def swap(b: Builder, k: str) -> str:
    return b.op("Transpose", k, perm=[0, 1, 3, 2])


SPELLINGS: dict[str, Spelling] = {
    "no scale": lambda b, q, k: b.op("MatMul", q, swap(b, k)),
    "scale after": lambda b, q, k: b.op("Mul", b.op("MatMul", q, swap(b, k)), SCALE),
    "scale after, first operand": lambda b, q, k: b.op("Mul", SCALE, b.op("MatMul", q, swap(b, k))),
    "division after": lambda b, q, k: b.op("Div", b.op("MatMul", q, swap(b, k)), np.float32(3.0)),
    "scale of one axis": lambda b, q, k: b.op("Mul", b.op("MatMul", q, swap(b, k)), np.array([0.3], dtype=np.float32)),
    "scale on q": lambda b, q, k: b.op("MatMul", b.op("Mul", q, SCALE), swap(b, k)),
    "scale on k before its transpose": lambda b, q, k: b.op("MatMul", q, swap(b, b.op("Mul", k, SCALE))),
    "scale on k after its transpose": lambda b, q, k: b.op("MatMul", q, b.op("Mul", swap(b, k), SCALE)),
    "scale split between q and k": lambda b, q, k: b.op("MatMul", b.op("Mul", q, SCALE), b.op("Div", swap(b, k), np.float32(2.0))),
    "two negative scales": lambda b, q, k: b.op("MatMul", b.op("Mul", q, -SCALE), b.op("Mul", swap(b, k), -SCALE)),
    "scale before, after and computed from the shape": lambda b, q, k: _sdpa(b, q, k),
    "identities and dropout": lambda b, q, k: b.op(
        "Dropout", b.op("MatMul", b.op("Identity", q), b.op("Identity", swap(b, b.op("Identity", k)))), np.float32(0.5)
    ),
}


def _sdpa(b: Builder, q: str, k: str) -> str:
    """As torch's older exporter writes scaled_dot_product_attention when the batch is dynamic."""
    size = b.op("Slice", b.op("Shape", q), np.array([-1]), np.array([2**63 - 1]))
    scale = b.op("Div", np.array([1.0], dtype=np.float32), b.op("Sqrt", b.op("Cast", size, to=onnx.TensorProto.FLOAT)))
    root = b.op("Sqrt", scale)
    return b.op("MatMul", b.op("Mul", q, root), b.op("Mul", swap(b, k), root))


def attention(
    scores: Spelling = SPELLINGS["scale after"],
    *,
    opset: int = 23,
    batch: int | str = "batch",
    dtype: Any = np.float32,
    value_size: int = SIZE,
    constant_nodes: bool = False,
    after: Callable[[Builder, str], str] = lambda b, p: p,
    extra: Callable[[Builder, dict[str, str]], None] = lambda b, t: None,
) -> onnx.ModelProto:
    """out = softmax(scores(q, k)) v with q, k and v as inputs; `after` stands between softmax and product."""
    b = Builder(opset, constant_nodes)
    q = b.input("q", [batch, HEADS, "n", SIZE], dtype)
    k = b.input("k", [batch, HEADS, "m", SIZE], dtype)
    v = b.input("v", [batch, HEADS, "m", value_size], dtype)
    tensors = {"scores": scores(b, q, k)}
    tensors["weights"] = b.op("Softmax", tensors["scores"], axis=-1, name="softmax")
    tensors["out"] = b.op("MatMul", after(b, tensors["weights"]), v, name="weigh")
    extra(b, tensors)
    b.output(tensors["out"], dtype)
    return b.model()


def feeds(batch: int = 2, n: int = 5, m: int = 7, value_size: int = SIZE, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    return {
        "q": normal(batch, HEADS, n, SIZE, dtype=dtype),
        "k": normal(batch, HEADS, m, SIZE, dtype=dtype),
        "v": normal(batch, HEADS, m, value_size, dtype=dtype),
    }


def declined(model: onnx.ModelProto) -> tuple[gs.Graph, str]:
    """The graph, which must be as it was, and the reason."""
    graph, report = apply(model, FlashMatch())
    assert report.rewrites == 0
    assert report.nodes_before == report.nodes_after
    assert "Attention" not in count(graph)
    (only,) = report.declined
    assert only.node == "softmax"
    return graph, only.why


@pytest.mark.parametrize("spelling", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "Constant nodes"])
def test_every_spelling_becomes_one_node(spelling: Spelling, constant_nodes: bool) -> None:
    model = attention(spelling, constant_nodes=constant_nodes)
    graph, report = apply(model, FlashMatch())
    assert (report.rewrites, report.declined) == (1, [])
    assert [node.op for node in graph.nodes] == ["Attention"]
    assert_same(model, graph, feeds(), feeds(1, 3, 3), feeds(3, 1, 11))


@pytest.mark.parametrize("opset", range(17, 24))
@pytest.mark.parametrize("batch", ["batch", 2])
def test_every_opset_static_and_dynamic_batch(opset: int, batch: int | str) -> None:
    model = attention(opset=opset, batch=batch)
    graph, report = apply(model, FlashMatch())
    assert [node.op for node in graph.nodes] == ["Attention"]
    assert graph.opset == 23
    assert report.nodes_before == 5
    assert_same(model, graph, feeds(), feeds(2, 4, 1))


def test_node_keeps_scale_and_output() -> None:
    graph, _ = apply(attention(SPELLINGS["scale split between q and k"]), FlashMatch())
    (node,) = graph.nodes
    assert node.attrs["scale"] == pytest.approx(0.15)
    assert node.attrs.keys() == {"scale"}
    assert node.name == "weigh/attention"
    assert node.outputs[0] is graph.outputs[0]
    assert [tensor.name for tensor in node.inputs] == ["q", "k", "v"]


def test_value_may_have_another_size() -> None:
    model = attention(value_size=5)
    graph, _ = apply(model, FlashMatch())
    assert count(graph) == {"Attention": 1}
    assert_same(model, graph, feeds(value_size=5))


def test_transposes_compose() -> None:
    # k is (B, M, heads, d): one Transpose splits the heads and transposes at once; what is left is the head split.
    b = Builder()
    q, k, v = b.input("q", ["b", HEADS, "n", SIZE]), b.input("k", ["b", "m", HEADS, SIZE]), b.input("v", ["b", HEADS, "m", SIZE])
    scores = b.op("MatMul", q, b.op("Mul", b.op("Transpose", k, perm=[0, 2, 3, 1]), SCALE))
    b.output(b.op("MatMul", b.op("Softmax", scores), v))
    model = b.model()
    graph, _ = apply(model, FlashMatch())
    assert count(graph) == {"Transpose": 1, "Attention": 1}
    assert next(node for node in graph.nodes if node.op == "Transpose").attrs["perm"] == [0, 2, 1, 3]
    assert_same(model, graph, {**feeds(), "k": normal(2, 7, HEADS, SIZE)})


def test_key_that_comes_transposed_is_transposed_back() -> None:
    b = Builder()
    q, k, v = b.input("q", ["b", HEADS, "n", SIZE]), b.input("k", ["b", HEADS, SIZE, "m"]), b.input("v", ["b", HEADS, "m", SIZE])
    b.output(b.op("MatMul", b.op("Softmax", b.op("MatMul", q, k)), v))
    model = b.model()
    graph, _ = apply(model, FlashMatch())
    assert count(graph) == {"Transpose": 1, "Attention": 1}
    assert_same(model, graph, {**feeds(), "k": normal(2, HEADS, SIZE, 7)})


def test_head_split_below_the_transpose_stays() -> None:
    b = Builder()
    q, k, v = b.input("q", ["b", HEADS, "n", SIZE]), b.input("k", ["b", "m", HEADS * SIZE]), b.input("v", ["b", HEADS, "m", SIZE])
    split = b.op("Transpose", b.op("Reshape", k, np.array([0, 0, HEADS, SIZE])), perm=[0, 2, 1, 3])
    b.output(b.op("MatMul", b.op("Softmax", b.op("MatMul", q, swap(b, split))), v))
    model = b.model()
    graph, _ = apply(model, FlashMatch())
    assert count(graph) == {"Reshape": 1, "Transpose": 1, "Attention": 1}
    assert_same(model, graph, {**feeds(), "k": normal(2, 7, HEADS * SIZE)})


@pytest.mark.parametrize("opset", [17, 23])
@pytest.mark.parametrize("batch", ["b", 6])
def test_three_dimensions_get_a_heads_axis(opset: int, batch: int | str) -> None:
    b = Builder(opset)
    q, k, v = b.input("q", [batch, "n", SIZE]), b.input("k", [batch, "m", SIZE]), b.input("v", [batch, "m", SIZE])
    scores = b.op("Mul", b.op("MatMul", q, b.op("Transpose", k, perm=[0, 2, 1])), SCALE)
    b.output(b.op("MatMul", b.op("Softmax", scores), v))
    model = b.model()
    graph, report = apply(model, FlashMatch())
    assert report.rewrites == 1
    assert count(graph) == {"Unsqueeze": 3, "Attention": 1, "Squeeze": 1}
    assert_same(model, graph, {"q": normal(6, 5, SIZE), "k": normal(6, 7, SIZE), "v": normal(6, 7, SIZE)})


def test_half_precision_with_a_softmax_in_float32() -> None:
    cast: Spelling = lambda b, q, k: b.op("Cast", SPELLINGS["no scale"](b, q, k), to=onnx.TensorProto.FLOAT)  # noqa: E731
    model = attention(cast, dtype=np.float16, after=lambda b, p: b.op("Cast", p, to=onnx.TensorProto.FLOAT16))
    graph, _ = apply(model, FlashMatch())
    assert [node.op for node in graph.nodes] == ["Attention"]
    assert graph.outputs[0].dtype == np.float16
    # float16 has a unit roundoff of 5e-4, and the two runtimes round the scores and weights at different places.
    assert_same(model, graph, feeds(dtype=np.float16), tolerance=2e-3)


def test_shared_operands_stay_for_their_other_readers() -> None:
    def extra(b: Builder, tensors: dict[str, str]) -> None:
        b.output(b.op("Neg", "scaled_out0"))

    def scores(b: Builder, q: str, k: str) -> str:
        return b.op("MatMul", b.op("Mul", q, SCALE, name="scaled"), swap(b, k))

    model = attention(scores, extra=extra)
    graph, report = apply(model, FlashMatch())
    assert report.rewrites == 1
    assert count(graph) == {"Mul": 1, "Neg": 1, "Attention": 1}
    assert_same(model, graph, feeds())


def test_other_softmaxes_are_reported_each() -> None:
    def extra(b: Builder, tensors: dict[str, str]) -> None:
        b.output(b.op("Softmax", b.op("Relu", "q", name="relu"), name="classifier"))

    model = attention(extra=extra)
    graph, report = apply(model, FlashMatch())
    assert report.rewrites == 1
    assert [(item.node, item.why) for item in report.declined] == [("classifier", "relu (Relu) stands between the product and the softmax")]
    assert_same(model, graph, feeds())


def _softmax_axis(b: Builder) -> str:
    return b.op("MatMul", b.op("Softmax", b.op("MatMul", "q", swap(b, "k")), axis=2, name="softmax"), "v")


NEAR_MISSES: dict[str, tuple[dict[str, Any], str]] = {
    "mask": (
        {"scores": lambda b, q, k: b.op("Add", b.op("MatMul", q, swap(b, k)), normal(1, 1, 5, 7), name="mask")},
        "mask (Add) adds a mask or a bias to the scores",
    ),
    "masked by Where": (
        {
            "scores": lambda b, q, k: b.op(
                "Where", np.ones((5, 7), dtype=bool), b.op("MatMul", q, swap(b, k)), np.float32(-1e9), name="mask"
            )
        },
        "mask (Where) adds a mask or a bias to the scores",
    ),
    "scale that is a tensor": (
        {"scores": lambda b, q, k: b.op("Mul", b.op("MatMul", q, swap(b, k)), normal(1, HEADS, 1, 1), name="per_head")},
        "per_head (Mul) stands between the product and the softmax",
    ),
    "nonlinearity": (
        {"scores": lambda b, q, k: b.op("Tanh", b.op("MatMul", q, swap(b, k)), name="cap")},
        "cap (Tanh) stands between the product and the softmax",
    ),
    "negative scale": ({"scores": lambda b, q, k: b.op("Mul", b.op("MatMul", q, swap(b, k)), -SCALE)}, "the scale is -0.3"),
    "scores read elsewhere": (
        {"extra": lambda b, t: b.output(b.op("Neg", t["scores"], name="other"))},
        "is read by softmax, other, not by one node alone",
    ),
    "weights read elsewhere": (
        {"extra": lambda b, t: b.output(b.op("Neg", t["weights"], name="other"))},
        "softmax_out0 is read by weigh, other, not by one node alone",
    ),
    "weights an output": ({"extra": lambda b, t: b.output(t["weights"])}, "softmax_out0 is an output of the graph"),
    "weights changed": (
        {"after": lambda b, p: b.op("Mul", p, np.float32(2.0), name="twice")},
        "twice (Mul) takes the softmax's result, not a product with v on the right",
    ),
    "dropout that drops": (
        {"after": lambda b, p: b.op("Dropout", p, np.float32(0.0), np.array(True), name="drop")},
        "drop (Dropout) takes the softmax's result",
    ),
    "float64": ({"scores": SPELLINGS["no scale"], "dtype": np.float64}, "q, k and v are of type float64, float64, float64"),
}


@pytest.mark.parametrize(("changes", "why"), NEAR_MISSES.values(), ids=NEAR_MISSES.keys())
def test_near_misses_are_left_alone_with_the_reason(changes: dict[str, Any], why: str) -> None:
    model = attention(**changes)
    graph, reason = declined(model)
    assert why in reason
    assert_same(model, graph, feeds(dtype=changes.get("dtype", np.float32)), tolerance=0.0)


def test_softmax_over_another_axis() -> None:
    b = Builder()
    for name, size in (("q", "n"), ("k", "n"), ("v", "n")):
        b.input(name, ["b", HEADS, size, SIZE])
    b.output(_softmax_axis(b))
    _, why = declined(b.model())
    assert why == "the softmax is over axis 2, not over the last one"


@pytest.mark.parametrize(
    ("q", "k", "v", "why"),
    [
        ([2, 3, 5, 8], [2, 1, 7, 8], [2, 1, 7, 8], "k^T is broadcast over axis 1, where q has 3 and it has 1"),
        (["b", 3, 5, 8], [1, 3, 7, 8], [1, 3, 7, 8], "k^T is broadcast over axis 0, where q has b and it has 1"),
        (["b", 3, 5, 8], ["b", 3, 7, 8], ["c", 3, 7, 8], "v is broadcast over axis 0, where q has b and it has c"),
        ([2, 3, 4, 5, 8], [2, 3, 4, 7, 8], [2, 3, 4, 7, 8], "the operands must all have three or four dimensions"),
        ([5, 8], [7, 8], [7, 8], "the operands must all have three or four dimensions"),
        (["b", 3, 5, 8], [7, 8], [7, 8], "the operands must all have three or four dimensions"),
    ],
)
def test_shapes_that_attention_does_not_take(q: list[Any], k: list[Any], v: list[Any], why: str) -> None:
    b = Builder()
    b.input("q", q), b.input("k", k), b.input("v", v)
    order = list(range(len(k)))
    transposed = b.op("Transpose", "k", perm=[*order[:-2], order[-1], order[-2]])
    b.output(b.op("MatMul", b.op("Softmax", b.op("MatMul", "q", transposed), name="softmax"), "v"))
    _, reason = declined(b.model())
    assert why in reason


def test_product_on_the_left_of_the_weights() -> None:
    b = Builder()
    b.input("q", ["b", HEADS, "n", SIZE]), b.input("k", ["b", HEADS, "n", SIZE]), b.input("v", ["b", HEADS, SIZE, "n"])
    b.output(b.op("MatMul", "v", b.op("Softmax", b.op("MatMul", "q", swap(b, "k")), name="softmax"), name="left"))
    _, why = declined(b.model())
    assert why == "left (MatMul) takes the softmax's result, not a product with v on the right"


def test_unnamed_nodes_are_called_by_what_they_make() -> None:
    model = attention(NEAR_MISSES["nonlinearity"][0]["scores"])
    for node in model.graph.node:
        node.name = ""
    _, report = apply(model, FlashMatch())
    assert report.declined[0].node == "Softmax that makes softmax_out0"
    assert "Tanh that makes cap_out0" in report.declined[0].why


def test_report_of_a_graph_without_softmax() -> None:
    b = Builder()
    b.output(b.op("Relu", b.input("x", [2])))
    _, report = apply(b.model(), FlashMatch())
    assert report == PassReport("FlashMatch", rewrites=0, declined=[], nodes_before=1, nodes_after=1)
