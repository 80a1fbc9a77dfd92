from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from smc.compiler.graph_runner import GraphRunner, emulated, low_precision
from smc.exported.errors import BackendFailed
from smc.passes.hybrid_cast import HybridCast
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, apply, normal, session, weights

BFLOAT16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
DTYPES = {TensorProto.FLOAT16: np.dtype(np.float16), TensorProto.BFLOAT16: BFLOAT16}


def mlp() -> onnx.ModelProto:
    """Two products, whose weights go beside the model, and a bias, which goes in it."""
    b = Builder()
    x = b.input("x", ["n", 64])
    hidden = b.op("Gelu", b.op("Add", b.op("MatMul", x, weights(64, 96)), normal(96), name="hidden"))
    b.output(b.op("MatMul", hidden, weights(96, 32), name="out"))
    b.output(b.op("Neg", hidden, name="second"))
    return b.model()


def typed(code: int, *ops: tuple[str, dict[str, Any]], value: Any = None) -> gs.Graph:
    """Cast(x) to a low type, unary operations in it, and a Cast back."""
    low = DTYPES[code] if code == TensorProto.FLOAT16 else code
    x = gs.Variable("x", np.dtype(np.float32), ["n"])
    tensor = gs.Variable("low", low, ["n"])
    nodes = [gs.Node("Cast", "down", {"to": code}, [x], [tensor])]
    for i, (op, attrs) in enumerate(ops):
        made = gs.Variable(f"made{i}", low, ["n"])
        operands = [tensor] if value is None else [tensor, gs.Constant(f"value{i}", np.asarray(value).astype(DTYPES[code]))]
        nodes.append(gs.Node(op, f"op{i}", attrs, operands, [made]))
        tensor = made
    y = gs.Variable("y", np.dtype(np.float32), ["n"])
    nodes.append(gs.Node("Cast", "up", {"to": TensorProto.FLOAT}, [tensor], [y]))
    return gs.Graph(nodes, [x], [y], opset=23, ir_version=10)


def test_float32_runs_as_written() -> None:
    model = mlp()
    graph = prepare(model)
    feed = {"x": normal(5, 64)}
    expected = session(model).run(None, feed)
    found = GraphRunner(graph).run(feed)
    assert list(found) == ["out_out0", "second_out0"]
    for name, values in zip(found, expected, strict=True):
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-6)


def test_the_graph_stays_as_it_is_and_can_be_optimised() -> None:
    graph = prepare(mlp())
    before = gs.export_onnx(graph).SerializeToString()
    feed = {"x": normal(5, 64)}
    plain = GraphRunner(graph).run(feed)
    quick = GraphRunner(graph, optimize=True, threads=1).run(feed, ["out_out0"])
    assert list(quick) == ["out_out0"]
    np.testing.assert_allclose(quick["out_out0"], plain["out_out0"], rtol=1e-4, atol=1e-5)
    assert gs.export_onnx(graph).SerializeToString() == before


@pytest.mark.parametrize("code", DTYPES, ids=["float16", "bfloat16"])
def test_every_result_is_rounded(code: int) -> None:
    x = normal(1000)
    third = np.float32(1 / 3)
    found = GraphRunner(typed(code, ("Mul", {}), ("Add", {}), value=[third])).run({"x": x})["y"]
    dtype = DTYPES[code]

    def rounded(values: np.ndarray) -> np.ndarray:
        return values.astype(dtype).astype(np.float32)

    factor = rounded(np.array(third))
    expected = rounded(rounded(rounded(x) * factor) + factor)
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, rounded(rounded(x) * factor + factor)), "the product must be rounded too"


def test_overflow_is_infinite_in_float16_alone() -> None:
    x = {"x": np.array([200.0, 300.0, -300.0], dtype=np.float32)}
    squares = ("Mul", {})
    graph = {code: typed(code, squares, value=[300.0]) for code in DTYPES}
    np.testing.assert_array_equal(GraphRunner(graph[TensorProto.FLOAT16]).run(x)["y"], [60000, np.inf, -np.inf])
    np.testing.assert_array_equal(GraphRunner(graph[TensorProto.BFLOAT16]).run(x)["y"], [59904, 90112, -90112])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_emulation_has_no_low_arithmetic(precision: Any) -> None:
    graph, _ = apply(mlp(), HybridCast(precision))
    emulation = emulated(graph)
    for node in emulation.nodes:
        if node.op != "Cast":
            assert not any(low_precision(tensor) for tensor in (*node.inputs, *node.outputs)), node.name
    model = gs.export_onnx(emulation)
    onnx.checker.check_model(model, full_check=True)
    feed = {"x": normal(5, 64)}
    exact = GraphRunner(prepare(mlp())).run(feed)
    for name, values in GraphRunner(graph).run(feed).items():
        error = np.linalg.norm(values - exact[name]) / np.linalg.norm(exact[name])
        assert {"fp16": 1e-4, "bf16": 1e-3}[precision] < error < {"fp16": 2e-3, "bf16": 2e-2}[precision]


def test_low_inputs_and_outputs_keep_their_type() -> None:
    x = gs.Variable("x", np.dtype(np.float16), ["n"])
    y = gs.Variable("y", np.dtype(np.float16), ["n"])
    graph = gs.Graph([gs.Node("Relu", "relu", {}, [x], [y])], [x], [y], opset=23, ir_version=10)
    values = np.array([-1, 2], dtype=np.float16)
    found = GraphRunner(graph).run({"x": values})["y"]
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, np.maximum(values, 0))


def test_errors_are_this_package_s() -> None:
    graph = prepare(mlp())
    with pytest.raises(BackendFailed, match="ONNX Runtime failed"):
        GraphRunner(graph).run({"x": normal(5, 63)})
    graph.nodes[-1].op = "NoSuchOperation"
    with pytest.raises(BackendFailed, match="NoSuchOperation"):
        GraphRunner(graph)
