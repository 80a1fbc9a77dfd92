from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from smc.passes.commute_upsample import CommuteUpsample
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal, weights

SHAPE: list[int | str] = ["batch", 8, "rows", 5]
FEEDS = [{"x": normal(1, 8, 4, 5)}, {"x": normal(3, 8, 2, 5)}]


def resize(b: Builder, x: str, scales: Any = (1, 1, 2, 2), **attrs: Any) -> str:
    attrs = {"mode": "linear", "coordinate_transformation_mode": "align_corners"} | attrs
    return b.op("Resize", x, "", np.array(scales, np.float32), name="resize", **attrs)


def conv(b: Builder, x: str, size: int = 1, channels: int = 6, **attrs: Any) -> str:
    return b.op("Conv", x, weights(channels, 8 // attrs.get("group", 1), size, size), weights(channels), name="conv", **attrs)


def model(*, shape: list[int | str] = SHAPE, attrs: dict[str, Any] | None = None, **enlarged: Any) -> onnx.ModelProto:
    b = Builder()
    b.output(conv(b, resize(b, b.input("x", shape), **enlarged), **(attrs or {})))
    return b.model()


def order(graph: Any) -> list[str]:
    return [node.op for node in graph.nodes]


@pytest.mark.parametrize("attrs", [{}, {"group": 2}, {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4}, {"channels": 8}])
@pytest.mark.parametrize("coordinates", ["align_corners", "half_pixel", "asymmetric"])
def test_the_convolution_comes_first(attrs: dict[str, Any], coordinates: str) -> None:
    before = model(attrs=attrs, coordinate_transformation_mode=coordinates)
    graph, report = apply(before, CommuteUpsample())
    assert report.rewrites == 1
    assert order(graph) == ["Conv", "Resize"]
    assert [node.name for node in graph.nodes] == ["conv", "resize"]
    assert_same(before, graph, *FEEDS)


def test_shapes_between_are_those_of_the_smaller_map() -> None:
    graph, _ = apply(model(shape=[2, 8, 4, 5]), CommuteUpsample())
    convolution, enlargement = graph.nodes
    assert convolution.outputs[0].shape == [2, 6, 4, 5]
    assert enlargement.outputs[0].shape == [2, 6, 8, 10]


def test_an_enlargement_to_a_size_of_as_many_channels() -> None:
    b = Builder()
    x = b.input("x", [2, 8, 4, 5])
    wide = b.op("Resize", x, "", "", np.array([2, 8, 9, 7]), mode="linear", coordinate_transformation_mode="align_corners")
    b.output(conv(b, wide, channels=8))
    before = b.model()
    graph, report = apply(before, CommuteUpsample())
    assert report.rewrites == 1
    assert order(graph) == ["Conv", "Resize"]
    assert_same(before, graph, {"x": normal(2, 8, 4, 5)})


def test_two_in_a_row() -> None:
    b = Builder()
    y = b.op("Relu", conv(b, resize(b, b.input("x", SHAPE)), channels=8))
    wide = b.op("Resize", y, "", np.array([1, 1, 2, 2], np.float32), mode="linear", coordinate_transformation_mode="align_corners")
    b.output(b.op("Conv", wide, weights(4, 8, 1, 1, seed=1)))
    before = b.model()
    graph, report = apply(before, CommuteUpsample())
    assert report.rewrites == 2
    assert order(graph) == ["Conv", "Resize", "Relu", "Conv", "Resize"]
    assert_same(before, graph, *FEEDS)


@pytest.mark.parametrize(
    ("attrs", "enlarged"),
    [
        ({"size": 3, "pads": [1] * 4}, {}),
        ({"strides": [2, 2]}, {}),
        ({"pads": [1] * 4}, {}),
        ({}, {"mode": "nearest", "coordinate_transformation_mode": "asymmetric"}),
        ({}, {"mode": "cubic"}),
        ({}, {"scales": (1, 1, 0.5, 1)}),
        ({}, {"scales": (1, 1, 1, 1)}),
    ],
    ids=["3x3", "stride", "padding", "nearest", "cubic", "smaller", "as large"],
)
def test_what_is_left_alone(attrs: dict[str, Any], enlarged: dict[str, Any]) -> None:
    left_alone(model(shape=[2, 8, 4, 5], attrs=attrs, **enlarged), CommuteUpsample())


def test_a_map_that_something_else_reads_is_left_alone() -> None:
    b = Builder()
    wide = resize(b, b.input("x", SHAPE))
    b.output(conv(b, wide))
    b.output(b.op("Relu", wide))
    ((node, why),) = left_alone(b.model(), CommuteUpsample())
    assert node.startswith("conv")
    assert "is read by" in why


def test_a_map_that_the_graph_gives_out_is_left_alone() -> None:
    b = Builder()
    wide = resize(b, b.input("x", SHAPE))
    b.output(conv(b, wide))
    b.output(wide)
    ((_, why),) = left_alone(b.model(), CommuteUpsample())
    assert "is an output of the graph" in why


def test_a_size_that_names_the_channels_is_left_alone() -> None:
    b = Builder()
    wide = b.op(
        "Resize", b.input("x", [2, 8, 4, 5]), "", "", np.array([2, 8, 9, 7]), mode="linear", coordinate_transformation_mode="align_corners"
    )
    b.output(conv(b, wide))
    ((_, why),) = left_alone(b.model(), CommuteUpsample())
    assert "whose channels would change" in why


def test_more_channels_are_left_alone() -> None:
    b = Builder()
    b.output(conv(b, resize(b, b.input("x", [2, 4, 4, 5]), scales=(1, 2, 2, 2))))
    ((_, why),) = left_alone(b.model(), CommuteUpsample())
    assert "enlarges more than images" in why


def test_a_convolution_of_something_else_is_left_alone() -> None:
    b = Builder()
    b.output(conv(b, b.op("Relu", b.input("x", SHAPE))))
    graph, report = apply(b.model(), CommuteUpsample())
    assert report.rewrites == 0
    assert count(graph) == {"Relu": 1, "Conv": 1}
