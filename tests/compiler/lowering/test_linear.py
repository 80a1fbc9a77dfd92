from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from smc.compiler.lowering.context import CannotLower
from smc.compiler.lowering.lower import lower
from smc.passes.prepare import prepare
from smc.plugins.gemm.specification import Scatter
from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.passes.graphs import Builder, normal, weights

B, N, K, C = 2, 5, 16, 24


def test_one_weight_takes_all_rows_at_once() -> None:
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [B, N, K]), weights(K, C)))
    (call,) = check(b.model())
    assert (call.operation.groups, call.operation.m, call.operation.w_shared) == (1, B * N, True)


def test_rows_of_a_part_are_read_where_they_lie() -> None:
    """The tokens of a slice lie in two steps, which become groups; a slice of channels only starts elsewhere."""
    b = Builder()
    x = b.input("x", [B, 2 * N, 2 * K])
    part = b.op("Slice", x, np.array([N, K]), np.array([2 * N, 2 * K]), np.array([1, 2]))
    b.output(b.op("MatMul", part, weights(K, C)))
    (call,) = check(b.model())
    op = call.operation
    assert (op.groups, op.m, op.a_group, op.a_row, op.a_offset) == (B, N, 2 * N * 2 * K, 2 * K, N * 2 * K + K)


def test_the_views_swapped_are_groups_backwards() -> None:
    b = Builder()
    x = b.input("x", [2, N, K])
    swapped = b.op("Gather", x, np.array([1, 0]), axis=0)
    b.output(b.op("MatMul", swapped, np.stack([weights(K, C), weights(K, C, seed=1)])))
    (call,) = check(b.model())
    assert (call.operation.a_group, call.operation.a_offset, call.operation.w_shared) == (-N * K, N * K, False)


def test_channels_that_are_no_neighbours_are_copied() -> None:
    b = Builder()
    x = b.op("Transpose", b.input("x", [B, K, N]), perm=[0, 2, 1])
    b.output(b.op("MatMul", x, weights(K, C)))
    assert kinds(check(b.model())) == ["copy", "Gemm"]


def test_rows_that_start_at_no_multiple_of_16_bytes_are_copied() -> None:
    b = Builder()
    x = b.op("Slice", b.input("x", [B, N, K + 2]), np.array([2]), np.array([K + 2]), np.array([2]))
    b.output(b.op("MatMul", x, weights(K, C)))
    assert kinds(check(b.model())) == ["copy", "Gemm"]


def test_more_than_two_steps_of_rows_are_copied() -> None:
    b = Builder()
    x = b.op("Transpose", b.input("x", [2, 3, N, K]), perm=[2, 1, 0, 3])
    b.output(b.op("MatMul", x, weights(K, C)))
    assert kinds(check(b.model())) == ["copy", "Gemm"]


@pytest.mark.parametrize("shape", [[K], [1, K], [1, 1, 1, K]])
def test_a_single_row(shape: list[int]) -> None:
    b = Builder()
    b.output(b.op("MatMul", b.input("x", shape), weights(K, C)))
    assert kinds(check(b.model())) == ["Gemm"]


@pytest.mark.parametrize("columns", [1, 3, 7])
def test_columns_that_are_no_multiple_of_anything(columns: int) -> None:
    b = Builder()
    b.output(b.op("Add", b.op("MatMul", b.input("x", [B, N, K]), weights(K, columns)), weights(columns)))
    assert kinds(check(b.model())) == ["Gemm"]


def test_a_product_in_float32_of_what_lies_in_float16() -> None:
    """A product that was left in float32 gets its operand in float32; the wide Cast before it is nothing by itself."""
    b = Builder()
    x = half(b, b.input("x", [B, N, K]))
    b.output(b.op("MatMul", single(b, x), weights(K, C)))
    first, second, product = check(b.model(), TOLERANCES[HALF])
    assert kinds([first, second, product]) == ["copy", "copy", "Gemm"]
    assert product.operation.dtype == "float32"


def test_a_product_in_float16_writes_float32_where_a_cast_follows() -> None:
    b = Builder()
    x = half(b, b.input("x", [B, N, K]))
    b.output(single(b, b.op("MatMul", x, weights(K, C).astype(np.float16))))
    cast, product = check(b.model(), TOLERANCES[HALF])
    assert (product.operation.dtype, product.operation.out_dtype) == ("float16", "float32")
    assert cast.operation.out.dtype == "float16"


@pytest.mark.parametrize("group", [1, 2])
def test_a_1x1_convolution_is_a_product_at_each_pixel(group: int) -> None:
    b = Builder()
    x = b.input("x", [B, 16, 4, 5])
    b.output(b.op("Conv", x, weights(24, 16 // group, 1, 1), weights(24), group=group))
    calls = check(b.model())
    assert kinds(calls)[:2] == ["copy", "Gemm"]  # channels last, and the output's copy as the graph wants it
    assert (calls[1].operation.groups, calls[1].operation.m) == (group, B * 4 * 5)


def test_a_1x1_convolution_without_kernel_shape() -> None:
    """The attribute is optional: the weight has the shape as well."""
    b = Builder()
    b.output(b.op("Conv", b.input("x", [B, 16, 4, 5]), weights(24, 16, 1, 1)))
    assert "Gemm" in kinds(check(b.model()))


@pytest.mark.parametrize("group", [1, 2])
def test_a_transposed_convolution_is_a_product_that_scatters(group: int) -> None:
    b = Builder()
    x = b.input("x", [B, 16, 3, 5])
    wide = b.op("ConvTranspose", x, weights(16, 24 // group, 2, 2), weights(24), strides=[2, 2], group=group)
    b.output(b.op("Relu", wide))
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Gemm", "copy"]
    assert (calls[1].operation.scatter, calls[1].operation.activation) == (Scatter(2, 5), "relu")


@pytest.mark.parametrize(
    ("kernel", "attrs"),
    [
        (3, {"strides": [2, 2]}),
        (2, {"strides": [2, 2], "pads": [1, 1, 1, 1]}),
        (2, {"strides": [2, 2], "output_padding": [1, 1]}),
        (2, {"strides": [2, 2], "output_shape": [5, 9]}),
    ],
)
def test_transposed_convolutions_that_overlap_are_refused(kernel: int, attrs: dict[str, Any]) -> None:
    b = Builder()
    b.output(b.op("ConvTranspose", b.input("x", [B, 16, 3, 5]), weights(16, 8, kernel, kernel), name="odd_one", **attrs))
    refused(b.model(), r"odd_one .*ConvTranspose")


def test_a_product_of_two_computed_tensors_is_refused() -> None:
    b = Builder()
    x = b.input("x", [B, N, K])
    b.output(b.op("MatMul", x, b.op("Transpose", x, perm=[0, 2, 1]), name="scores"))
    refused(b.model(), r"scores .*MatMul.* is no product with one weight")


def test_rows_of_an_odd_width_are_refused_with_the_node() -> None:
    """A kernel reads 16 bytes at a time, which no copy can give rows of 9 numbers."""
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [B, N, 9]), weights(9, C), name="narrow"))
    refused(b.model(), "narrow .*MatMul")


def test_weights_of_another_number_of_groups_are_refused() -> None:
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [1, N, K]), normal(3, K, C), name="spread"))
    refused(b.model(), "spread .*MatMul")


def refused(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(CannotLower, match=message):
        lower(prepare(model))
