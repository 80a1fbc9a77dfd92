from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from smc.passes.attention_plugin import AttentionPlugin
from smc.passes.cancel_layout import CancelLayout
from smc.plugins.flash_attention import onnx_function
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal, weights

HEADS, SIZE, SCALE = 3, 32, 0.2
CHANNELS = HEADS * SIZE
HEADS_FIRST = [0, 2, 1, 3]
HALF = np.float16
TOLERANCE = 2e-3
"""A float16 has 11 bits; a wrong channel makes the error 1."""

Parts = Callable[[Builder, str], list[str]]
"""From a projection (batch, tokens, 3 * CHANNELS) to q, k and v (batch, HEADS, tokens, SIZE)."""


def project(b: Builder, x: str, width: int = 3 * CHANNELS) -> str:
    size = 16
    return b.op("Add", b.op("MatMul", x, 3 * weights(size, width).astype(HALF)), normal(width, dtype=HALF))


def split_heads(b: Builder, x: str) -> str:
    return b.op("Transpose", b.op("Reshape", x, np.array([0, 0, HEADS, SIZE])), perm=HEADS_FIRST)


def taken_apart(b: Builder, x: str) -> str:
    """(batch, tokens, 3 * CHANNELS) -> (3, batch, HEADS, tokens, SIZE), as exported models do."""
    return b.op("Transpose", b.op("Reshape", x, np.array([0, 0, 3, HEADS, SIZE])), perm=[2, 0, 3, 1, 4])


def channels(b: Builder, x: str, start: int, end: int, step: int = 1) -> str:
    return b.op("Slice", x, np.array([start]), np.array([end]), np.array([-1]), np.array([step]))


def slices_of_parts(b: Builder, x: str) -> list[str]:
    parts = taken_apart(b, x)
    bounds = [(np.array([i]), np.array([i + 1])) for i in range(3)]
    return [b.op("Squeeze", b.op("Slice", parts, *bound, np.array([0])), np.array([0])) for bound in bounds]


def split_twice(b: Builder, x: str) -> list[str]:
    q, pair = b.op("Split", x, np.array([CHANNELS, 2 * CHANNELS]), outputs=2, axis=-1)
    return [split_heads(b, part) for part in (q, *b.split(pair, 2, -1))]


def regrouped(b: Builder, x: str) -> list[str]:
    """Attention within pairs of tokens, each an image of its own: batch and tokens are others than the projection's."""
    pairs = b.op("Reshape", x, np.array([-1, 2, 3 * CHANNELS]))
    return [split_heads(b, part) for part in b.split(pairs, 3, -1)]


def of_odd_rows(b: Builder, x: str) -> list[str]:
    wider = b.op("Concat", x, channels(b, x, 0, 8), axis=-1)
    return [split_heads(b, channels(b, wider, i * CHANNELS, (i + 1) * CHANNELS)) for i in range(3)]


IN_PLACE: dict[str, Parts] = {
    "slices of parts": slices_of_parts,
    "indices of parts": lambda b, x: [b.op("Gather", taken_apart(b, x), np.array(i), axis=0) for i in (0, 1, -1)],
    "split parts": lambda b, x: [b.op("Squeeze", part, np.array([0])) for part in b.split(taken_apart(b, x), 3, 0)],
    "split channels": lambda b, x: [split_heads(b, part) for part in b.split(x, 3, -1)],
    "split twice": split_twice,
    "slices of channels": lambda b, x: [
        split_heads(b, channels(b, x, start, end)) for start, end in ((0, CHANNELS), (CHANNELS, 2 * CHANNELS), (-CHANNELS, 2**63 - 1))
    ],
    "split heads": lambda b, x: b.split(b.op("Transpose", b.op("Reshape", x, np.array([0, 0, -1, SIZE])), perm=HEADS_FIRST), 3, 1),
}
COPIED: dict[str, Parts] = {
    "channels apart": lambda b, x: [split_heads(b, channels(b, x, i, 3 * CHANNELS, 3)) for i in range(3)],
    "heads outside parts": lambda b, x: [
        b.op("Gather", b.op("Transpose", b.op("Reshape", x, np.array([0, 0, HEADS, 3, SIZE])), perm=[3, 0, 2, 1, 4]), np.array(i), axis=0)
        for i in range(3)
    ],
    "not a multiple of 16": lambda b, x: [split_heads(b, channels(b, x, 8 + i, 8 + i + CHANNELS)) for i in range(3)],
    "rows not a multiple of 16": of_odd_rows,
    "heads of neighbours": lambda b, x: [
        b.op("Transpose", b.op("Reshape", part, np.array([0, 0, SIZE, HEADS])), perm=[0, 3, 1, 2]) for part in b.split(x, 3, -1)
    ],
    "computed": lambda b, x: [b.op("Neg", part) for part in slices_of_parts(b, x)],
}


def attention(parts: Parts, *, batch: int | str = "batch", **attrs: Any) -> onnx.ModelProto:
    """One self-attention, its heads joined again and projected."""
    b = Builder()
    x = b.input("x", [batch, "tokens", 16], HALF)
    out = b.op("Attention", *parts(b, project(b, x)), name="attend", **{"scale": SCALE} | attrs)
    joined = b.op("Reshape", b.op("Transpose", out, perm=HEADS_FIRST), np.array([0, 0, CHANNELS]))
    b.output(b.op("MatMul", joined, weights(CHANNELS, 8).astype(HALF)), HALF)
    return b.model()


def plain(shape: tuple[int | str, ...] = ("batch", HEADS, "tokens", SIZE), dtype: Any = HALF, **attrs: Any) -> onnx.ModelProto:
    """Attention of three inputs, and nothing else."""
    b = Builder()
    b.output(b.op("Attention", *(b.input(x, shape, dtype) for x in "qkv"), name="attend", **attrs), dtype)
    return b.model()


def runnable(graph: gs.Graph) -> gs.Graph:
    """With the operation's definition, by which ONNX Runtime runs it."""
    empty = helper.make_graph([], "functions", [], [])
    versions = [helper.make_opsetid("", onnx_function.OPSET), helper.make_opsetid("smc", 1)]
    model = helper.make_model(empty, opset_imports=versions, functions=[onnx_function.flash_attention(rotary=False)], ir_version=10)
    graph.functions = gs.import_onnx(model).functions
    return graph


def plugin(graph: gs.Graph) -> gs.Node:
    (node,) = (node for node in graph.nodes if node.op == "FlashAttention")
    return node


def offsets(node: gs.Node) -> list[int]:
    return [node.attrs[f"{x}_offset"] for x in "qkv"]


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("batch", [1, "batch"])
def test_parts_of_a_projection_are_read_in_place(name: str, batch: int | str) -> None:
    model = attention(IN_PLACE[name], batch=batch)
    graph, _ = apply(model, AttentionPlugin(), CancelLayout())
    node = plugin(graph)
    assert len({tensor.name for tensor in node.inputs}) == 1
    assert node.inputs[0].inputs[0].op == "Add"
    assert offsets(node) == [0, CHANNELS, 2 * CHANNELS]
    assert count(graph) == {"MatMul": 2, "Add": 1, "FlashAttention": 1}
    sizes = [1] if batch == 1 else [1, 2]
    assert_same(model, runnable(graph), *({"x": normal(size, n, 16, dtype=HALF)} for size in sizes for n in (1, 7)), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", COPIED)
def test_other_operands_are_laid_out_first(name: str) -> None:
    model = attention(COPIED[name])
    graph, report = apply(model, AttentionPlugin())
    assert report.rewrites == 1
    assert offsets(plugin(graph)) == [0, 0, 0]
    assert [list(tensor.shape) for tensor in plugin(graph).inputs] == 3 * [["batch", "tokens", CHANNELS]]
    assert_same(model, runnable(graph), {"x": normal(2, 7, 16, dtype=HALF)}, tolerance=TOLERANCE)


def test_a_batch_that_is_not_the_projections() -> None:
    b = Builder()
    x = b.input("x", [2, 6, 16], HALF)
    out = b.op("Attention", *regrouped(b, project(b, x)), name="attend", scale=SCALE)
    b.output(b.op("Reshape", out, np.array([2, 6, CHANNELS])), HALF)
    model = b.model()
    graph, _ = apply(model, AttentionPlugin())
    assert [list(tensor.shape) for tensor in plugin(graph).inputs] == 3 * [[6, 2, 3 * CHANNELS]]
    assert_same(model, runnable(graph), {"x": normal(2, 6, 16, dtype=HALF)}, tolerance=TOLERANCE)


def test_rotated_operands_are_laid_out_and_the_values_read_in_place() -> None:
    """As in the network: cross-attention of n queries and m keys, which come rotated."""
    b = Builder()
    x, y = b.input("x", ["batch", "n", 16], HALF), b.input("y", ["batch", "m", 16], HALF)
    caches = {
        name: [b.input(f"{table}_{name}", ["batch", size, SIZE // 2], HALF) for table in ("cos", "sin")]
        for name, size in (("q", "n"), ("k", "m"))
    }
    k, v = b.split(project(b, y, 2 * CHANNELS), 2, -1)
    q, k = (b.op("RotaryEmbedding", split_heads(b, part), *caches[name]) for name, part in (("q", project(b, x, CHANNELS)), ("k", k)))
    b.output(b.op("Attention", q, k, split_heads(b, v), name="attend", scale=SCALE), HALF)
    model = b.model()
    graph, _ = apply(model, AttentionPlugin(), CancelLayout())
    node = plugin(graph)
    assert offsets(node) == [0, 0, CHANNELS]
    assert node.inputs[2].inputs[0].op == "Add"
    feed = {"x": normal(2, 5, 16, dtype=HALF), "y": normal(2, 9, 16, dtype=HALF)}
    tables = {f"{table}_{x}": normal(2, n, SIZE // 2, dtype=HALF) for table in ("cos", "sin") for x, n in (("q", 5), ("k", 9))}
    assert_same(model, runnable(graph), feed | tables, tolerance=TOLERANCE)


def test_what_tensorrt_is_told() -> None:
    graph, _ = apply(attention(slices_of_parts), AttentionPlugin())
    node = plugin(graph)
    assert node.domain == "smc"
    assert dict(node.attrs) == {
        "num_heads": HEADS, "head_size": SIZE, "scale": pytest.approx(SCALE), "q_offset": 0, "k_offset": CHANNELS,
        "v_offset": 2 * CHANNELS, "plugin_namespace": "smc", "aot": 1,
    }  # fmt: skip
    model = gs.export_onnx(graph)
    assert {(opset.domain, opset.version) for opset in model.opset_import} == {("", 23), ("smc", 1)}
    assert not model.functions


def test_the_scale_that_attention_has_by_default() -> None:
    model = plain()
    graph, _ = apply(model, AttentionPlugin())
    assert plugin(graph).attrs["scale"] == pytest.approx(SIZE**-0.5)
    feed = {x: 3 * normal(2, HEADS, 5, SIZE, dtype=HALF)[:, :, ::step] for x, step in (("q", 1), ("k", -1), ("v", 1))}
    assert_same(model, runnable(graph), feed, tolerance=TOLERANCE)


def test_bfloat16() -> None:
    b = Builder()
    x = b.op("Cast", b.input("x", ["batch", "tokens", 3 * CHANNELS]), to=TensorProto.BFLOAT16)
    b.output(b.op("Cast", b.op("Attention", *slices_of_parts(b, x), scale=SCALE), to=TensorProto.FLOAT))
    graph, report = apply(b.model(), AttentionPlugin())
    assert report.rewrites == 1
    assert plugin(graph).outputs[0].dtype == TensorProto.BFLOAT16
    onnx.checker.check_model(gs.export_onnx(runnable(graph)), full_check=True)


def test_every_attention_of_a_graph() -> None:
    """Also two that share their projection: the layout nodes of both go."""
    b = Builder()
    packed = project(b, b.input("x", ["batch", "tokens", 16], HALF))
    q, k, v = slices_of_parts(b, packed)
    outputs = [b.op("Attention", *operands, name=f"attend_{i}", scale=SCALE) for i, operands in enumerate(((q, k, v), (k, q, v)))]
    for output in outputs:
        b.output(output, HALF)
    model = b.model()
    graph, report = apply(model, AttentionPlugin())
    assert report.rewrites == 2
    assert count(graph) == {"MatMul": 1, "Add": 1, "FlashAttention": 2, "Reshape": 2, "Transpose": 2}
    assert_same(model, runnable(graph), {"x": normal(2, 7, 16, dtype=HALF)}, tolerance=TOLERANCE)


def masked() -> onnx.ModelProto:
    b = Builder()
    q, k, v = (b.input(x, ["batch", HEADS, 8, SIZE], HALF) for x in "qkv")
    b.output(b.op("Attention", q, k, v, b.input("mask", [8, 8], HALF), name="attend"), HALF)
    return b.model()


def with_scores() -> onnx.ModelProto:
    b = Builder()
    out, _, _, scores = b.op("Attention", *(b.input(x, ["batch", HEADS, 8, SIZE], HALF) for x in "qkv"), name="attend", outputs=4)
    b.nodes[-1].output[1] = b.nodes[-1].output[2] = ""
    b.output(out, HALF)
    b.output(scores, HALF)
    return b.model()


def of_unequal_heads(q_heads: int = HEADS, value_size: int = SIZE) -> onnx.ModelProto:
    b = Builder()
    q = b.input("q", ["batch", q_heads, "n", SIZE], HALF)
    k, v = b.input("k", ["batch", HEADS, "m", SIZE], HALF), b.input("v", ["batch", HEADS, "m", value_size], HALF)
    b.output(b.op("Attention", q, k, v, name="attend"), HALF)
    return b.model()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (masked(), "it has a mask, a cache or a cap of the scores"),
        (plain(is_causal=1), "it has a mask, a cache or a cap of the scores"),
        (plain(softcap=5.0), "it has a mask, a cache or a cap of the scores"),
        (with_scores(), "it has outputs besides the first"),
        (plain(dtype=np.float32), "q, k and v are of type float32, float32, float32; the kernel takes float16 or bfloat16"),
        (plain(("batch", "tokens", CHANNELS), q_num_heads=HEADS, kv_num_heads=HEADS), "q, k and v must have four dimensions"),
        (plain(("batch", HEADS, "tokens", 48)), "the head size is 48, and the kernel takes 32, 64, 128"),
        (plain(("batch", "heads", "tokens", SIZE)), "heads and their sizes must be known and equal, and are q None of 32"),
        (of_unequal_heads(q_heads=2 * HEADS), "heads and their sizes must be known and equal, and are q 6 of 32, k 3 of 32, v 3 of 32"),
        (of_unequal_heads(value_size=2 * SIZE), "heads and their sizes must be known and equal, and are .*v 3 of 64"),
        (plain(scale=-1.0), "the scale is -1.0, and the kernel takes positive ones"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_left_alone(model: onnx.ModelProto, why: str) -> None:
    ((node, reason),) = left_alone(model, AttentionPlugin())
    assert node == "attend"
    assert re.match(why, reason)
