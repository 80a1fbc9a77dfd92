from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from smc.plugins.conv.specification import Conv
from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder, weights

B, C, H, W = 2, 8, 5, 7


def start(channels: int = C) -> tuple[Builder, str]:
    b = Builder()
    return b, b.input("x", [B, channels, H, W])


def padded(attrs: dict[str, Any]) -> dict[str, Any]:
    return attrs if "auto_pad" in attrs else {"pads": [1] * 4} | attrs


def conv(b: Builder, x: str, dtype: type = np.float32, seed: int = 0, **attrs: Any) -> str:
    kernel = weights(16, C, 3, 3, seed=seed).astype(dtype)
    return b.op("Conv", x, kernel, weights(16, seed=seed).astype(dtype), **padded(attrs))


@pytest.mark.parametrize("attrs", [{}, {"strides": [2, 2]}, {"pads": [0] * 4}, {"pads": [2] * 4, "strides": [3, 3]}, {"auto_pad": "VALID"}])
def test_a_convolution_between_copies_of_the_graphs_layout(attrs: dict[str, Any]) -> None:
    b, x = start()
    b.output(conv(b, x, **attrs))
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Conv", "copy"]
    assert calls[1].operation.bias == "float32"


def test_maps_stay_channels_last_between_convolutions() -> None:
    b, x = start()
    y = b.op("Relu", conv(b, x))
    z = b.op("Conv", y, weights(C, 16, 3, 3), pads=[1] * 4)
    b.output(b.op("Transpose", z, perm=[0, 2, 3, 1]))
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Conv", "Conv"]
    assert calls[1].operation.activation == "relu"


def test_groups_of_one_convolution_are_of_different_weights() -> None:
    """As the two views' heads: channels of both in one tensor, in memory one behind the other."""
    b = Builder()
    x = b.input("x", [B, 2 * C, H, W])
    y = b.op("Conv", x, weights(32, C, 3, 3), weights(32), pads=[1] * 4, group=2)
    y = b.op("Conv", b.op("Relu", y), weights(16, 16, 3, 3), pads=[1] * 4, group=2)
    b.output(y)
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Conv", "Conv", "copy"]
    assert [call.operation.groups for call in calls[1:3]] == [2, 2]
    assert calls[2].operation.x.group == B * H * W * 16


def test_a_convolution_in_float16() -> None:
    b = Builder()
    x, r = (b.op("Transpose", b.input(name, [B, H, W, size]), perm=[0, 3, 1, 2]) for name, size in (("x", C), ("r", 16)))
    y = b.op("Add", half(b, r), conv(b, half(b, x), np.float16))
    b.output(single(b, b.op("Transpose", b.op("Relu", y), perm=[0, 2, 3, 1])))
    calls = check(b.model(), TOLERANCES[HALF])
    assert sorted(kinds(calls)) == ["Conv", "copy", "copy"]
    (op,) = (call.operation for call in calls if isinstance(call.operation, Conv))
    assert (op.x.dtype, op.out.dtype, op.activation, op.bias) == ("float16", "float32", "relu", "float16")
    assert op.residual is not None
    assert op.residual.dtype == "float16"


def test_a_convolution_in_float32_of_a_map_in_float16() -> None:
    b, x = start()
    b.output(conv(b, single(b, half(b, x))))
    calls = check(b.model(), TOLERANCES[HALF])
    assert [call.operation.x.dtype for call in calls if isinstance(call.operation, Conv)] == ["float32"]


@pytest.mark.parametrize(
    ("attrs", "kernel"),
    [
        ({"dilations": [2, 2]}, (3, 3)),
        ({"pads": [0, 1, 0, 1]}, (3, 3)),
        ({"strides": [1, 2]}, (3, 3)),
        ({"auto_pad": "SAME_UPPER"}, (3, 3)),
        ({}, (3, 1)),
    ],
)
def test_convolutions_that_no_kernel_does_are_refused(attrs: dict[str, Any], kernel: tuple[int, int]) -> None:
    b, x = start()
    b.output(b.op("Conv", x, weights(16, C, *kernel), name="odd_one", **padded(attrs)))
    refused(b.model(), r"odd_one .*Conv\)")


@pytest.mark.parametrize(("inside", "outside"), [(3, 8), (8, 3)])
def test_channels_that_are_no_multiple_of_8_are_refused(inside: int, outside: int) -> None:
    b, x = start(inside)
    b.output(b.op("Conv", x, weights(outside, inside, 3, 3), pads=[1] * 4, name="narrow"))
    refused(b.model(), r"narrow .*Conv\)")


def test_weights_that_are_computed_are_refused() -> None:
    b, x = start()
    b.output(b.op("Conv", x, b.input("w", [8, C, 3, 3]), name="dynamic"))
    refused(b.model(), "dynamic .*not constants")


RESIZE = {"mode": "linear", "coordinate_transformation_mode": "align_corners"}


def resize(b: Builder, x: str, name: str = "resize", **attrs: Any) -> str:
    return b.op("Resize", x, "", np.array([1, 1, 2, 2], np.float32), name=name, **(RESIZE | attrs))


def test_an_enlargement_adds_its_residual_and_writes_a_relu() -> None:
    b, x = start()
    r = b.op("Transpose", b.input("r", [B, 2 * H, 2 * W, C]), perm=[0, 3, 1, 2])
    y = b.op("Add", resize(b, x), r)
    z = b.op("Conv", b.op("Relu", y), weights(C, C, 3, 3), pads=[1] * 4)
    b.output(b.op("Transpose", b.op("Add", y, z), perm=[0, 2, 3, 1]))
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Upsample", "Conv"]
    assert calls[1].operation.residual is not None
    assert calls[1].writes == ("out", "out_relu")


def test_an_enlargement_of_the_views_stays_in_groups() -> None:
    b = Builder()
    y = b.op("Conv", b.input("x", [B, 2 * C, H, W]), weights(16, C, 3, 3), pads=[1] * 4, group=2)
    z = b.op("Conv", resize(b, y), weights(16, C, 3, 3), pads=[1] * 4, group=2)
    b.output(z)
    calls = check(b.model())
    assert kinds(calls) == ["copy", "Conv", "Upsample", "Conv", "copy"]
    assert calls[2].operation.groups == 2


def test_an_enlargement_to_a_size() -> None:
    b, x = start()
    b.output(b.op("Resize", x, "", "", np.array([B, C, 12, 9]), **RESIZE))
    calls = check(b.model())
    assert (calls[1].operation.out_height, calls[1].operation.out_width) == (12, 9)


@pytest.mark.parametrize(
    "attrs", [{"mode": "nearest"}, {"mode": "cubic"}, {"coordinate_transformation_mode": "half_pixel"}, {"antialias": 1}]
)
def test_other_interpolations_are_refused(attrs: dict[str, Any]) -> None:
    b, x = start()
    b.output(resize(b, x, name="odd_one", **attrs))
    refused(b.model(), r"odd_one .*Resize\)")


def test_more_channels_are_no_enlargement() -> None:
    b, x = start()
    b.output(b.op("Resize", x, "", np.array([1, 2, 1, 1], np.float32), name="odd_one", **RESIZE))
    refused(b.model(), r"odd_one .*Resize\)")
