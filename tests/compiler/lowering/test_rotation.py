"""Attention with rotations of q and k, which products do, or attention, or nobody."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from smc.compiler.lowering.context import Call
from smc.plugins.flash_attention.launches import Attention
from smc.plugins.gemm.specification import Gemm
from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder, normal, weights

B, N, HEADS, SIZE = 2, 5, 2, 32
C = HEADS * SIZE


def heads(b: Builder, x: str, rows: int = N) -> str:
    return b.op("Transpose", b.op("Reshape", x, np.array([0, rows, HEADS, SIZE])), perm=[0, 2, 1, 3])


def linear(b: Builder, x: str, columns: int = C, seed: int = 0) -> str:
    return b.op("Add", b.op("MatMul", x, weights(C, columns, seed=seed)), weights(columns, seed=seed))


def rotate(b: Builder, x: str, rows: int = N, seed: int = 0, batch: int = B, dtype: type = np.float32, **attrs: Any) -> str:
    angles = np.random.default_rng(seed).standard_normal((1, rows, SIZE // 2))
    tables = (np.repeat(table(angles), batch, axis=0).astype(dtype) for table in (np.cos, np.sin))
    return b.op("RotaryEmbedding", x, *tables, name=f"rotary_{len(b.nodes)}", **attrs)


def attend(b: Builder, q: str, k: str, v: str, **attrs: Any) -> None:
    out = b.op("Transpose", b.op("Attention", q, k, v, name="attend", scale=0.2, **attrs), perm=[0, 2, 1, 3])
    b.output(b.op("Reshape", out, np.array([0, N, C])))


def of(calls: Sequence[Call], kind: type) -> list[Any]:
    return [call.operation for call in calls if isinstance(call.operation, kind)]


def split(b: Builder, x: str, parts: int) -> list[str]:
    """q, k and v, or some of them, side by side in one product."""
    return list(b.split(x, parts, axis=-1))


def test_one_product_rotates_q_and_k_and_leaves_v() -> None:
    b = Builder()
    q, k, v = (heads(b, part) for part in split(b, linear(b, b.input("x", [B, N, C]), 3 * C), 3))
    attend(b, rotate(b, q), rotate(b, k), v)
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "Attention"]
    (product,), (attention,) = of(calls, Gemm), of(calls, Attention)
    assert (product.rotary.columns, product.rotary.half, product.rotary.tokens) == (2 * C, SIZE // 2, N)
    assert attention.tables is None
    assert (attention.q.offset, attention.k.offset, attention.v.offset) == (0, C, 2 * C)
    assert {attention.q.row, attention.k.row, attention.v.row} == {3 * C}


def test_products_of_their_own_rotate_for_cross_attention() -> None:
    b = Builder()
    x, y = b.input("x", [B, N, C]), b.input("y", [B, N + 2, C])
    k, v = split(b, linear(b, y, 2 * C, seed=1), 2)
    attend(b, rotate(b, heads(b, linear(b, x))), rotate(b, heads(b, k, N + 2), N + 2, seed=1), heads(b, v, N + 2))
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "Gemm", "Attention"]
    assert [op.rotary.columns for op in of(calls, Gemm)] == [C, C]
    assert (of(calls, Attention)[0].n, of(calls, Attention)[0].m) == (N, N + 2)


def test_packed_heads_are_rotated_where_they_are() -> None:
    """q, k and v of one product, taken apart along an axis in front of the batch."""
    b = Builder()
    qkv = b.op("Reshape", linear(b, b.input("x", [B, N, C]), 3 * C), np.array([0, N, 3, HEADS, SIZE]))
    qkv = b.op("Transpose", qkv, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", qkv, np.array(i), axis=0) for i in range(3))
    attend(b, rotate(b, q), rotate(b, k), v)
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "Attention"]
    assert of(calls, Gemm)[0].rotary.columns == 2 * C


def test_the_attention_rotates_what_no_product_can() -> None:
    b = Builder()
    q, k, v = (heads(b, b.input(name, [B, N, C])) for name in "qkv")
    attend(b, rotate(b, q), rotate(b, k), v)
    calls = check(b.model())
    assert kinds(calls) == ["Attention"]
    assert of(calls, Attention)[0].tables == "float32"
    assert {"cos_q", "sin_q", "cos_k", "sin_k"} <= calls[0].operands.keys()


def test_both_are_rotated_alike_or_not_at_all_by_products() -> None:
    """k comes from no product: the product of q must not change the order of its channels alone."""
    b = Builder()
    q, k, v = linear(b, b.input("x", [B, N, C])), b.input("k", [B, N, C]), b.input("v", [B, N, C])
    attend(b, rotate(b, heads(b, q)), rotate(b, heads(b, k), seed=1), heads(b, v))
    calls = check(b.model())
    assert of(calls, Gemm)[0].rotary is None
    assert of(calls, Attention)[0].tables == "float32"


Between = Callable[[Builder, str], str]


@pytest.mark.parametrize(
    "between",
    [
        lambda b, x: b.op("Add", x, normal(N, C)),
        lambda b, x: b.op("Add", x, normal(1, N, 1)),
        lambda b, x: b.op("Add", x, weights(C, seed=5)),
        lambda b, x: b.op("Relu", x),
    ],
    ids=["positions", "a number for each token", "a second bias", "an activation"],
)
def test_what_comes_between_bias_and_rotation_is_not_skipped(between: Between) -> None:
    b = Builder()
    x = b.input("x", [B, N, C])
    q, k = (heads(b, between(b, linear(b, x, seed=seed))) for seed in range(2))
    attend(b, rotate(b, q), rotate(b, k), heads(b, x))
    calls = check(b.model())
    assert [op.rotary for op in of(calls, Gemm)] == [None, None]
    assert of(calls, Attention)[0].tables == "float32"


def test_a_product_that_was_left_in_float32_does_not_rotate() -> None:
    b = Builder()
    x = b.input("x", [B, N, C])
    q, k = (rotate(b, half(b, heads(b, linear(b, x, seed=seed))), dtype=np.float16) for seed in range(2))
    b.output(single(b, b.op("Attention", q, k, half(b, heads(b, x)), scale=0.2)))
    calls = check(b.model(), TOLERANCES[HALF])
    assert [op.rotary for op in of(calls, Gemm)] == [None, None]
    assert of(calls, Attention)[0].tables is not None


@pytest.mark.parametrize("which", ["product", "bias", "heads"])
def test_what_the_graph_gives_out_is_not_rotated(which: str) -> None:
    b = Builder()
    x = b.input("x", [B, N, C])
    product = b.op("MatMul", x, weights(C, C))
    biased = b.op("Add", product, weights(C))
    q = heads(b, biased)
    b.output({"product": product, "bias": biased, "heads": q}[which])
    attend(b, rotate(b, q), rotate(b, heads(b, linear(b, x, seed=1))), heads(b, x))
    calls = check(b.model())
    assert [op.rotary for op in of(calls, Gemm)] == [None, None]


def test_what_something_else_reads_is_not_rotated() -> None:
    b = Builder()
    q, k, v = split(b, linear(b, b.input("x", [B, N, C]), 3 * C), 3)
    b.output(b.op("Exp", k))
    attend(b, rotate(b, heads(b, q)), rotate(b, heads(b, k)), heads(b, v))
    calls = check(b.model())
    assert of(calls, Gemm)[0].rotary is None
    assert of(calls, Attention)[0].tables == "float32"


def test_a_product_does_not_rotate_what_is_not_in_front() -> None:
    """v, q, k: the columns that a kernel rotates are the first ones."""
    b = Builder()
    v, q, k = split(b, linear(b, b.input("x", [B, N, C]), 3 * C), 3)
    attend(b, rotate(b, heads(b, q)), rotate(b, heads(b, k)), heads(b, v))
    calls = check(b.model())
    assert of(calls, Gemm)[0].rotary is None


def test_other_tables_for_q_than_for_k_out_of_one_product() -> None:
    b = Builder()
    q, k, v = split(b, linear(b, b.input("x", [B, N, C]), 3 * C), 3)
    attend(b, rotate(b, heads(b, q)), rotate(b, heads(b, k), seed=1), heads(b, v))
    calls = check(b.model())
    assert of(calls, Gemm)[0].rotary is None
    assert of(calls, Attention)[0].tables == "float32"


def test_a_part_of_the_tokens_is_rotated_by_the_attention() -> None:
    """Of one image, so that the rows of the part lie evenly: the tables start at its first token, and not at the product's."""
    b = Builder()
    x = b.input("x", [1, N + 1, C])
    q, k = (heads(b, b.op("Slice", linear(b, x, seed=s), np.array([1]), np.array([N + 1]), np.array([1]))) for s in range(2))
    v = heads(b, b.op("Slice", x, np.array([1]), np.array([N + 1]), np.array([1])))
    attend(b, rotate(b, q, batch=1), rotate(b, k, batch=1), v)
    calls = check(b.model())
    assert [op.rotary for op in of(calls, Gemm)] == [None, None]


@pytest.mark.parametrize(
    "change",
    [
        lambda b, q: rotate(b, q, interleaved=1),
        lambda b, q: rotate(b, q, rotary_embedding_dim=SIZE // 2),
        lambda b, q: q,
        lambda b, q: b.op("RotaryEmbedding", q, *(b.input(f"table{i}", [B, N, SIZE // 2]) for i in range(2)), name="rotary_x"),
        lambda b, q: b.op("RotaryEmbedding", q, normal(B, N, SIZE // 2), normal(B, N, SIZE // 2), name="rotary_x"),
    ],
    ids=["interleaved", "half of a head", "q alone", "computed tables", "tables that differ between images"],
)
def test_rotations_that_no_kernel_does_are_refused(change: Callable[[Builder, str], str]) -> None:
    b = Builder()
    x = b.input("x", [B, N, C])
    q, k = (heads(b, linear(b, x, seed=seed)) for seed in range(2))
    attend(b, change(b, q), rotate(b, k), heads(b, x))
    refused(b.model(), "rotary_.*RotaryEmbedding")


def test_a_rotation_for_something_else_is_refused() -> None:
    b = Builder()
    b.output(b.op("Exp", rotate(b, heads(b, linear(b, b.input("x", [B, N, C]))))))
    refused(b.model(), "rotary_.*RotaryEmbedding")


@pytest.mark.parametrize("by_product", [True, False])
@pytest.mark.parametrize("narrow", [(True, True), (True, False), (False, True)], ids=["both", "q", "k"])
def test_casts_between_rotation_and_attention(by_product: bool, narrow: tuple[bool, bool]) -> None:
    """An attention that was left in float32, or rotations of which one was."""
    b = Builder()
    x = b.input("x", [B, N, C])
    operands = []
    for i, is_narrow in enumerate(narrow):
        tensor = heads(b, linear(b, x, seed=i)) if by_product else heads(b, b.input(f"in{i}", [B, N, C]))
        tensor = rotate(b, half(b, tensor), seed=i, dtype=np.float16) if is_narrow else rotate(b, tensor, seed=i)
        operands.append(single(b, tensor) if is_narrow else tensor)
    attend(b, *operands, heads(b, x))
    calls = check(b.model(), TOLERANCES[HALF])
    assert of(calls, Attention)[0].dtype == "float32"
