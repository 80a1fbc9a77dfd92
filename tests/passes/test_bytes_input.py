from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.bytes_input import BytesInput
from tests.passes.graphs import Builder, apply, count, exported_encoder, left_alone, session, weights


def embedding(
    kernel: tuple[int, int] = (4, 4),
    *,
    image: list[int | str] | None = None,
    dtype: Any = np.float32,
    weight: np.ndarray | None = None,
    extra: str = "",
    bias: bool = True,
    **attrs: Any,
) -> onnx.ModelProto:
    b = Builder()
    x = b.input("image", ["batch", 3, "4*rows", "4*cols"] if image is None else image, dtype)
    filters = weights(8, 3, *kernel) if weight is None else weight
    conv = b.op(
        "Conv", x, filters.astype(dtype), *([weights(8).astype(dtype)] if bias else []), name="embed", **({"strides": kernel} | attrs)
    )
    batch = b.op("Shape", x, start=0, end=1)
    b.output(b.op("Reshape", conv, b.op("Concat", batch, np.array([8, -1]), axis=0)), dtype)
    if extra:
        b.output(b.op(extra, x, name="other"), dtype)
    return b.model()


def pixels(*shape: int) -> np.ndarray:
    """uint8 (B, H, W, 3), every value among them."""
    values = np.random.default_rng(shape).integers(0, 256, shape, dtype=np.uint8)
    values.reshape(-1)[:256] = np.arange(256)
    return values


def normalised(image: np.ndarray) -> np.ndarray:
    return (image.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)


def assert_takes_bytes(model: onnx.ModelProto, graph: gs.Graph, *images: np.ndarray) -> None:
    after = gs.export_onnx(graph)
    onnx.checker.check_model(after, full_check=True)
    reference, changed = session(model), session(after)
    (only,) = changed.get_inputs()
    assert (only.name, only.type) == ("image", "tensor(uint8)")
    for image in images:
        (expected,), (actual,) = reference.run(None, {"image": normalised(image)}), changed.run(None, {"image": image})
        assert expected.shape == actual.shape
        assert np.linalg.norm(actual - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("bias", [True, False])
def test_the_image_is_taken_as_bytes(bias: bool) -> None:
    model = embedding(bias=bias)
    graph, report = apply(model, BytesInput())
    assert (report.rewrites, report.declined) == (1, [])
    assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in graph.inputs] == [("image", np.uint8, ["batch", "4*rows", "4*cols", 3])]
    assert report.nodes_after == report.nodes_before + 4
    assert_takes_bytes(model, graph, pixels(2, 8, 12, 3), pixels(1, 16, 8, 3))


def test_bytes_are_cast_before_anything_else() -> None:
    graph, _ = apply(embedding(), BytesInput())
    assert [node.op for node in graph.inputs[0].outputs] == ["Cast"]


def test_static_shapes_and_other_inputs() -> None:
    model = embedding(image=[2, 3, 8, 12])
    graph, _ = apply(model, BytesInput())
    assert graph.inputs[0].shape == [2, 8, 12, 3]
    assert_takes_bytes(model, graph, pixels(2, 8, 12, 3))


def test_weights_that_others_read_stay_theirs() -> None:
    b = Builder()
    filters = b.constant(weights(8, 3, 4, 4))
    x = b.input("image", ["batch", 3, "4*rows", "4*cols"])
    total = b.op("ReduceSum", filters, keepdims=0)
    b.output(b.op("Add", b.op("Conv", x, filters, strides=[4, 4]), total))
    model = b.model()
    graph, _ = apply(model, BytesInput())
    assert_takes_bytes(model, graph, pixels(1, 16, 12, 3))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_what_the_conv_reads_is_exact_in_half_precision(dtype: Any) -> None:
    b = Builder()
    image = b.input("image", [1, 3, 16, 16])
    b.output(b.op("Conv", image, np.eye(48, dtype=np.float32).reshape(48, 3, 4, 4), name="embed", strides=[4, 4]))
    graph, _ = apply(b.model(), BytesInput())
    (conv,) = (node for node in graph.nodes if node.op == "Conv")
    assert conv.inputs[1].values.max() == np.float32(128 / 127.5)
    graph.outputs = [conv.inputs[0]]
    (scaled,) = session(gs.export_onnx(graph.cleanup())).run(None, {"image": pixels(1, 16, 16, 3)})
    assert len(np.unique(scaled)) == 256
    assert (scaled.astype(dtype).astype(np.float32) == scaled).all()


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (embedding(strides=[2, 2]), "its stride is not its kernel's size, 4 x 4"),
        (embedding(strides=[4, 2]), "its stride is not its kernel's size, 4 x 4"),
        (embedding((2, 2), dilations=[2, 2]), "its stride is not its kernel's size, 2 x 2"),
        (embedding(pads=[1, 1, 1, 1]), "it pads the image"),
        (embedding(auto_pad="SAME_UPPER"), "it pads the image"),
        (embedding(image=["batch", 6, "4*rows", "4*cols"], weight=weights(8, 6, 4, 4)), "image has 6 channels, not 3"),
        (embedding(extra="Relu"), "image is read by embed (Conv), other (Relu), not by one Conv alone"),
    ],
    ids=["stride 2", "one stride", "dilated", "padded", "padded by name", "six channels", "read elsewhere"],
)
def test_other_graphs_are_left_alone(model: onnx.ModelProto, why: str) -> None:
    assert left_alone(model, BytesInput()) == [("embed", why)]


def test_an_image_that_another_operation_reads_is_left_alone() -> None:
    b = Builder()
    b.output(b.op("Relu", b.input("image", ["batch", 3, 8, 8]), name="relu"))
    assert left_alone(b.model(), BytesInput()) == [("relu", "image is read by relu (Relu), not by one Conv alone")]


def test_computed_weights_are_left_alone() -> None:
    b = Builder()
    x, w = b.input("image", ["batch", 3, 8, 8]), b.input("w", [96])
    b.output(b.op("Conv", x, b.op("Reshape", w, np.array([2, 3, 4, 4])), name="embed", strides=[4, 4], kernel_shape=[4, 4]))
    assert left_alone(b.model(), BytesInput()) == [("embed", "the weights reshape_1_out0 are not float32 constants")]


def test_other_inputs_are_none_of_its_business() -> None:
    b = Builder()
    b.output(b.op("Add", b.input("features", ["batch", "rows", "cols", 8]), b.input("half", [8], np.float32)))
    (node,) = b.nodes
    assert left_alone(b.model(), BytesInput()) == [(node.name, f"features is read by {node.name} (Add), not by one Conv alone")]
    assert left_alone(embedding(dtype=np.float16), BytesInput()) == []


def test_the_exported_encoder() -> None:
    model = exported_encoder()
    graph, report = apply(model, BytesInput())
    assert report.rewrites == 1
    assert count(graph)["Cast"] == 3
    assert_takes_bytes(model, graph, pixels(2, 48, 64, 3))
