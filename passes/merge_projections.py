"""MergeProjections: linear layers that read the same tensor become one."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.hybrid_cast import DATA_MOVEMENT
from smc.passes.tensors import Editor, dims, is_number_type, rank, sole_reader, static_dim


@dataclass(frozen=True)
class _Linear:
    """output = MatMul(x, weight) + bias, weight (K, N), bias (N)."""

    weight: gs.Constant
    bias: gs.Constant
    output: gs.Tensor
    name: str


class MergeProjections(Pass):
    """Several x W_i + b_i become one x [W_1 W_2 ...] + [b_1 b_2 ...] and a Split.

    Before: k = Add(MatMul(y, W_k), b_k), v = Add(MatMul(y, W_v), b_v).
    After: k, v = Split(Add(MatMul(y, W), b), axis=-1), W being W_k and W_v side by side: one product that is as wide as both.

    Merged are all products of one tensor with constant matrices, each read only by the Add of a constant vector as wide. One whose
    weights or bias other nodes read too is left alone, because the weights would then be in the graph twice. Counted are the
    layers merged. Those whose outputs are rotated come first, the ones that are wholly so before the others: what is rotated is then
    the first channels, which a product's kernel can rotate on the way.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for products in _products_by_input(graph):
            merged = []
            for product in products:
                with report.attempt(product):
                    merged.append(_linear(graph, product))
            if len(merged) > 1:
                merged.sort(key=lambda layer: -_rotated_share(layer.output))
                _merge(edit, products[0].inputs[0], merged)
                report.rewrites += len(merged)


def _products_by_input(graph: gs.Graph) -> list[list[gs.Node]]:
    """The products with constant matrices, by the tensor that they read, where there are several."""
    groups: dict[str, list[gs.Node]] = {}
    for node in graph.nodes:
        if node.op == "MatMul" and isinstance(node.inputs[1], gs.Constant) and rank(node.inputs[1]) == 2:
            groups.setdefault(node.inputs[0].name, []).append(node)
    return [group for group in groups.values() if len(group) > 1]


def _linear(graph: gs.Graph, product: gs.Node) -> _Linear:
    weight, result = product.inputs[1], product.outputs[0]
    add = sole_reader(graph, result)
    if add.op != "Add":
        raise Refusal(f"{label(add)} ({add.op}) reads it, which adds no bias")
    bias = add.inputs[1] if add.inputs[0] is result else add.inputs[0]
    if not isinstance(bias, gs.Constant) or dims(bias) != [weight.shape[1]]:
        raise Refusal(f"{label(add)} adds {bias.name} of shape {dims(bias)}, which is not a constant vector of {weight.shape[1]}")
    for constant in (weight, bias):
        if not is_number_type(constant.dtype):
            raise Refusal(f"{constant.name} is of a type that NumPy does not have")
        others = [label(node) for node in constant.outputs if node is not product and node is not add]
        if others:
            raise Refusal(f"{constant.name} is also read by {', '.join(others)}")
    return _Linear(weight, bias, add.outputs[0], label(add))


def _rotated_share(tensor: gs.Tensor) -> float:
    """How much of a layer's output rotations read, through movements of data: 1 for all of it."""
    rotated, pending = 0.0, [tensor]
    while pending:
        for node in pending.pop().outputs:
            if node.op == "RotaryEmbedding":
                width, heads, channels = static_dim(tensor, -1), static_dim(node.inputs[0], 1), static_dim(node.inputs[0], -1)
                if width and heads and channels:
                    rotated += heads * channels / width
            elif node.op in DATA_MOVEMENT:
                pending.extend(node.outputs)
    return rotated


def _merge(edit: Editor, x: gs.Tensor, layers: list[_Linear]) -> None:
    name = f"{layers[0].name}/merged"
    weight = gs.Constant(edit.fresh(f"{name}/weight"), np.concatenate([layer.weight.values for layer in layers], axis=1))
    bias = gs.Constant(edit.fresh(f"{name}/bias"), np.concatenate([layer.bias.values for layer in layers]))
    sizes = edit.integers([layer.bias.shape[0] for layer in layers], "sizes")
    shape = dims(layers[0].output)
    wide = None if shape is None else [*shape[:-1], weight.shape[1]]
    product = edit.node("MatMul", [x, weight], name=f"{name}/product", dtype=x.dtype, shape=wide)
    total = edit.node("Add", [product, bias], name=f"{name}/sum", dtype=x.dtype, shape=wide)
    edit.split(total, sizes, [layer.output for layer in layers], name=f"{name}/split")
