from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.flash_match import FlashMatch
from smc.passes.rotary_fusion import RotaryFusion
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal

HEADS, SIZE = 3, 8
HALF = SIZE // 2
LENGTH = 16
"""Positions in the constant tables."""

Spelling = Callable[[Builder, str], str]
"""From x (B, heads, N, d) to its rotation."""

ANGLES = np.outer(np.arange(LENGTH), 100.0 ** -np.linspace(0, 1, HALF, endpoint=False)).astype(np.float32)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)
"""(LENGTH, d/2)"""


def last(b: Builder, *parts: str) -> str:
    return b.op("Concat", *parts, axis=-1)


def part(b: Builder, x: str, start: int, stop: int, step: int = 1) -> str:
    """x[..., start:stop:step]"""
    return b.op("Slice", x, np.array([start]), np.array([stop]), np.array([-1]), np.array([step]))


def tables(b: Builder, twice: bool = True) -> tuple[str, str]:
    """cos and sin (B, 1, N, d) of the graph's positions (B, N), out of constant tables; of d/2 channels if not `twice`."""
    cos, sin = (np.concatenate([t, t], axis=-1) if twice else t for t in (COS, SIN))
    chosen = [b.op("Gather", table, "positions", axis=0) for table in (cos, sin)]
    one = np.array([1])
    return b.op("Unsqueeze", chosen[0], one), b.op("Unsqueeze", chosen[1], one)


def rotate_half(b: Builder, x: str, width: int = SIZE) -> str:
    first, second = part(b, x, 0, width // 2), part(b, x, width // 2, width)
    return last(b, b.op("Neg", second), first)


def neox(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin))


def neox_sine_first(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    return b.op("Add", b.op("Mul", sin, rotate_half(b, x)), b.op("Mul", cos, x))


def two_products(b: Builder, x: str) -> str:
    cos, sin = tables(b, twice=False)
    first, second = b.split(x, 2, 3)
    a = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    return last(b, a, b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin)))


def four_chunks(b: Builder, x: str) -> str:
    """As this project's exporter writes RoPE2D: angles of rows and columns, each table once for both partners."""
    cos, sin = grid_tables(b)
    q0, q1, q2, q3 = b.split(x, 4, 3)
    turned = last(b, b.op("Neg", q1), q0, b.op("Neg", q3), q2)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


def grid_tables(b: Builder) -> tuple[str, str]:
    """cos and sin (B, 1, N, d): row angles, twice, then column angles, twice, from two position inputs (B, N)."""
    angles = []
    for axis in ("rows", "cols"):
        position = b.op("Unsqueeze", b.op("Cast", axis, to=onnx.TensorProto.FLOAT), np.array([-1]))
        angles.append(b.op("Mul", position, np.array([1.0, 0.1], dtype=np.float32)))
    rows, cols = angles
    angle = b.op("Unsqueeze", last(b, rows, rows, cols, cols), np.array([1]))
    return b.op("Cos", angle), b.op("Sin", angle)


def two_halves(b: Builder, x: str) -> str:
    """As CroCo writes RoPE2D: y and x rotated on their own with gathered tables, then joined."""
    cos_table, sin_table = (np.concatenate([t, t], axis=-1)[:, ::2].copy() for t in (COS, SIN))
    halves = []
    for half, axis in zip(b.split(x, 2, 3), ("rows", "cols"), strict=True):
        cos = b.op("Unsqueeze", b.op("Gather", cos_table, axis, axis=0), np.array([1]))
        sin = b.op("Unsqueeze", b.op("Gather", sin_table, axis, axis=0), np.array([1]))
        halves.append(b.op("Add", b.op("Mul", half, cos), b.op("Mul", rotate_half(b, half, HALF), sin)))
    return last(b, *halves)


def signs_in_the_table(b: Builder, x: str) -> str:
    cos = b.op("Gather", np.concatenate([COS, COS], axis=-1), "positions", axis=0)
    sin = b.op("Gather", np.concatenate([-SIN, SIN], axis=-1), "positions", axis=0)
    cos, sin = (b.op("Unsqueeze", table, np.array([1])) for table in (cos, sin))
    swapped = b.op("Gather", x, np.roll(np.arange(SIZE), HALF), axis=-1)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", swapped, sin))


def interleaved(b: Builder, x: str) -> str:
    """Neighbours turn together, and come out in halves."""
    cos, sin = tables(b, twice=False)
    even, odd = part(b, x, 0, SIZE, 2), part(b, x, 1, SIZE, 2)
    a = b.op("Sub", b.op("Mul", even, cos), b.op("Mul", odd, sin))
    return last(b, a, b.op("Add", b.op("Mul", even, sin), b.op("Mul", odd, cos)))


def turned_backwards(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    return b.op("Sub", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin))


def scaled(b: Builder, x: str) -> str:
    return b.op("Div", b.op("Mul", neox(b, x), np.float32(3.0)), np.float32(2.0))


def sliced_by_the_shape(b: Builder, x: str) -> str:
    """x[..., : x.shape[-1] // 2], as torch's older exporter writes it."""
    cos, sin = tables(b)
    width = b.op("Gather", b.op("Shape", x), np.array(3))
    middle = b.op("Unsqueeze", b.op("Div", width, np.array(2)), np.array([0]))
    first = b.op("Slice", x, np.array([0]), middle, np.array([3]))
    second = b.op("Slice", x, middle, np.array([2**63 - 1]), np.array([3]))
    turned = last(b, b.op("Neg", second), first)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


SPELLINGS = {
    function.__name__: function
    for function in (
        neox,
        neox_sine_first,
        two_products,
        four_chunks,
        two_halves,
        signs_in_the_table,
        interleaved,
        turned_backwards,
        scaled,
        sliced_by_the_shape,
    )
}
IN_ORDER = {"neox", "neox_sine_first", "two_products", "signs_in_the_table", "scaled", "sliced_by_the_shape"}
"""Spellings whose partners already lie half the channels apart, minus first."""


def attention(
    rotate_q: Spelling,
    rotate_k: Spelling | None = None,
    *,
    opset: int = 23,
    batch: int | str = "batch",
    layers: int = 1,
    constant_nodes: bool = False,
    extra: Callable[[Builder, dict[str, str]], None] = lambda b, t: None,
) -> onnx.ModelProto:
    """Layers of softmax(rotate_q(q) rotate_k(k)^T) v, each the next one's q, spelled out."""
    b = Builder(opset, constant_nodes)
    x = b.input("q", [batch, HEADS, "n", SIZE])
    b.input("k", [batch, HEADS, "n", SIZE]), b.input("v", [batch, HEADS, "n", SIZE])
    for name in ("positions", "rows", "cols"):
        b.input(name, [batch, "n"], np.int64)
    for _ in range(layers):
        tensors = {"q": rotate_q(b, x), "k": (rotate_k or rotate_q)(b, "k")}
        scores = b.op("Mul", b.op("MatMul", tensors["q"], b.op("Transpose", tensors["k"], perm=[0, 1, 3, 2])), np.float32(0.4))
        tensors["out"] = x = b.op("MatMul", b.op("Softmax", scores), "v", name="weigh" if layers == 1 else None)
    extra(b, tensors)
    b.output(x)
    return b.model()


def feeds(batch: int = 2, n: int = 6) -> dict[str, np.ndarray]:
    numbers = np.random.default_rng(n)
    qkv = {name: normal(batch, HEADS, n, SIZE) + i for i, name in enumerate("qkv")}
    return qkv | {name: numbers.integers(0, LENGTH, (batch, n)) for name in ("positions", "rows", "cols")}


def fuse(model: onnx.ModelProto, rewrites: int = 2) -> gs.Graph:
    graph, report = apply(model, FlashMatch(), RotaryFusion())
    assert (report.rewrites, report.declined) == (rewrites, [])
    return graph


def reason(model: onnx.ModelProto) -> str:
    """Why the one attention is left alone; the graph must not have changed."""
    graph, report = apply(model, FlashMatch(), RotaryFusion())
    assert report.rewrites == 0
    assert report.nodes_before == report.nodes_after
    assert count(graph)["RotaryEmbedding"] == 0
    assert_same(model, graph, feeds())
    (only,) = report.declined
    assert only.node == "weigh/attention"
    return only.why


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "Constant nodes"])
def test_every_spelling_becomes_one_node(name: str, constant_nodes: bool) -> None:
    model = attention(SPELLINGS[name], constant_nodes=constant_nodes)
    graph = fuse(model)
    counts = count(graph)
    assert (counts["RotaryEmbedding"], counts["Attention"]) == (2, 1)
    assert not {"Add", "Sub", "Neg", "Slice", "Split", "Softmax"} & set(counts) - ({"Mul"} if name == "four_chunks" else set())
    permutations = [node for node in graph.nodes if node.name.endswith("/permutation")]
    assert len(permutations) == (0 if name in IN_ORDER else 2)
    assert_same(model, graph, feeds(), feeds(1, 1), feeds(3, 11))


@pytest.mark.parametrize("opset", range(17, 24))
@pytest.mark.parametrize("batch", ["batch", 2])
@pytest.mark.parametrize("name", ["four_chunks", "two_halves", "two_products", "sliced_by_the_shape"])
def test_every_opset_static_and_dynamic_batch(opset: int, batch: int | str, name: str) -> None:
    model = attention(SPELLINGS[name], opset=opset, batch=batch)
    graph = fuse(model)
    assert count(graph)["RotaryEmbedding"] == 2
    assert_same(model, graph, feeds(), feeds(2, 3))


def test_permutation_brings_partners_half_the_channels_apart() -> None:
    graph = fuse(attention(four_chunks))
    for node in graph.nodes:
        if node.op == "RotaryEmbedding":
            assert node.attrs["interleaved"] == 0
            assert node.i(0).op == "Gather"
            # Quarters 0 and 2 have the minus, 1 and 3 are their partners.
            assert node.i(0).inputs[1].values.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
            assert [tensor.shape[-1] for tensor in node.inputs] == [SIZE, HALF, HALF]


def test_scale_goes_into_the_attention() -> None:
    graph = fuse(attention(scaled))
    (node,) = (node for node in graph.nodes if node.op == "Attention")
    assert node.attrs["scale"] == pytest.approx(0.4 * 1.5**2)


@pytest.mark.parametrize(("spelling", "gathers"), [("shared", 8 + 2), ("two_halves", 8 + 4 + 2), ("neox", 2 + 2)])
def test_tables_are_made_once_for_all_layers(spelling: str, gathers: int) -> None:
    # Either all layers share the tables, or gathered ones are spelled out again for q and k of every layer.
    made: list[str] = []

    def shared(b: Builder, x: str) -> str:
        made[:] = made or grid_tables(b)
        q0, q1, q2, q3 = b.split(x, 4, 3)
        turned = last(b, b.op("Neg", q1), q0, b.op("Neg", q3), q2)
        return b.op("Add", b.op("Mul", x, made[0]), b.op("Mul", turned, made[1]))

    model = attention(SPELLINGS.get(spelling, shared), layers=4)
    graph = fuse(model, rewrites=8)
    rotations = [node for node in graph.nodes if node.op == "RotaryEmbedding"]
    assert len(rotations) == 8
    assert len({node.inputs[1].name for node in rotations}) == len({node.inputs[2].name for node in rotations}) == 1
    # A permutation each where there is one, then the tables at the positions, then the channels wanted of cos and of sin.
    assert count(graph)["Gather"] == gathers
    assert_same(model, graph, feeds())


@pytest.mark.parametrize("batch", ["batch", 2, 1])
def test_tables_without_a_batch_are_repeated(batch: int | str) -> None:
    def constant_tables(b: Builder, x: str) -> str:
        cos, sin = (np.concatenate([t, t], axis=-1)[:6] for t in (COS, SIN))
        return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin))

    model = attention(constant_tables, batch=batch)
    graph = fuse(model)
    assert count(graph)["Expand"] == (0 if batch == 1 else 2)
    assert count(graph)["Shape"] == (1 if batch == "batch" else 0)
    assert_same(model, graph, *(feeds(size, 6) for size in ([1, 2, 5] if batch == "batch" else [batch])))


def test_q_and_k_may_be_spelled_differently() -> None:
    model = attention(neox, two_products)
    assert_same(model, fuse(model), feeds())


@pytest.mark.parametrize("axes", ["heads third", "no heads"])
@pytest.mark.parametrize("direct", [True, False])
def test_other_axes(axes: str, direct: bool) -> None:
    """Rotation in (B, N, heads, d) or (B * heads, N, d), directly before what makes the attention's axes of it, or not."""
    b = Builder()
    shape = ["batch", "n", HEADS, SIZE] if axes == "heads third" else ["batch", "n", SIZE]
    for name in "qkv":
        b.input(name, shape)
    b.input("positions", ["batch", "n"], np.int64)
    operands = []
    for name in "qk":
        cos, sin = (b.op("Gather", np.concatenate([t, t], axis=-1), "positions", axis=0) for t in (COS, SIN))
        if axes == "heads third":
            cos, sin = (b.op("Unsqueeze", table, np.array([2])) for table in (cos, sin))
        rotated = b.op("Add", b.op("Mul", name, cos), b.op("Mul", rotate_half(b, name), sin))
        operands.append(rotated if direct else b.op("Identity", rotated))
    operands.append("v")
    if axes == "heads third":
        operands = [b.op("Transpose", tensor, perm=[0, 2, 1, 3]) for tensor in operands]
        key = b.op("Transpose", operands[1], perm=[0, 1, 3, 2])
    else:
        key = b.op("Transpose", operands[1], perm=[0, 2, 1])
    b.output(b.op("MatMul", b.op("Softmax", b.op("MatMul", operands[0], key)), operands[2]))
    model = b.model()
    graph = fuse(model)
    counts = count(graph)
    assert counts["RotaryEmbedding"] == 2
    if axes == "heads third" and direct:
        assert counts["Transpose"] == 3
    if axes == "no heads" and direct:
        assert (counts["Unsqueeze"], counts["Squeeze"]) == (3, 1)
    shapes = [(2, 5, HEADS, SIZE), (1, 2, HEADS, SIZE)] if axes == "heads third" else [(2, 5, SIZE), (6, 3, SIZE)]
    for size in shapes:
        positions = np.random.default_rng(1).integers(0, LENGTH, size[:2])
        assert_same(model, graph, {name: normal(*size) * i for i, name in enumerate("qkv", 1)} | {"positions": positions})


def test_half_precision_stays() -> None:
    b = Builder()
    for name in "qkv":
        b.input(name, ["batch", HEADS, "n", SIZE], np.float16)
    cos, sin = (np.concatenate([t, t], axis=-1)[:6].astype(np.float16) for t in (COS, SIN))
    q, k = (b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin)) for x in "qk")
    b.output(b.op("Attention", q, k, "v"), np.float16)
    model = b.model()
    graph = fuse(model)
    assert all(tensor.dtype == np.float16 for node in graph.nodes if node.op == "RotaryEmbedding" for tensor in node.inputs)
    # float16 has a unit roundoff of 5e-4, and the rotation is now rounded once instead of three times.
    assert_same(model, graph, {name: normal(2, HEADS, 6, SIZE, dtype=np.float16) for name in "qkv"}, tolerance=2e-3)


# Near misses


def reflection(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    turned = last(b, part(b, x, HALF, SIZE), part(b, x, 0, HALF))
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", turned, sin))


def different_cosines(b: Builder, x: str) -> str:
    """The partners' cosines differ in one position of one channel."""
    table = np.concatenate([COS, COS], axis=-1)
    table[3, 1] += 1e-3
    cos = b.op("Unsqueeze", b.op("Gather", table, "positions", axis=0), np.array([1]))
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), tables(b)[1]))


def different_positions(b: Builder, x: str) -> str:
    """The partners' sines are of different positions."""
    cos, _ = tables(b)
    sin = last(b, *(b.op("Gather", SIN, name, axis=0) for name in ("rows", "cols")))
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), b.op("Unsqueeze", sin, np.array([1]))))


def no_partners(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", x, sin))


def three_terms(b: Builder, x: str) -> str:
    return b.op("Add", neox(b, x), b.op("Mul", b.op("Gather", x, np.roll(np.arange(SIZE), 1), axis=-1), tables(b)[0]))


def cycle_of_all(b: Builder, x: str) -> str:
    cos, sin = tables(b)
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", b.op("Gather", x, np.roll(np.arange(SIZE), 1), axis=-1), sin))


def part_of_the_channels(b: Builder, x: str) -> str:
    first, second = b.split(x, 2, 3)
    cos, sin = (part(b, table, 0, HALF) for table in tables(b))
    return last(b, b.op("Add", b.op("Mul", first, cos), b.op("Mul", rotate_half(b, first, HALF), sin)), second)


def tables_by_head(b: Builder, x: str) -> str:
    cos = normal(HEADS, 6, SIZE)
    cos[..., HALF:] = cos[..., :HALF]
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), cos))


def one_position(b: Builder, x: str) -> str:
    cos, sin = (np.concatenate([t, t], axis=-1)[3:4] for t in (COS, SIN))
    return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin))


def halves_scaled_differently(b: Builder, x: str) -> str:
    return last(b, b.op("Mul", part(b, neox(b, x), 0, HALF), np.float32(2.0)), part(b, neox(b, x), HALF, SIZE))


def through_pairs(b: Builder, x: str) -> str:
    """Neighbours turn together, on an axis of their own."""
    pairs = b.op("Reshape", x, np.array([0, HEADS, -1, HALF, 2]))
    cos, sin = (b.op("Unsqueeze", table, np.array([-1])) for table in tables(b, twice=False))
    even, odd = b.split(pairs, 2, 4)
    a = b.op("Sub", b.op("Mul", even, cos), b.op("Mul", odd, sin))
    turned = last(b, a, b.op("Add", b.op("Mul", even, sin), b.op("Mul", odd, cos)))
    return b.op("Reshape", turned, np.array([0, HEADS, -1, SIZE]), name=f"reshape_{x}")


def plain(b: Builder, x: str) -> str:
    return b.op("Relu", x, name=f"relu_{x}")


@pytest.mark.parametrize(
    ("rotate_q", "rotate_k", "why"),
    [
        (reflection, None, "q is left as it is: the signs of channels 0 and 4 do not make a rotation"),
        (different_cosines, None, "q is left as it is: the tables of channels 1 and 5 are not known to be equal"),
        (different_positions, None, "q is left as it is: the tables of channels 0 and 4 are not known to be equal"),
        (no_partners, None, "q is left as it is: channel 0 is not the sum of two channels, each times a table"),
        (three_terms, None, "q is left as it is: channel 0 is not the sum of two channels, each times a table"),
        (cycle_of_all, None, "q is left as it is: the channels do not form pairs"),
        (part_of_the_channels, None, "q is left as it is: channel 4 is not the sum of two channels, each times a table"),
        (tables_by_head, None, "q is left as it is: the tables differ from head to head"),
        (one_position, None, "has 1 positions and q has n"),
        (halves_scaled_differently, None, "q is left as it is: the channels are scaled differently, by [1.0, 2.0]"),
        (plain, neox, "q is left as it is: relu_q_out0 is made by relu_q (Relu)"),
        (through_pairs, None, "q is left as it is: reshape_q_out0 is made by reshape_q (Reshape)"),
        (neox, plain, "k is left as it is: relu_k_out0 is made by relu_k (Relu)"),
        (neox, four_chunks, "q and k are rotated in different pairs of channels"),
        (neox, turned_backwards, "q and k are rotated in different pairs of channels"),
    ],
)
def test_near_misses_are_left_alone_with_the_reason(rotate_q: Spelling, rotate_k: Spelling | None, why: str) -> None:
    assert why in reason(attention(rotate_q, rotate_k))


def projected(b: Builder, x: str) -> str:
    """A scaled and biased product, in which the sizes of its reshapes are multiplied too."""
    count, n = (b.op("Shape", x, start=i, end=i + 1) for i in (0, 2))
    rows = b.op("Reshape", x, b.op("Concat", b.op("Mul", count, b.op("Mul", n, np.array([HEADS]))), np.array([SIZE]), axis=0))
    biased = b.op("Add", b.op("MatMul", rows, normal(SIZE, SIZE)), normal(SIZE))
    shape = b.op("Concat", count, np.array([HEADS]), n, np.array([SIZE]), axis=0)
    return b.op("Reshape", b.op("Mul", biased, np.float32(0.5)), shape)


@pytest.mark.parametrize("spelling", [lambda b, x: x, plain, projected], ids=["inputs", "plain", "projected"])
def test_attentions_without_rotations_are_one_line(spelling: Spelling) -> None:
    b = Builder()
    for name in "qkv":
        b.input(name, ["batch", HEADS, "n", SIZE])
    q, k = spelling(b, "q"), spelling(b, "k")
    once = b.op("Attention", q, k, "v", name="first")
    b.output(b.op("Attention", b.op("Attention", once, k, "v", name="second"), k, "v", name="third"))
    ((node, why),) = left_alone(b.model(), RotaryFusion())
    assert (node, why) == ("first", "nothing multiplies its q or k by a table, as a rotation would, nor those of 2 more attentions")


def test_a_squeeze_without_axes_is_in_the_way() -> None:
    b = Builder()
    for name in "qkv":
        b.input(name, [2, HEADS, 6, SIZE])
    b.input("positions", [2, 6], np.int64)
    squeezed = b.op("Squeeze", b.op("Unsqueeze", neox(b, "q"), np.array([0])), name="squeeze")
    b.output(b.op("Attention", squeezed, neox(b, "k"), "v", name="attend"))
    assert left_alone(b.model(), RotaryFusion()) == [("attend", "q is left as it is: squeeze_out0 is made by squeeze (Squeeze)")]


def test_one_attention_without_a_rotation_among_others_with() -> None:
    b = Builder()
    for name in "qkv":
        b.input(name, ["batch", HEADS, "n", SIZE])
    b.input("positions", ["batch", "n"], np.int64)
    turned = b.op("Attention", neox(b, "q"), neox(b, "k"), "v", name="self")
    b.output(b.op("Attention", turned, "v", "v", name="cross"))
    model = b.model()
    graph, report = apply(model, RotaryFusion())
    assert report.rewrites == 2
    ((node, why),) = [(declined.node, declined.why) for declined in report.declined]
    assert (node, why) == ("cross", "nothing multiplies its q or k by a table, as a rotation would")
    assert_same(model, graph, {name: value for name, value in feeds().items() if name in ("q", "k", "v", "positions")})


def test_rotated_keys_that_others_read() -> None:
    model = attention(neox, extra=lambda b, t: b.output(b.op("Neg", t["k"], name="other")))
    why = reason(model)
    assert "k is left as it is" in why
    assert "other" in why


def test_rotated_queries_that_are_an_output() -> None:
    assert "is an output of the graph" in reason(attention(neox, extra=lambda b, t: b.output(t["q"])))


def test_x_broadcast_over_the_batch_of_its_tables() -> None:
    b = Builder()
    b.input("q", [1, HEADS, "n", SIZE]), b.input("k", ["batch", HEADS, "n", SIZE]), b.input("v", ["batch", HEADS, "n", SIZE])
    b.input("positions", ["batch", "n"], np.int64)
    b.output(b.op("Attention", neox(b, "q"), neox(b, "k"), "v", name="attend"))
    _, report = apply(b.model(), RotaryFusion())
    assert report.declined[0].why == "q is left as it is: q is broadcast against its tables"


def test_attention_that_hands_out_its_keys() -> None:
    b = Builder()
    for name in ("q", "k", "v", "past_k", "past_v"):
        b.input(name, ["batch", HEADS, "n", SIZE])
    b.input("positions", ["batch", "n"], np.int64)
    out, keys, values = b.op("Attention", neox(b, "q"), neox(b, "k"), "v", "", "past_k", "past_v", outputs=3, name="attend")
    for tensor, length in ((out, "n"), (keys, "total"), (values, "total")):
        b.output(tensor, shape=["batch", HEADS, length, SIZE])
    graph, report = apply(b.model(), RotaryFusion())
    assert report.declined[0].why == "it keeps a cache of keys, whose channels others see"
    assert count(graph)["RotaryEmbedding"] == 0


def test_attention_with_heads_packed_in_channels() -> None:
    b = Builder()
    for name in "qkv":
        b.input(name, ["batch", HEADS, "n", SIZE])
    b.input("positions", ["batch", "n"], np.int64)
    packed = [
        b.op("Reshape", b.op("Transpose", x, perm=[0, 2, 1, 3]), np.array([0, 0, HEADS * SIZE])) for x in (neox(b, "q"), neox(b, "k"), "v")
    ]
    b.output(b.op("Attention", *packed, q_num_heads=HEADS, kv_num_heads=HEADS))
    _, report = apply(b.model(), RotaryFusion())
    assert report.declined[0].why == "q and k are not (batch, heads, N, head_dim)"


def test_other_readers_of_x_and_of_the_tables_keep_them() -> None:
    def extra(b: Builder, tensors: dict[str, Any]) -> None:
        b.output(b.op("Neg", "q"))
        b.output(b.op("Exp", cos))

    def with_known_tables(b: Builder, x: str) -> str:
        return b.op("Add", b.op("Mul", x, cos), b.op("Mul", rotate_half(b, x), sin))

    b = Builder()
    for name in "qkv":
        b.input(name, ["batch", HEADS, "n", SIZE])
    b.input("positions", ["batch", "n"], np.int64)
    cos, sin = tables(b)
    b.output(b.op("Attention", with_known_tables(b, "q"), with_known_tables(b, "k"), "v"))
    extra(b, {})
    model = b.model()
    graph = fuse(model)
    assert {"Neg", "Exp"} <= set(count(graph))
    assert_same(model, graph, {key: value for key, value in feeds().items() if key in ("q", "k", "v", "positions")})
