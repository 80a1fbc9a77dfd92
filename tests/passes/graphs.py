"""Building small graphs, and comparing a graph before and after a pass, for the tests of the passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import helper, numpy_helper

from smc.passes.base import Pass, PassReport
from smc.passes.prepare import prepare

TOLERANCE = 2e-5
"""On ||a - b|| / ||b||: passes reorder float32 sums, which was seen to move results by 1e-6 at most; a wrong channel or table by 1."""


class Builder:
    """Writes a model node by node. Operands are names of tensors, or arrays and lists, which become initializers."""

    def __init__(self, opset: int = 23, constant_nodes: bool = False) -> None:
        self.opset = opset
        self.constant_nodes = constant_nodes  # constants as nodes instead of initializers
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._count = 0

    def input(self, name: str, shape: Sequence[int | str], dtype: Any = np.float32) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def output(self, name: str, dtype: Any = np.float32, shape: Sequence[int | str] | None = None) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))

    def op(self, op: str, *operands: Any, name: str | None = None, outputs: int = 1, **attrs: Any) -> Any:
        """The name of the output, or a list of names where there are several."""
        self._count += 1
        label = name or f"{op.lower()}_{self._count}"
        made = [f"{label}_out{i}" for i in range(outputs)]
        names = [operand if isinstance(operand, str) else self.constant(operand) for operand in operands]
        self.nodes.append(helper.make_node(op, names, made, name=label, **attrs))
        return made[0] if outputs == 1 else made

    def constant(self, values: Any) -> str:
        array = np.asarray(values)
        self._count += 1
        name = f"constant_{self._count}"
        if self.constant_nodes:
            self.nodes.append(helper.make_node("Constant", [], [name], name=f"node_{name}", value=numpy_helper.from_array(array, name)))
        else:
            self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def split(self, tensor: str, count: int, axis: int) -> Any:
        """Split in equal parts, in the spelling of the opset."""
        attrs = {"num_outputs": count} if self.opset >= 18 else {}
        return self.op("Split", tensor, outputs=count, axis=axis, **attrs)

    def model(self) -> onnx.ModelProto:
        graph = helper.make_graph(self.nodes, "test", self.inputs, self.outputs, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        # The outputs' shapes are inferred; those of the tensors between stay out, for `prepare` to find.
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        onnx.checker.check_model(model, full_check=True)
        return model


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)


def normal(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """Fresh random numbers, different for every shape."""
    return np.random.default_rng(shape).standard_normal(shape).astype(dtype)


def session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """Runs a model exactly as it is written."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def assert_same(model: onnx.ModelProto, graph: gs.Graph, *feeds: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """That `graph` is a valid model of the same inputs and outputs as `model`, and computes the same from each of `feeds`."""
    after = gs.export_onnx(graph)
    onnx.checker.check_model(after, full_check=True)
    assert [value.name for value in after.graph.input] == [value.name for value in model.graph.input]
    assert [value.name for value in after.graph.output] == [value.name for value in model.graph.output]
    reference, changed = session(model), session(after)
    for feed in feeds:
        for expected, actual in zip(reference.run(None, feed), changed.run(None, feed), strict=True):
            assert actual.shape == expected.shape
            assert actual.dtype == expected.dtype
            expected, actual = expected.astype(np.float64), actual.astype(np.float64)
            assert np.linalg.norm(expected) > 0
            assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def apply(model: onnx.ModelProto, *passes: Pass) -> tuple[gs.Graph, PassReport]:
    """The prepared graph after `passes`, and the report of the last of them."""
    graph = prepare(model)
    reports = [one(graph) for one in passes]
    return graph, reports[-1]


def count(graph: gs.Graph) -> Counter[str]:
    return Counter(node.op for node in graph.nodes)


def left_alone(model: onnx.ModelProto, one: Pass) -> list[tuple[str, str]]:
    """What a pass that must change nothing declines: nodes and reasons."""
    graph = prepare(model)
    before = written(graph)
    report = one(graph)
    assert report.rewrites == 0
    assert written(graph) == before
    return [(declined.node, declined.why) for declined in report.declined]


def written(graph: gs.Graph) -> list[tuple[object, ...]]:
    """A graph's nodes, to be compared."""
    return sorted(
        (node.name, node.op, sorted(map(str, node.attrs.items())), [t.name for t in node.inputs], [t.name for t in node.outputs])
        for node in graph.nodes
    )


HEADS, HEAD_DIM = 2, 8


def rotary(
    table: Callable[[Builder, str], str] = lambda b, angles: b.op("Cos", angles, name="cos"),
    *,
    positions: Callable[[Builder, str], str] = lambda b, size: b.op("Cast", size, to=onnx.TensorProto.FLOAT),
    batch: int | str = "batch",
) -> onnx.ModelProto:
    """x (batch, rows, cols, HEADS * HEAD_DIM) -> its tokens after RotaryEmbedding, whose tables are computed as RoPE2D's are exported.

    `positions` makes the number of positions, as float32, of a size; `table` makes cos of angles (rows*cols, HEAD_DIM/2).
    """
    b = Builder()
    x = b.input("x", [batch, "rows", "cols", HEADS * HEAD_DIM])
    count, rows, cols = (b.op("Shape", x, start=i, end=i + 1) for i in range(3))
    quarter = HEAD_DIM // 4
    frequencies = np.float32(0.1) ** np.arange(1, quarter + 1, dtype=np.float32)
    angles = []
    for size, axis in ((rows, 1), (cols, 0)):
        steps = b.op("Range", np.float32(0), positions(b, b.op("Squeeze", size)), np.float32(1))
        turned = b.op("Mul", b.op("Unsqueeze", steps, np.array([1])), frequencies)
        shape = b.op("Concat", rows, cols, np.array([quarter]), axis=0)
        angles.append(b.op("Expand", b.op("Unsqueeze", turned, np.array([axis])), shape))
    joined = b.op("Reshape", b.op("Concat", *angles, axis=-1), np.array([-1, HEAD_DIM // 2]), name="angles")
    repeats = b.op("Concat", count, np.array([1, 1]), axis=0)
    caches = [b.op("Expand", b.op("Unsqueeze", t, np.array([0])), repeats) for t in (table(b, joined), b.op("Sin", joined, name="sin"))]
    tokens = b.op("Reshape", x, np.array([0, -1, HEADS, HEAD_DIM]))
    b.output(b.op("RotaryEmbedding", b.op("Transpose", tokens, perm=[0, 2, 1, 3]), *caches, name="rotary", interleaved=0))
    return b.model()


@cache
def exported_encoder() -> onnx.ModelProto:
    """The encoder of a tiny network of random weights, as this project exports it."""
    import onnx_ir

    from smc.compiler.checkpoint import random_weights
    from smc.compiler.config import read_config_json
    from smc.compiler.export import export_encoder
    from tests.conformance import DATA

    config = replace(read_config_json(DATA / "tiny_landscape.config.json"), enc_depth=2, dec_depth=4)
    return onnx_ir.to_proto(export_encoder(random_weights(config, seed=0).build_model()))
