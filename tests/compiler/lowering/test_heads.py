"""The two heads' last layers as one kernel each, and operation by operation where a graph differs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.compiler.lowering.graphs import HALF, TOLERANCES, check, half, kinds, single
from tests.compiler.lowering.test_linear import refused
from tests.passes.graphs import Builder, weights

B, C, H, W = 2, 8, 4, 6


def points(
    b: Builder,
    x: str,
    *,
    channels: int = 16,
    group: int = 1,
    dtype: type = np.float32,
    growth: str = "Sub",
    clip: bool = True,
    size: int = 3,
) -> None:
    """Outputs points and confidences of a map (B, group * C, H, W)."""
    y = b.op("Conv", x, *convolution(channels * group, C, size, dtype), pads=[size // 2] * 4, group=group, name="wide")
    y = b.op("Conv", b.op("Relu", y), *convolution(4 * group, channels, 1, dtype), group=group, name="last")
    if dtype == np.float16:
        y = single(b, y)
    y = b.op("Reshape", y, np.array([B, group, 4, H, W]))
    y = b.op("Transpose", y, perm=[1, 0, 3, 4, 2])
    y = b.op("Reshape", y, np.array([group * B, H, W, 4]))
    xyz = b.op("Slice", y, np.array([0]), np.array([3]), np.array([-1]))
    norm = b.op("ReduceL2", xyz, np.array([-1]), keepdims=1)
    away = b.op("Exp", norm)
    away = b.op("Sub", away, np.float32(1)) if growth == "Sub" else b.op("Add", away, np.float32(-1))
    least = b.op("Clip", norm, np.float32(1e-8)) if clip else norm
    b.output(b.op("Mul", b.op("Div", xyz, least), away))
    b.output(b.op("Add", b.op("Exp", b.op("Gather", y, np.array(3), axis=-1)), np.float32(1)))


def convolution(outside: int, inside: int, size: int, dtype: type) -> tuple[Any, Any]:
    scale = 0.2 if size > 1 else 0.5
    return (scale * weights(outside, inside, size, size)).astype(dtype), (scale * weights(outside)).astype(dtype)


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize(("growth", "clip"), [("Sub", True), ("Add", True), ("Sub", False)])
def test_points_and_confidences_are_one_call(group: int, growth: str, clip: bool) -> None:
    b = Builder()
    points(b, b.input("x", [B, group * C, H, W]), group=group, growth=growth, clip=clip)
    calls = check(b.model(), 1e-5)
    assert kinds(calls) == ["copy", "PointHead"]
    assert (calls[1].operation.groups, calls[1].operation.conf_floor) == (group, 1.0)


def test_points_in_float16() -> None:
    b = Builder()
    points(b, half(b, b.input("x", [B, C, H, W])), dtype=np.float16)
    calls = check(b.model(), 2 * TOLERANCES[HALF])
    assert kinds(calls)[-1] == "PointHead"
    assert calls[-1].operation.x.dtype == "float16"


@pytest.mark.parametrize("change", [{"channels": 264}, {"size": 1}], ids=["more channels than it holds", "a product"])
def test_last_layers_that_the_kernel_does_not_do(change: dict[str, int]) -> None:
    b = Builder()
    points(b, b.input("x", [B, C, H, W]), **change)
    assert "PointHead" not in kinds(check(b.model(), 1e-5))


def test_channels_that_no_convolution_takes_are_refused() -> None:
    b = Builder()
    points(b, b.input("x", [B, C, H, W]), channels=12)
    refused(b.model(), "wide .*multiple of 8")


def test_points_that_something_else_reads_are_made_operation_by_operation() -> None:
    b = Builder()
    points(b, b.input("x", [B, C, H, W]))
    norm = next(node for node in b.nodes if node.op_type == "ReduceL2").output[0]
    b.output(b.op("Sqrt", norm))
    found = kinds(check(b.model(), 1e-5))
    assert "PointHead" not in found
    assert "Conv" in found


def test_a_map_that_something_else_reads_is_written() -> None:
    b = Builder()
    points(b, b.input("x", [B, C, H, W]))
    last = next(node for node in b.nodes if node.name == "last").output[0]
    b.output(b.op("Relu", last))
    assert "PointHead" not in kinds(check(b.model(), 1e-5))


def test_another_length_is_made_operation_by_operation() -> None:
    """exp(norm) - 2 is no length of MASt3R's."""
    b = Builder()
    points(b, b.input("x", [B, C, H, W]))
    changed = next(node for node in b.nodes if node.op_type == "Sub")
    changed.input[1] = b.constant(np.float32(2))
    assert "PointHead" not in kinds(check(b.model(), 1e-5))


def descriptors(b: Builder, x: str, *, channels: int = 7, patch: int = 2, dtype: type = np.float32, clip: bool = False) -> None:
    """Outputs descriptors and confidences of tokens (B, H * W, C)."""
    width = (channels + 1) * patch**2
    f = b.op("Add", b.op("MatMul", x, weights(C, width).astype(dtype)), weights(width).astype(dtype))
    if dtype == np.float16:
        f = single(b, f)
    maps = b.op("Reshape", b.op("Transpose", f, perm=[0, 2, 1]), np.array([B, width, H, W]))
    maps = b.op("DepthToSpace", maps, blocksize=patch, mode="CRD")
    maps = b.op("Transpose", maps, perm=[0, 2, 3, 1])
    vector = b.op("Slice", maps, np.array([0]), np.array([channels]), np.array([3]))
    norm = b.op("ReduceL2", vector, np.array([-1]), keepdims=1)
    b.output(b.op("Div", vector, b.op("Clip", norm, np.float32(1e-8)) if clip else norm))
    b.output(b.op("Add", b.op("Exp", b.op("Gather", maps, np.array(channels), axis=3)), np.float32(0)))


@pytest.mark.parametrize("clip", [True, False])
def test_descriptors_are_one_call_behind_their_product(clip: bool) -> None:
    b = Builder()
    descriptors(b, b.input("x", [B, H * W, C]), clip=clip)
    calls = check(b.model(), 1e-5)
    assert kinds(calls) == ["Gemm", "DescriptorHead"]
    op = calls[1].operation
    assert (op.groups * op.batch, op.h, op.w, op.channels, op.patch, op.confidence) == (B, H, W, 7, 2, 0.0)


def test_descriptors_of_features_in_float16() -> None:
    b = Builder()
    descriptors(b, half(b, b.input("x", [B, H * W, C])), dtype=np.float16)
    calls = check(b.model(), TOLERANCES[HALF])
    assert kinds(calls) == ["copy", "Gemm", "DescriptorHead"]


def test_descriptors_of_a_part_of_wider_features() -> None:
    b = Builder()
    x = b.input("x", [B, H * W, 3 * C])
    part = b.op("Slice", x, np.array([C]), np.array([2 * C]), np.array([2]))
    maps = b.op("DepthToSpace", b.op("Reshape", b.op("Transpose", part, perm=[0, 2, 1]), np.array([B, C, H, W])), blocksize=2, mode="CRD")
    maps = b.op("Transpose", maps, perm=[0, 2, 3, 1])
    vector = b.op("Slice", maps, np.array([0]), np.array([1]), np.array([3]))
    b.output(b.op("Div", vector, b.op("ReduceL2", vector, np.array([-1]), keepdims=1)))
    b.output(b.op("Add", b.op("Exp", b.op("Gather", maps, np.array(1), axis=3)), np.float32(0)))
    check(b.model(), 1e-5)


def test_descriptors_that_something_else_reads_are_made_operation_by_operation() -> None:
    b = Builder()
    descriptors(b, b.input("x", [B, H * W, C]))
    norm = next(node for node in b.nodes if node.op_type == "ReduceL2").output[0]
    b.output(b.op("Sqrt", norm))
    assert "DescriptorHead" not in kinds(check(b.model(), 1e-5))


def test_another_order_of_pixels_is_made_operation_by_operation() -> None:
    b = Builder()
    descriptors(b, b.input("x", [B, H * W, C]))
    shuffle = next(node for node in b.nodes if node.op_type == "DepthToSpace")
    next(attribute for attribute in shuffle.attribute if attribute.name == "mode").s = b"DCR"
    assert "DescriptorHead" not in kinds(check(b.model(), 1e-5))
