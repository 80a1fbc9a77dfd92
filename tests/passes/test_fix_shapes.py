from __future__ import annotations

import numpy as np
import onnx
import pytest

from smc.passes.base import GraphRefused
from smc.passes.fix_shapes import FixShapes
from tests.passes.graphs import Builder, apply, assert_same, exported_encoder, normal, rotary, weights


def patches() -> onnx.ModelProto:
    """image (batch, 3, 16*rows, 16*cols) -> a Conv's result and, by the arithmetic of its shape, its tokens."""
    b = Builder()
    image = b.input("image", ["batch", 3, "16*rows", "16*cols"])
    conv = b.op("Conv", image, weights(8, 3, 16, 16), name="conv", strides=[16, 16])
    shape = b.op("Concat", b.op("Shape", conv, start=0, end=1), np.array([8]), np.array([-1]), axis=0)
    b.output(b.op("Relu", b.op("Reshape", conv, shape, name="tokens")))
    return b.model()


def test_shapes_that_follow_become_static() -> None:
    model = patches()
    graph, report = apply(model, FixShapes({"batch": 2, "rows": 3, "cols": 4}))
    assert (report.rewrites, report.declined) == (3, [])
    assert report.nodes_before == report.nodes_after
    assert graph.inputs[0].shape == [2, 3, 48, 64]
    assert graph.tensors()["conv_out0"].shape == [2, 8, 3, 4]
    assert graph.tensors()["tokens_out0"].shape == [2, 8, 12]
    assert list(graph.outputs[0].shape) == [2, 8, 12]
    assert_same(model, graph, {"image": normal(2, 3, 48, 64)})


def test_a_dimension_may_be_named_as_it_is_written() -> None:
    graph, report = apply(patches(), FixShapes({"16*cols": 64}))
    assert report.rewrites == 1
    assert graph.inputs[0].shape == ["batch", 3, "16*rows", 64]


def test_other_dimensions_stay_dynamic() -> None:
    model = patches()
    graph, report = apply(model, FixShapes({"batch": 2}))
    assert report.rewrites == 1
    assert graph.inputs[0].shape == [2, 3, "16*rows", "16*cols"]
    assert graph.tensors()["tokens_out0"].shape[:2] == [2, 8]
    assert_same(model, graph, {"image": normal(2, 3, 48, 64)}, {"image": normal(2, 3, 16, 32)})


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("rows", 5),
        ("2*(((rows - 1)//2)) + 2", 6),
        ("cols*rows", "cols*rows"),
        ("Max(1, rows)", "Max(1, rows)"),
        ("rows/2", "rows/2"),
        ("a.shape[0]", "a.shape[0]"),
        ("~odd~", "~odd~"),
    ],
)
def test_stated_arithmetic_is_computed(stated: str, expected: int | str) -> None:
    b = Builder()
    b.input("size", ["rows"])
    x = b.input("x", [stated])
    b.output(b.op("Relu", x))
    graph, _ = apply(b.model(), FixShapes({"rows": 5}))
    assert [list(tensor.shape) for tensor in graph.inputs] == [[5], [expected]]
    assert list(graph.outputs[0].shape) == [expected]


def test_shapes_that_shape_inference_named_are_inferred_again() -> None:
    b = Builder()
    x = b.input("x", ["batch", "rows", 4])
    b.output(b.op("Relu", b.op("Reshape", x, np.array([-1, 4]), name="joined")))
    graph, _ = apply(b.model(), FixShapes({"batch": 2, "rows": 3}))
    assert graph.tensors()["joined_out0"].shape == [6, 4]
    assert list(graph.outputs[0].shape) == [6, 4]


def test_weights_stay_the_models_own() -> None:
    graph, _ = apply(patches(), FixShapes({"batch": 2}))
    (conv,) = (node for node in graph.nodes if node.op == "Conv")
    assert (conv.inputs[1].values == weights(8, 3, 16, 16)).all()
    assert [tensor.name for tensor in graph.inputs] == ["image"]


def test_a_name_that_no_input_has_is_refused() -> None:
    with pytest.raises(GraphRefused, match=r"no input has a dimension height, width; there are batch, 16\*rows, 16\*cols"):
        apply(patches(), FixShapes({"batch": 1, "height": 3, "width": 3}))


def test_every_shape_of_the_exported_encoder_becomes_static() -> None:
    graph, report = apply(exported_encoder(), FixShapes({"batch": 1, "rows": 3, "cols": 4}))
    assert report.rewrites == 3
    assert all(isinstance(size, int) for tensor in graph.tensors().values() for size in tensor.shape)


def test_rotary_tables_become_static() -> None:
    graph, _ = apply(rotary(), FixShapes({"batch": 2, "rows": 3, "cols": 4}))
    (node,) = (node for node in graph.nodes if node.op == "RotaryEmbedding")
    assert [list(tensor.shape) for tensor in node.inputs] == [[2, 2, 12, 8], [2, 12, 4], [2, 12, 4]]
