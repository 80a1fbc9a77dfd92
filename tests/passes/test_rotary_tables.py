from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.cancel_layout import CancelLayout
from smc.passes.common_subexpressions import CommonSubexpressions
from smc.passes.fix_shapes import FixShapes
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_constants import FoldConstants
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.rotary_fusion import RotaryFusion
from smc.passes.rotary_tables import RotaryTables
from tests.passes.graphs import HEAD_DIM, HEADS, Builder, apply, assert_same, count, exported_encoder, left_alone, normal, rotary, session

WIDTH = HEADS * HEAD_DIM
ARITHMETIC = {"Range", "Cos", "Sin", "Mul", "Cast"}


def grids(*sizes: tuple[int, int, int]) -> list[dict[str, np.ndarray]]:
    return [{"x": normal(*size, WIDTH)} for size in sizes]


def tables(graph: gs.Graph) -> list[tuple[int, ...]]:
    return [node.inputs[0].shape for node in graph.nodes if node.op == "Slice"]


def test_tables_become_slices() -> None:
    model = rotary()
    graph, report = apply(model, RotaryTables(5, 7))
    assert (report.rewrites, report.declined) == (2, [])
    assert not ARITHMETIC & set(count(graph))
    assert tables(graph) == [(5, 7, 4), (5, 7, 4)]
    assert_same(model, graph, *grids((1, 5, 7), (2, 3, 4), (3, 4, 3), (1, 1, 1), (2, 5, 1), (2, 1, 7)))


def test_names_and_shapes_of_the_tables_stay() -> None:
    model = rotary()
    before = next(node for node in apply(model, FoldConstants())[0].nodes if node.op == "RotaryEmbedding")
    graph, _ = apply(model, RotaryTables(5, 7))
    after = next(node for node in graph.nodes if node.op == "RotaryEmbedding")
    assert [(tensor.name, tensor.shape, tensor.dtype) for tensor in after.inputs] == [
        (tensor.name, tensor.shape, tensor.dtype) for tensor in before.inputs
    ]


def test_static_batch() -> None:
    model = rotary(batch=2)
    graph, report = apply(model, RotaryTables(4, 4))
    assert report.rewrites == 2
    assert_same(model, graph, *grids((2, 3, 4), (2, 4, 2)))


def test_a_grid_beyond_the_largest_does_not_run() -> None:
    graph, _ = apply(rotary(), RotaryTables(3, 3))
    with pytest.raises(Exception, match="cos_cache"):
        session(gs.export_onnx(graph)).run(None, {"x": normal(1, 4, 3, WIDTH)})


def reason(model: onnx.ModelProto, rows: int = 5, cols: int = 7) -> str:
    """Of cos, where sin is replaced: the pass looks at each for itself."""
    graph, report = apply(model, RotaryTables(rows, cols))
    assert report.rewrites == 1
    assert tables(graph) == [(rows, cols, 4)]
    (declined,) = report.declined
    assert declined.node == "rotary"
    assert_same(model, graph, *grids((2, 3, 4), (1, 5, 7)))
    return declined.why


def test_a_table_of_relative_positions_is_left_alone() -> None:
    def table(b: Builder, angles: str) -> str:
        largest = b.op("ReduceMax", angles, keepdims=1)
        return b.op("Cos", b.op("Div", angles, b.op("Max", largest, np.float32(0.5))))

    assert "for 5 x 1 tokens is not part of that of 5 x 7" in reason(rotary(table))


def test_a_table_of_the_batch_is_left_alone() -> None:
    def table(b: Builder, angles: str) -> str:
        batch = b.op("Cast", b.op("Shape", "x", start=0, end=1), to=onnx.TensorProto.FLOAT)
        return b.op("Cos", b.op("Mul", angles, batch))

    assert "tokens is not part of that of 5 x 7" in reason(rotary(table))


def test_a_table_of_the_tokens_own_values_is_left_alone() -> None:
    def table(b: Builder, angles: str) -> str:
        return b.op("Cos", b.op("Add", angles, b.op("ReduceMean", "x", keepdims=0)))

    assert reason(rotary(table)).endswith("depends on the values of x")


def test_a_table_by_columns_first_is_left_alone() -> None:
    def table(b: Builder, angles: str) -> str:
        swapped = b.op("Concat", b.op("Shape", "x", start=2, end=3), b.op("Shape", "x", start=1, end=2), np.array([-1]), axis=0)
        turned = b.op("Transpose", b.op("Reshape", angles, swapped), perm=[1, 0, 2])
        return b.op("Cos", b.op("Reshape", turned, np.array([-1, HEAD_DIM // 2])))

    assert "tokens is not part of" in reason(rotary(table))


def test_tables_that_are_inputs_or_constants_are_left_alone() -> None:
    b = Builder()
    x, cos = b.input("x", [2, HEADS, 6, HEAD_DIM]), b.input("cos", [2, 6, HEAD_DIM // 2])
    b.output(b.op("RotaryEmbedding", x, cos, normal(2, 6, HEAD_DIM // 2), name="rotary"))
    assert left_alone(b.model(), RotaryTables(2, 3)) == [("rotary", "cos depends on the values of cos")]


def test_nothing_is_left_to_do_where_the_grid_is_fixed() -> None:
    graph, report = apply(rotary(), FixShapes({"rows": 3, "cols": 4}), FoldConstants(), RotaryTables(5, 7))
    assert (report.rewrites, report.declined) == (0, [])
    assert count(graph)["Expand"] == 2


def test_all_layers_of_the_exported_encoder_share_two_tables() -> None:
    model = exported_encoder()
    graph, report = apply(model, FlashMatch(), RotaryFusion(), FoldPermutation(), FoldConstants(), RotaryTables(8, 9))
    assert (report.rewrites, report.declined) == (2, [])
    CancelLayout()(graph)
    CommonSubexpressions()(graph)
    assert not ARITHMETIC & set(count(graph))
    rotations = [node for node in graph.nodes if node.op == "RotaryEmbedding"]
    assert [len({node.inputs[i].name for node in rotations}) for i in (1, 2)] == [1, 1]
    assert_same(model, graph, *({"image": normal(b, 3, 16 * rows, 16 * cols)} for b, rows, cols in ((1, 3, 4), (2, 8, 9), (1, 7, 3))))
