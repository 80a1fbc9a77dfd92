"""FoldConstants: what does not depend on the graph's inputs becomes a constant."""

from __future__ import annotations

import math

import numpy as np
import onnx_graphsurgeon as gs
from onnx.reference.op_run import RuntimeContextError

from smc.passes.base import Pass, PassReport, Refusal
from smc.passes.tensors import Array, constant_value, dims, is_number_type, is_output, is_repeatable, run_node

_LIMIT = 4 * 2**20
"""Bytes up to which a result may be larger than its operands: a rotary table of 32 x 32 tokens for a batch of 32 is that large."""


class FoldConstants(Pass):
    """Nodes whose results are the same for every input become constants.

    Before: Cos(Mul(Range(0, Cast(Shape(x)), 1), frequencies)), where the dimensions of x that are used are static.
    After: a constant, computed in the graph's own types by onnx's reference implementation.

    Folded are nodes that read only constants, CastLike of a constant to the type of any tensor, the Shape of static dimensions,
    and shape arithmetic that uses no dynamic one. `Constant` nodes become initializers. A result of more than 4 MiB that is also
    larger than its operands stays computed, and so do outputs of the graph, random numbers, and types that NumPy does not have.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        for node in graph.nodes:  # in topological order: a chain folds in one go
            with report.attempt(node):
                values = _values(node)
                if values is None:
                    continue
                outputs = [output for output in node.outputs if not output.is_empty()]
                for output in outputs:
                    if is_output(graph, output):
                        raise Refusal(f"{output.name} is an output of the graph")
                node.outputs.clear()
                for output, value in zip(outputs, values, strict=True):
                    output.to_constant(value)
                report.rewrites += 1


def _values(node: gs.Node) -> list[Array] | None:
    """The values of a node's outputs, or None where they depend on the graph's inputs or are not to be computed."""
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty()]
    if node.domain not in (None, "", "ai.onnx") or not is_repeatable(node) or not all(is_number_type(t.dtype) for t in tensors):
        return None
    if node.op != "Constant" and all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in _read(node)):
        return _computed(node)
    value = constant_value(node.outputs[0]) if node.op == "Constant" or _makes_sizes(node) else None
    return None if value is None else [value]


def _read(node: gs.Node) -> list[gs.Tensor]:
    """The inputs whose values matter: of the second one of CastLike it is the type."""
    return list(node.inputs[:1] if node.op == "CastLike" else node.inputs)


def _makes_sizes(node: gs.Node) -> bool:
    """Whether a node makes an integer or a list of them, as shape arithmetic does."""
    (output, *others), shape = node.outputs, dims(node.outputs[0])
    return not others and shape is not None and len(shape) <= 1 and np.dtype(output.dtype).kind in "ib"


def _computed(node: gs.Node) -> list[Array]:
    operands = {tensor.name: tensor for tensor in _read(node) if not tensor.is_empty()}
    limit = max(_LIMIT, sum(_size(tensor) for tensor in operands.values()))
    for output in node.outputs:
        if _size(output) > limit:
            raise Refusal(f"{output.name} would be a constant of {_size(output)} bytes")
    values = {tensor.name: np.zeros((), tensor.dtype) for tensor in node.inputs if not tensor.is_empty()}
    try:
        return run_node(node, values | {name: tensor.values for name, tensor in operands.items()})
    except (NotImplementedError, RuntimeContextError) as error:
        raise Refusal(f"onnx's reference implementation does not compute it: {error}") from error


def _size(tensor: gs.Tensor) -> int:
    """Bytes, as far as the shape is known."""
    return math.prod(size for size in dims(tensor) or () if isinstance(size, int)) * np.dtype(tensor.dtype).itemsize
