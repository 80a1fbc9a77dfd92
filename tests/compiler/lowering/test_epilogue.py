"""What is done on the way out of a product or a convolution, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.passes.graphs import Builder, normal, weights

B, N, K, C = 2, 5, 16, 24
SHAPE = [B, N, C]


def product(b: Builder, x: str, dtype: type = np.float32, seed: int = 0) -> str:
    return b.op("MatMul", x, weights(K, C, seed=seed).astype(dtype))


def start() -> tuple[Builder, str]:
    b = Builder()
    return b, b.input("x", [B, N, K])


def test_bias_gelu_residual_and_cast_are_in_one_product() -> None:
    b, x = start()
    r = half(b, b.input("r", SHAPE))
    y = b.op("Gelu", b.op("Add", product(b, half(b, x), np.float16), weights(C).astype(np.float16)))
    b.output(single(b, b.op("Add", r, y)))
    calls = check(b.model(), TOLERANCES[HALF])
    assert kinds(calls) == ["copy", "copy", "Gemm"]
    op = calls[-1].operation
    assert (op.bias, op.bias_shared, op.activation, op.residual, op.out_dtype) == ("float16", True, "gelu", "float16", "float32")


def test_a_residual_in_float32_of_a_product_in_float16() -> None:
    b, x = start()
    y = single(b, product(b, half(b, x), np.float16))
    b.output(b.op("Add", b.input("r", SHAPE), y))
    calls = check(b.model(), TOLERANCES[HALF])
    assert kinds(calls) == ["copy", "Gemm"]
    assert (calls[1].operation.residual, calls[1].operation.out_dtype) == ("float32", "float32")


def test_a_bias_in_float32_behind_a_cast() -> None:
    b, x = start()
    b.output(b.op("Add", single(b, product(b, half(b, x), np.float16)), weights(C)))
    calls = check(b.model(), TOLERANCES[HALF])
    assert kinds(calls) == ["copy", "Gemm"]
    assert calls[1].operation.bias == "float32"


def test_steps_in_another_order_than_the_kernels_are_done_apart() -> None:
    """The activation follows the residual: a product's kernel has them the other way round."""
    b, x = start()
    b.output(b.op("Gelu", b.op("Add", product(b, x), b.input("r", SHAPE))))
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "gelu"]
    assert calls[0].operation.residual == "float32"


def test_a_second_bias_is_added_apart() -> None:
    b, x = start()
    b.output(b.op("Add", b.op("Add", product(b, x), weights(C)), weights(C, seed=1)))
    assert kinds(check(b.model())) == ["Gemm", "add"]


def test_a_tanh_gelu_is_refused_and_not_taken_for_the_exact_one() -> None:
    from tests.compiler.lowering.test_linear import refused

    b, x = start()
    b.output(b.op("Gelu", product(b, x), approximate="tanh", name="tanh_gelu"))
    refused(b.model(), "tanh_gelu .*Gelu")


def test_what_something_else_reads_is_written_before() -> None:
    b, x = start()
    y = product(b, x)
    b.output(b.op("Gelu", y))
    b.output(b.op("Exp", y))
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "gelu", "exp"]
    assert calls[0].operation.activation == "none"


def test_an_output_of_the_graph_is_written_before() -> None:
    b, x = start()
    y = product(b, x)
    b.output(y)
    b.output(b.op("Gelu", y))
    assert kinds(check(b.model())) == ["Gemm", "gelu"]


def test_a_relu_that_is_read_beside_the_sum_is_the_second_output() -> None:
    b = Builder()
    x = b.input("x", [1, 8, 4, 5])
    y = b.op("Conv", x, weights(8, 8, 3, 3), weights(8), pads=[1] * 4)
    z = b.op("Conv", b.op("Relu", y), weights(8, 8, 3, 3, seed=1), pads=[1] * 4)
    b.output(b.op("Add", z, y))
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Conv", "Conv", "copy"]
    first, second = calls[1:3]
    assert first.writes == ("out", "out_relu")
    assert first.operation.activation == "none"
    assert second.operation.residual is not None
    assert second.operands["x"] is first.operands["out_relu"]


def test_two_relus_of_one_tensor_are_one() -> None:
    b, x = start()
    y = product(b, x)
    b.output(b.op("Exp", b.op("Relu", y)))
    b.output(b.op("Sqrt", b.op("Relu", y)))
    b.output(y)
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "exp", "sqrt"]
    assert calls[0].operation.out_relu


@pytest.mark.parametrize("shape", [[N, C], [N, 1], [B, 1, 1]])
def test_what_is_no_bias_is_added_apart(shape: list[int]) -> None:
    """Numbers that differ from row to row, such as embeddings of positions."""
    b, x = start()
    b.output(b.op("Add", product(b, x), normal(*shape)))
    assert kinds(check(b.model())) == ["Gemm", "add"]


def test_one_number_is_a_bias() -> None:
    b, x = start()
    b.output(b.op("Add", product(b, x), np.float32(0.5)))
    assert kinds(check(b.model())) == ["Gemm"]


def test_a_residual_that_is_broadcast_is_added_apart() -> None:
    b, x = start()
    b.output(b.op("Add", product(b, x), b.input("r", [1, N, C])))
    assert kinds(check(b.model())) == ["Gemm", "add"]


def test_a_product_that_would_be_broadcast_keeps_its_shape() -> None:
    b = Builder()
    y = product(b, b.input("x", [1, N, K]))
    b.output(b.op("Add", y, b.input("r", SHAPE)))
    assert kinds(check(b.model())) == ["Gemm", "add"]


def test_a_residual_that_comes_later_is_added_when_it_is_there() -> None:
    """The other summand is made by a node behind the product; it takes the first one for its residual."""
    b = Builder()
    x = b.input("x", [B, N, K])
    first, second = product(b, x), product(b, x, seed=1)
    b.output(b.op("Add", first, second))
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "Gemm"]
    assert [call.operation.residual for call in calls] == [None, "float32"]


def test_twice_the_product_is_no_residual() -> None:
    b, x = start()
    y = product(b, x)
    b.output(b.op("Add", y, y))
    assert kinds(check(b.model())) == ["Gemm", "add"]


def test_a_residual_of_other_strides_is_added_where_it_lies() -> None:
    """A part of a wider tensor, on 16 bytes, is a residual; one between 16 bytes is not, nor rows in more steps than the product's."""
    b, x = start()
    part = b.op("Slice", b.input("r", [B, N, 2 * C]), np.array([C]), np.array([2 * C]), np.array([2]))
    b.output(b.op("Add", product(b, x), part))
    (call,) = check(b.model())
    assert (call.operation.r_offset, call.operation.r_row) == (C, 2 * C)

    for shape, axis in (([B, N, C + 1], 2), ([B, N + 1, C], 1)):
        b, x = start()
        r = b.op("Slice", b.input("r", shape), np.array([1]), np.array([shape[axis]]), np.array([axis]))
        b.output(b.op("Add", product(b, x), r))
        assert kinds(check(b.model())) == ["Gemm", "add"]


def test_a_residual_that_lies_channels_first_is_added_apart() -> None:
    b = Builder()
    x, r = b.input("x", [1, 8, 4, 5]), b.input("r", [1, 8, 4, 5])
    b.output(b.op("Add", b.op("Conv", x, weights(8, 8, 3, 3), pads=[1] * 4), r))
    assert kinds(check(b.model())) == ["copy", "Conv", "add"]


def test_movements_on_the_way_to_a_bias_are_followed() -> None:
    b, x = start()
    y = b.op("Transpose", b.op("Reshape", product(b, x), np.array([B * N, 2, C // 2])), perm=[1, 0, 2])
    b.output(b.op("Gelu", b.op("Add", y, weights(2, 1, C // 2))))
    calls = check(b.model())
    assert kinds(calls) == ["Gemm", "copy"]
    assert (calls[0].operation.bias, calls[0].operation.activation) == ("float32", "gelu")


def test_a_cast_to_integers_is_no_matter_of_a_product() -> None:
    b, x = start()
    b.output(b.op("Cast", b.op("Mul", product(b, x), np.float32(4)), to=6), np.int32)
    b.output(b.op("Cast", product(b, x, seed=1), to=6), np.int32)
    assert sorted(kinds(check(b.model()))) == ["Gemm", "Gemm", "copy", "copy", "mul"]


def test_a_bias_of_its_own_leaves_none_to_absorb() -> None:
    b = Builder()
    x = b.input("x", [1, 8, 4, 5])
    y = b.op("Conv", x, weights(8, 8, 3, 3), weights(8), pads=[1] * 4)
    b.output(b.op("Relu", b.op("Add", y, weights(8, 1, 1))))
    assert kinds(check(b.model())) == ["copy", "Conv", "add", "relu"]
