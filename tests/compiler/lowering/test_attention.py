from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.compiler.lowering.test_linear import refused
from tests.compiler.lowering.test_rotation import HEADS, SIZE, B, C, N, heads
from tests.passes.graphs import Builder, weights


def inputs(b: Builder, rows: int = N) -> list[str]:
    return [heads(b, b.input(name, [B, count, C]), count) for name, count in (("q", N), ("k", rows), ("v", rows))]


def merged(b: Builder, out: str) -> str:
    return b.op("Reshape", b.op("Transpose", out, perm=[0, 2, 1, 3]), np.array([0, N, C]))


@pytest.mark.parametrize("rows", [N, 1, 13])
def test_heads_are_read_and_written_where_the_products_have_them(rows: int) -> None:
    b = Builder()
    b.output(b.op("MatMul", merged(b, b.op("Attention", *inputs(b, rows), scale=0.3)), weights(C, C)))
    calls = check(b.model())
    assert kinds(calls) == ["Attention", "Gemm"]
    assert calls[0].operation.scale == pytest.approx(0.3)


def test_the_scale_is_that_of_the_head_where_none_is_given() -> None:
    b = Builder()
    b.output(merged(b, b.op("Attention", *inputs(b))))
    (call,) = check(b.model())
    assert call.operation.scale == pytest.approx(SIZE**-0.5)


def test_float16() -> None:
    b = Builder()
    b.output(single(b, merged(b, b.op("Attention", *(half(b, tensor) for tensor in inputs(b))))))
    calls = check(b.model(), TOLERANCES[HALF])
    assert sorted(kinds(calls)) == ["Attention", "copy", "copy", "copy", "copy"]


def test_operands_in_float32_of_what_lies_in_float16() -> None:
    b = Builder()
    b.output(merged(b, b.op("Attention", *(single(b, half(b, tensor)) for tensor in inputs(b)))))
    calls = check(b.model(), TOLERANCES[HALF])
    assert calls[-1].operation.dtype == "float32"


def test_heads_whose_channels_are_no_neighbours_are_copied() -> None:
    b = Builder()
    _, k, v = inputs(b)
    turned = b.op("Transpose", b.input("x", [B, SIZE, HEADS, N]), perm=[0, 2, 3, 1])
    b.output(merged(b, b.op("Attention", turned, k, v)))
    assert kinds(check(b.model())) == ["copy", "Attention"]


def test_heads_that_start_between_16_bytes_are_copied() -> None:
    b = Builder()
    _, k, v = inputs(b)
    part = b.op("Slice", b.input("x", [B, N, C + 2]), np.array([2]), np.array([C + 2]), np.array([2]))
    b.output(merged(b, b.op("Attention", heads(b, part), k, v)))
    assert kinds(check(b.model())) == ["copy", "Attention"]


@pytest.mark.parametrize("attrs", [{"is_causal": 1}, {"softcap": 2.0}])
def test_other_kinds_of_attention_are_refused(attrs: dict[str, Any]) -> None:
    b = Builder()
    b.output(b.op("Attention", *inputs(b), name="odd_one", **attrs))
    refused(b.model(), "odd_one .*only plain attention")


def test_a_mask_is_refused() -> None:
    b = Builder()
    b.output(b.op("Attention", *inputs(b), b.input("mask", [N, N]), name="odd_one"))
    refused(b.model(), "odd_one .*only plain attention")


@pytest.mark.parametrize(
    ("q", "k", "v"),
    [
        ([B, 2, N, 48], [B, 2, N, 48], [B, 2, N, 48]),
        ([B, 4, N, 32], [B, 2, N, 32], [B, 2, N, 32]),
        ([B, 2, N, 32], [B, 2, N, 32], [B, 2, N, 64]),
    ],
)
def test_heads_that_no_kernel_takes_are_refused(q: list[int], k: list[int], v: list[int]) -> None:
    b = Builder()
    b.output(b.op("Attention", b.input("q", q), b.input("k", k), b.input("v", v), name="odd_one"))
    refused(b.model(), "odd_one .*heads of")
