from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes import fold_constants
from smc.passes.cancel_layout import CancelLayout
from smc.passes.fix_shapes import FixShapes
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_constants import FoldConstants
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.rotary_fusion import RotaryFusion
from tests.passes.graphs import Builder, apply, assert_same, count, exported_encoder, left_alone, normal, rotary, weights

SHAPE_ARITHMETIC = {"Cast", "Concat", "Constant", "Cos", "Expand", "Gather", "Mul", "Range", "Shape", "Sin"}


@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "Constant nodes"])
def test_arithmetic_of_constants_becomes_one(constant_nodes: bool) -> None:
    b = Builder(constant_nodes=constant_nodes)
    angles = b.op("Mul", b.op("Range", np.float32(0), np.float32(5), np.float32(1)), np.float32(0.3))
    b.output(b.op("Add", b.input("x", ["n", 5]), b.op("Cos", angles, name="cos")))
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert report.declined == []
    assert report.rewrites == 3 + 4 * constant_nodes
    assert count(graph) == {"Add": 1}
    (node,) = graph.nodes
    assert node.inputs[1].name == "cos_out0"
    assert node.inputs[1].dtype == np.float32
    assert np.allclose(node.inputs[1].values, np.cos(0.3 * np.arange(5)), atol=1e-6)
    assert_same(model, graph, {"x": normal(3, 5)})


def test_all_outputs_of_a_node_fold() -> None:
    b = Builder()
    halves = b.op("Split", weights(4, 6), outputs=2, axis=1, num_outputs=2)
    x = b.input("x", ["n", 4])
    b.output(b.op("Sub", b.op("MatMul", x, halves[0]), b.op("MatMul", x, halves[1])))
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert report.rewrites == 1
    assert count(graph) == {"MatMul": 2, "Sub": 1}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_optional_inputs_may_be_absent() -> None:
    b = Builder()
    bounded = b.op("Clip", weights(4), "", np.float32(0.1))
    b.output(b.op("Add", b.input("x", ["n", 4]), bounded))
    model = b.model()
    graph, _ = apply(model, FoldConstants())
    assert count(graph) == {"Add": 1}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_sizes_of_static_dimensions_fold_and_those_of_dynamic_ones_stay() -> None:
    b = Builder()
    x = b.input("x", ["n", 4, 6])
    static, dynamic = b.op("Shape", x, start=1), b.op("Shape", x, end=1, name="dynamic")
    joined = b.op("Concat", dynamic, b.op("ReduceProd", static, keepdims=1), axis=0, name="joined")
    b.output(b.op("Reshape", x, joined))
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert report.rewrites == 1  # `prepare` folded the static Shape
    assert count(graph) == {"Shape": 1, "Concat": 1, "Reshape": 1}
    assert_same(model, graph, {"x": normal(3, 4, 6)}, {"x": normal(5, 4, 6)})


def test_static_dimensions_are_seen_through_a_shape_with_dynamic_ones() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    size = b.op("Gather", b.op("Shape", x), np.array(1))
    b.output(b.op("Mul", x, b.op("Cast", size, to=onnx.TensorProto.FLOAT)))
    model = b.model()
    graph, _ = apply(model, FoldConstants())
    assert count(graph) == {"Mul": 1}
    assert_same(model, graph, {"x": normal(3, 4)})


def test_as_many_positions_as_a_dynamic_dimension_has_stay() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    b.input("table", [9, 4])
    size = b.op("Shape", x, end=1)
    positions = b.op("Slice", np.arange(9), np.array([0]), size, np.array([0]), name="positions")
    b.output(b.op("Add", x, b.op("Gather", "table", positions, axis=0)))
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert (report.rewrites, report.declined) == (0, [])
    assert_same(model, graph, *({"x": normal(n, 4), "table": normal(9, 4)} for n in (2, 5)))


def test_a_constant_of_the_type_of_a_dynamic_tensor_folds() -> None:
    b = Builder()
    x = b.input("x", ["n", 4], np.float16)
    b.output(b.op("Add", x, b.op("CastLike", np.float32(0.5), x)), np.float16)
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert report.rewrites == 1
    assert graph.nodes[0].inputs[1].dtype == np.float16
    assert_same(model, graph, {"x": normal(3, 4, dtype=np.float16)})


def test_the_type_of_a_dynamic_tensor_does_not_make_it_constant() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    b.output(b.op("CastLike", x, np.float16(0)), np.float16)
    assert left_alone(b.model(), FoldConstants()) == []


def large(operand: np.ndarray) -> onnx.ModelProto:
    b = Builder()
    table = b.op("Expand", operand, np.array([2048, 1024]), name="repeated")
    b.output(b.op("Add", b.input("x", [2048, 1024]), table))
    return b.model()


def test_a_small_constant_does_not_become_a_large_one() -> None:
    assert left_alone(large(normal(1, 1024)), FoldConstants()) == [("repeated", "repeated_out0 would be a constant of 8388608 bytes")]


def test_a_large_constant_may_become_another() -> None:
    b = Builder()
    b.output(b.op("MatMul", b.input("x", ["n", 1024]), b.op("Transpose", normal(2048, 1024), perm=[1, 0])))
    model = b.model()
    graph, report = apply(model, FoldConstants())
    assert (report.rewrites, report.declined) == (1, [])
    assert_same(model, graph, {"x": normal(2, 1024)})


def test_what_follows_a_large_result_stays_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_constants, "_LIMIT", 100)
    b = Builder()
    doubled = b.op("Expand", normal(1, 20), np.array([2, 20]), name="repeated")
    b.output(b.op("Add", b.input("x", [2, 20]), b.op("Neg", doubled)))
    assert left_alone(b.model(), FoldConstants()) == [("repeated", "repeated_out0 would be a constant of 160 bytes")]


def test_random_numbers_stay() -> None:
    b = Builder()
    noise = b.op("RandomUniformLike", weights(4), seed=1.0)
    b.output(b.op("Add", b.input("x", [4]), noise))
    assert left_alone(b.model(), FoldConstants()) == []


def test_an_output_of_the_graph_stays() -> None:
    b = Builder()
    b.input("x", [3])
    b.output(b.op("Neg", weights(3), name="fixed"))
    assert left_alone(b.model(), FoldConstants()) == [("fixed", "fixed_out0 is an output of the graph")]


def test_what_nothing_computes_here_stays() -> None:
    b = Builder()
    b.output(b.op("Add", b.input("x", [3]), b.op("Neg", weights(3), name="other")))
    model = b.model()
    model.opset_import.append(onnx.helper.make_opsetid("elsewhere", 1))
    model.graph.node[0].domain = "elsewhere"
    assert left_alone(model, FoldConstants()) == []


@pytest.mark.parametrize("op", ["GlobalLpPool", "Gelu"])
def test_what_the_reference_implementation_lacks_stays(op: str) -> None:
    b = Builder()
    b.output(b.op("Add", b.input("x", [1, 1, 1, 1]), b.op(op, normal(1, 1, 1, 1), name="made")))
    ((node, why),) = left_alone(b.model(), FoldConstants())
    assert node == "made"
    assert why.startswith("onnx's reference implementation does not compute it")


def test_rotary_tables_become_constants() -> None:
    model = rotary()
    graph, report = apply(model, FixShapes({"batch": 2, "rows": 3, "cols": 4}), FoldConstants())
    assert report.declined == []
    assert count(graph) == {"Reshape": 1, "Transpose": 1, "RotaryEmbedding": 1}
    assert_same(model, graph, {"x": normal(2, 3, 4, 16)})


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [False, True], ids=["as exported", "after the FlashMatch passes"])
def test_no_shape_arithmetic_is_left_in_the_exported_encoder(fused: bool, batch: int) -> None:
    model = exported_encoder()
    before = [FlashMatch(), RotaryFusion(), FoldPermutation()] if fused else []
    graph, report = apply(model, *before, FixShapes({"batch": batch, "rows": 3, "cols": 4}), FoldConstants())
    assert report.declined == []
    assert not (SHAPE_ARITHMETIC - ({"Concat", "Mul"} if not fused else set())) & set(count(graph))
    tables = [tensor for node in graph.nodes if node.op == "RotaryEmbedding" for tensor in node.inputs[1:]]
    assert len(tables) == (8 if fused else 0)
    assert all(isinstance(table, gs.Constant) and list(table.shape) == [batch, 12, 32] for table in tables)
    CancelLayout()(graph)
    assert_same(model, graph, {"image": normal(batch, 3, 48, 64)})
