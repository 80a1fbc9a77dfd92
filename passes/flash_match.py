"""FlashMatch: explicit attention becomes one `Attention` node (Speedy MASt3R, section 3.4.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import (
    Dim,
    Editor,
    constant_value,
    dims,
    has_input,
    has_output,
    input_dims,
    is_last_axis,
    may_differ,
    producer,
    rank,
    sole_reader,
    transposition,
    unscaled,
)

_FUSED_TYPES = (np.dtype(np.float32), np.dtype(np.float16), onnx.TensorProto.BFLOAT16)
_FUSED_CASTS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class _Attention:
    """An attention spelled out: `output` = softmax(scale * query key^T) value, where key = Transpose(`key`, `key_perm`)."""

    query: gs.Tensor
    key: gs.Tensor
    key_perm: list[int]
    value: gs.Tensor
    scale: float
    output: gs.Tensor
    name: str


class FlashMatch(Pass):
    """MatMul -> scale -> Softmax -> MatMul becomes `Attention` (opset 23).

    Before: out = MatMul(Softmax(scale * MatMul(scale_q * q, scale_k * k^T)), v), q, k and v (B, heads, N, head_dim), with
    any of the three scales, each as Mul or Div by a number, and k^T in any spelling: whatever reaches the product is transposed
    back, and a Transpose that was there is composed with that.
    After: out = Attention(q, k, v, scale=scale * scale_q * scale_k).

    The search starts at each Softmax and goes by structure; names play no part. Three-dimensional attention, (B * heads, N,
    head_dim), gets a heads axis of one. Identity, Dropout that does nothing, and Casts around the softmax are seen through.
    Masks are not fused.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
            with report.attempt(softmax):
                self._fuse(edit, self._match(graph, softmax))
                report.rewrites += 1

    def _match(self, graph: gs.Graph, softmax: gs.Node) -> _Attention:
        axis = softmax.attrs.get("axis", -1)
        if not is_last_axis(axis, softmax.inputs[0]):
            raise Refusal(f"the softmax is over axis {axis}, not over the last one")
        product, scale = _find_scores(graph, softmax)
        weighted = _find_weighted_sum(graph, softmax)
        query, query_scale = _peel_query(product.inputs[0])
        key, key_perm, key_scale = _peel_key(product.inputs[1])
        value = weighted.inputs[1]
        _check_shapes(graph, product.inputs[0], product.inputs[1], value)
        types = [tensor.dtype for tensor in (query, key, value)]
        if types[0] not in _FUSED_TYPES or types != 3 * [types[0]]:
            raise Refusal(f"q, k and v are of type {', '.join(map(str, types))}; fused are float32, float16 and bfloat16, all alike")
        scale *= query_scale * key_scale
        if not (scale > 0 and math.isfinite(scale)):
            raise Refusal(f"the scale is {scale}; Attention takes positive ones")
        return _Attention(query, key, key_perm, value, scale, weighted.outputs[0], label(weighted))

    def _fuse(self, edit: Editor, found: _Attention) -> None:
        name = f"{found.name}/attention"
        operands = [found.query, edit.transpose(found.key, found.key_perm, name=f"{name}/k"), found.value]
        # No softmax_precision: TensorRT takes none, and attention kernels keep their softmax in float32 anyway.
        attrs: dict[str, Any] = {"scale": found.scale}
        if rank(found.query) == 4:
            edit.node("Attention", operands, name=name, output=found.output, **attrs)
            return
        operands = [edit.unsqueeze(tensor, 1, name=f"{name}/heads") for tensor in operands]
        out = edit.node("Attention", operands, name=name, dtype=found.output.dtype, shape=_with_heads(found.output), **attrs)
        edit.squeeze(out, 1, name=f"{name}/no_heads", output=found.output)


def _find_scores(graph: gs.Graph, softmax: gs.Node) -> tuple[gs.Node, float]:
    """The product whose scaled result a softmax takes, and the scale. Whatever lies between must have no other reader."""
    scale, tensor = 1.0, softmax.inputs[0]
    while True:
        sole_reader(graph, tensor)
        node = producer(tensor)
        if node is None:
            raise Refusal(f"its input {tensor.name} is not computed in the graph")
        if node.op == "MatMul":
            return node, scale
        if _does_nothing(node):
            tensor = node.inputs[0]
        elif (scaled := unscaled(node)) is not None:
            tensor, factor = scaled
            scale *= factor
        elif node.op in ("Add", "Sub", "Where"):
            raise Refusal(f"{label(node)} ({node.op}) adds a mask or a bias to the scores")
        else:
            raise Refusal(f"{label(node)} ({node.op}) stands between the product and the softmax")


def _find_weighted_sum(graph: gs.Graph, softmax: gs.Node) -> gs.Node:
    """The product of a softmax's result with v."""
    tensor = softmax.outputs[0]
    while True:
        node = sole_reader(graph, tensor)
        if node.op == "MatMul" and node.inputs[0] is tensor:
            return node
        if not _does_nothing(node):
            raise Refusal(f"{label(node)} ({node.op}) takes the softmax's result, not a product with v on the right")
        tensor = node.outputs[0]


def _does_nothing(node: gs.Node) -> bool:
    """Whether a node between the two products passes its input on. A Cast does: the softmax is in float32 after all."""
    if node.op == "Dropout":
        training = constant_value(node.inputs[2]) if has_input(node, 2) else np.array(False)
        return training is not None and not training.any() and not has_output(node, 1)
    return node.op == "Identity" or (node.op == "Cast" and node.attrs["to"] in _FUSED_CASTS)


def _peel_query(tensor: gs.Tensor) -> tuple[gs.Tensor, float]:
    """The tensor below scales, and their product. Its other readers do not matter: nothing is taken from them."""
    scale = 1.0
    while (node := producer(tensor)) is not None:
        if node.op == "Identity":
            tensor = node.inputs[0]
        elif (scaled := unscaled(node)) is not None:
            tensor, factor = scaled
            scale *= factor
        else:
            break
    return tensor, scale


def _peel_key(transposed: gs.Tensor) -> tuple[gs.Tensor, list[int], float]:
    """The tensor below the scales and transposes of k^T, the permutation that makes k of it, and the scales' product.

    Ends where that permutation is the identity: further down lies the head split, which stays.
    """
    size = rank(transposed)
    if size is None or size < 2:
        raise Refusal(f"the rank of {transposed.name} is unknown or below 2")
    identity = list(range(size))
    order = [*identity[:-2], size - 1, size - 2]
    tensor, scale = _peel_query(transposed)
    while order != identity and (node := producer(tensor)) is not None and node.op == "Transpose":
        perm = transposition(node)
        if perm is None:
            break
        order = [perm[axis] for axis in order]
        tensor, factor = _peel_query(node.inputs[0])
        scale *= factor
    return tensor, order, scale


def _check_shapes(graph: gs.Graph, query: gs.Tensor, transposed_key: gs.Tensor, value: gs.Tensor) -> None:
    shapes = {"q": dims(query) or [], "k^T": dims(transposed_key) or [], "v": dims(value) or []}
    if {len(shape) for shape in shapes.values()} not in ({3}, {4}):
        found = ", ".join(f"{name} {shape or 'unknown'}" for name, shape in shapes.items())
        raise Refusal(f"the operands must all have three or four dimensions, and have {found}")
    named = input_dims(graph)
    for name in ("k^T", "v"):
        for axis, (a, b) in enumerate(zip(shapes["q"][:-2], shapes[name][:-2], strict=True)):
            if may_differ(a, b, named):
                raise Refusal(f"{name} is broadcast over axis {axis}, where q has {a} and it has {b}")


def _with_heads(tensor: gs.Tensor) -> list[Dim] | None:
    shape = dims(tensor)
    return None if shape is None else [shape[0], 1, *shape[1:]]
