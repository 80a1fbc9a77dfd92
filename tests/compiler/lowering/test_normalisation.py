from __future__ import annotations

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder, normal


@pytest.mark.parametrize(("offset", "calls"), [(0, ["LayerNorm"]), (8, ["LayerNorm"]), (1, ["copy", "LayerNorm"])])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norms_of_parts(offset: int, calls: list[str], bias: bool) -> None:
    """Rows may be parts of longer ones that start on 16 bytes."""
    b = Builder()
    x = b.op("Slice", b.input("x", [2, 3, 24]), np.array([offset]), np.array([offset + 12]), np.array([2]))
    weights = [1 + normal(12), *([normal(12) / 2] if bias else [])]
    b.output(b.op("LayerNormalization", x, *weights, axis=-1, epsilon=1e-3))
    assert kinds(check(b.model())) == calls


def test_a_layer_norm_of_float16_in_float32() -> None:
    b = Builder()
    x = b.op("Cast", half(b, b.input("x", [2, 3, 24])), to=1)
    b.output(b.op("LayerNormalization", x, normal(24)))
    calls = check(b.model(), TOLERANCES[HALF])
    assert (calls[1].operation.dtype, calls[1].operation.out_dtype) == ("float16", "float32")


def test_a_layer_norm_in_float32_that_is_cast() -> None:
    b = Builder()
    y = b.op("LayerNormalization", b.input("x", [2, 3, 24]), normal(24))
    b.output(half(b, y), np.float16)
    (call,) = check(b.model(), TOLERANCES[HALF])
    assert (call.operation.dtype, call.operation.out_dtype) == ("float32", "float16")


def test_a_layer_norm_that_is_read_in_two_types() -> None:
    b = Builder()
    y = b.op("LayerNormalization", b.input("x", [2, 3, 24]), normal(24))
    b.output(y)
    b.output(half(b, y), np.float16)
    calls = check(b.model(), TOLERANCES[HALF])
    assert kinds(calls) == ["LayerNorm", "copy"]
    assert calls[0].operation.out_dtype == "float32"


def test_a_layer_norm_whose_statistics_are_read_is_refused() -> None:
    b = Builder()
    y, mean, _ = b.op("LayerNormalization", b.input("x", [2, 3, 24]), normal(24), outputs=3, name="odd_one")
    b.output(b.op("Add", y, mean))
    refused(b.model(), "odd_one .*LayerNormalization")


def test_a_norm_over_two_axes_is_refused() -> None:
    b = Builder()
    b.output(b.op("LayerNormalization", b.input("x", [2, 3, 24]), np.ones((3, 24), np.float32), axis=1, name="odd_one"))
    refused(b.model(), "odd_one .*last axis")


def test_weights_that_are_computed_are_refused() -> None:
    b = Builder()
    b.output(b.op("LayerNormalization", b.input("x", [2, 3, 24]), b.input("w", [24]), name="odd_one"))
    refused(b.model(), "odd_one .*not constants")
