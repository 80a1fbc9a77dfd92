from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, kinds, single
from tests.passes.graphs import Builder, weights

B, H, W, SIZE, C = 2, 8, 12, 4, 16


def embed(b: Builder, x: str, size: int = SIZE, dtype: type = np.float32) -> str:
    return b.op(
        "Conv", x, weights(C, 3, size, size).astype(dtype), weights(C).astype(dtype), strides=[size, size], kernel_shape=[size, size]
    )


def channels_first(b: Builder, x: str) -> str:
    return b.op("Transpose", x, perm=[0, 3, 1, 2])


@pytest.mark.parametrize("size", [4, 2])
def test_pixels_become_rows_of_a_product(size: int) -> None:
    b = Builder()
    b.output(b.op("Transpose", embed(b, b.input("x", [B, 3, H, W]), size), perm=[0, 2, 3, 1]))
    calls = check(b.model())
    assert kinds(calls) == ["Patches", "Gemm"]
    assert calls[0].operation.layout == "nchw"
    assert calls[1].operation.bias == "float32"


def test_sizes_that_are_no_multiple_of_the_patch_leave_pixels_out() -> None:
    b = Builder()
    b.output(embed(b, b.input("x", [B, 3, H + 3, W + 1])))
    assert kinds(check(b.model())) == ["Patches", "Gemm", "copy"]


def normalised(b: Builder, x: str) -> str:
    return b.op("Sub", b.op("Mul", x, np.float32(2 / 255)), np.float32(1))


Before = Callable[[Builder, str], str]


@pytest.mark.parametrize(
    "before",
    [
        lambda b, x: channels_first(b, x),
        lambda b, x: channels_first(b, normalised(b, x)),
        lambda b, x: normalised(b, channels_first(b, x)),
        lambda b, x: b.op("Mul", channels_first(b, b.op("Sub", x, np.float32(127.5))), np.float32(1 / 127.5)),
    ],
    ids=["as they are", "normalised before", "normalised after", "subtracted first"],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_bytes_are_normalised_on_the_way(before: Before, dtype: type) -> None:
    b = Builder()
    x = before(b, single(b, b.input("x", [B, H, W, 3], np.uint8)))
    if dtype == np.float16:
        x = b.op("Cast", x, to=HALF)
    y = b.op("Transpose", embed(b, x, dtype=dtype), perm=[0, 2, 3, 1])
    b.output(single(b, y) if dtype == np.float16 else y)
    calls = check(b.model(), TOLERANCES[HALF] if dtype == np.float16 else 1e-5)
    assert kinds(calls) == ["Patches", "Gemm"]
    assert (calls[0].operation.layout, calls[0].operation.dtype) == ("nhwc", "uint8")


@pytest.mark.parametrize(
    "before",
    [
        lambda b, x: b.op("Transpose", x, perm=[0, 3, 2, 1]),
        lambda b, x: channels_first(b, b.op("Sub", x, weights(3))),
        lambda b, x: channels_first(b, b.op("Sub", np.float32(1), x)),
        lambda b, x: channels_first(b, b.op("Div", x, np.float32(255))),
        lambda b, x: channels_first(b, b.op("Mul", x, x)),
    ],
    ids=["turned", "a number for each channel", "subtracted from", "divided", "squared"],
)
def test_what_else_is_done_with_bytes_is_done_before(before: Before) -> None:
    b = Builder()
    b.output(embed(b, before(b, single(b, b.input("x", [B, W, W, 3], np.uint8)))))
    calls = check(b.model(), 1e-5)
    found = kinds(calls)
    assert found[0] == "copy"
    assert found.count("Patches") == 1


def test_pixels_that_something_else_reads_are_there_in_float32() -> None:
    b = Builder()
    x = channels_first(b, single(b, b.input("x", [B, H, W, 3], np.uint8)))
    b.output(embed(b, x))
    b.output(b.op("Relu", x))
    assert kinds(check(b.model(), 1e-5)).count("copy") > 1


@pytest.mark.parametrize("attrs", [{"strides": [2, 2]}, {"pads": [2] * 4}])
def test_patches_that_overlap_or_go_beyond_are_no_embedding(attrs: dict[str, Any]) -> None:
    b = Builder()
    x = b.input("x", [B, 8, H, W])
    b.output(b.op("Conv", x, weights(C, 8, 4, 4), **({"strides": [4, 4]} | attrs)))
    assert kinds(check(b.model())) == ["copy", "Conv", "copy"]
