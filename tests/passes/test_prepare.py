from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from smc.passes.base import GraphRefused
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, assert_same, count, normal, weights


def shapes(model: onnx.ModelProto) -> dict[str, list[object]]:
    return {name: list(tensor.shape) for name, tensor in prepare(model).tensors().items()}


def reshaped(opset: int) -> onnx.ModelProto:
    """x (batch, n, 64) times weights that are too large to be a shape, its channels split by the arithmetic of the batch's shape."""
    b = Builder(opset)
    product = b.op("MatMul", b.input("x", ["batch", "n", 64]), weights(64, 32), name="product")
    batch = b.op("Gather", b.op("Shape", "x"), np.array([0]), axis=0)
    length = b.op("Gather", b.op("Shape", "x"), np.array([1]), axis=0)
    shape = b.op("Concat", batch, length, np.array([4, 8]), axis=0)
    b.output(b.op("ReduceSum", b.op("Reshape", product, shape, name="heads"), np.array([2]), keepdims=0))
    return b.model()


@pytest.mark.parametrize("opset", range(17, 24))
def test_raises_the_opset_and_infers_shapes(opset: int) -> None:
    model = reshaped(opset)
    graph = prepare(model)
    assert graph.opset == 23
    assert shapes(model)["heads_out0"] == ["batch", "n", 4, 8]
    assert_same(model, graph, {"x": normal(2, 3, 64)})


@pytest.mark.parametrize(
    ("shape", "target", "expected"),
    [
        (["batch", "n", 576], [0, 0, 3, 3, -1], ["batch", "n", 3, 3, 64]),
        (["batch", 16, 576], [-1, 16, 9, 64], ["batch", 16, 9, 64]),
        (["batch", 16, 576], [-1, 4, 4, 9, 64], ["batch", 4, 4, 9, 64]),
        (["batch", 16, 576], [16, -1, 576], [16, "batch", 576]),
    ],
)
def test_dimensions_that_a_reshape_leaves_open(shape: list[object], target: list[int], expected: list[object]) -> None:
    b = Builder()
    b.output(b.op("Relu", b.op("Reshape", b.input("x", shape), np.array(target), name="it")))
    assert shapes(b.model())["it_out0"] == expected


@pytest.mark.parametrize("target", [[-1, 64], [-1, 8, 576], [-1, 1, 48, 12]])
def test_dimensions_that_are_products_stay_open(target: list[int]) -> None:
    b = Builder()
    b.output(b.op("Relu", b.op("Reshape", b.input("x", ["batch", 16, 576]), np.array(target), name="it")))
    found = shapes(b.model())["it_out0"]
    assert found[1:] == target[1:]
    assert found[0] not in ("batch", 576)


def test_shapes_cut_by_computed_constants_are_known() -> None:
    """x.unflatten(-1, (3, heads, -1)) as torch's older exporter writes it: the axis is -1 modulo the rank."""
    b = Builder(17)
    shape = b.op("Shape", b.op("MatMul", b.input("x", ["batch", "n", 8]), weights(8, 96), name="product"))
    axis = b.op("Mod", b.op("Add", np.array([2]), np.array([3])), np.array([3]))
    front = b.op("Slice", shape, np.array([0]), b.op("Reshape", axis, np.array([1])))
    back = b.op("Slice", shape, b.op("Add", axis, np.array([1])), np.array([2**63 - 1]))
    split = b.op("Reshape", "product_out0", b.op("Concat", front, np.array([3, 2, -1]), back, axis=0), name="it")
    b.output(b.op("Relu", split), shape=["batch", "n", 3, 2, 16])
    model = b.model()
    assert shapes(model)["it_out0"] == ["batch", "n", 3, 2, 16]
    assert_same(model, prepare(model), {"x": normal(2, 5, 8)})


def test_newer_opsets_stay() -> None:
    assert prepare(reshaped(24)).opset == 24


def test_weights_are_the_models_own() -> None:
    model = reshaped(17)
    graph = prepare(model)
    product = next(node for node in graph.nodes if node.name == "product")
    assert (product.inputs[1].values == weights(64, 32)).all()
    assert model.graph.initializer[0].raw_data
    assert model.opset_import[0].version == 17


def test_dead_nodes_go_and_inputs_stay() -> None:
    b = Builder()
    b.input("unused", [2])
    b.output(b.op("Relu", b.input("x", [2])))
    b.op("Neg", "x")
    graph = prepare(b.model())
    assert count(graph) == {"Relu": 1}
    assert [tensor.name for tensor in graph.inputs] == ["unused", "x"]


def test_functions_are_inlined() -> None:
    twice = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 20)]
    )
    graph = helper.make_graph(
        [helper.make_node("Twice", ["x"], ["y"], domain="local")],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("local", 1)]
    model = helper.make_model(graph, functions=[twice], opset_imports=opsets, ir_version=10)
    prepared = prepare(model)
    assert count(prepared) == {"Add": 1}
    assert_same(model, prepared, {"x": normal(2)})


def test_too_old_an_opset_is_refused() -> None:
    b = Builder(16)
    b.output(b.op("Relu", b.input("x", [2])))
    with pytest.raises(GraphRefused, match="the graph has opset 16 of the standard operations; 17 or newer is needed"):
        prepare(b.model())


def test_weights_that_were_not_loaded_are_refused() -> None:
    model = reshaped(23)
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(GraphRefused, match="the values of constant_2 are in another file"):
        prepare(model)


def test_a_graph_that_cannot_be_raised_is_refused() -> None:
    b = Builder(17)
    b.output(b.op("Relu", b.input("x", [2])))
    model = b.model()
    model.graph.node[0].op_type = "NoSuchOperation"
    with pytest.raises(GraphRefused, match=r"the graph of opset 17 could not be raised to opset 23: .*NoSuchOperation"):
        prepare(model)


def test_a_graph_whose_shapes_cannot_be_inferred_is_refused() -> None:
    b = Builder(23)
    b.output(b.op("Relu", b.input("x", [2]), name="odd"))
    model = b.model()
    model.graph.node[0].domain = "nowhere"
    with pytest.raises(GraphRefused, match=r"the shapes of the graph's tensors could not be inferred: .*node name odd.*domain nowhere"):
        prepare(model)
