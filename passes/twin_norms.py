"""TwinNorms: scales and biases of norms move into the products that read them, so that the norms of twins become equal."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import Array, Editor, constant_value, has_input, has_output, is_last_axis, is_number_type, is_output, rank


class TwinNorms(Pass):
    """LayerNormalization with a scale and a bias before linear layers becomes one with neither.

    Before: y = LayerNormalization(x, gamma, beta), read by Add(MatMul(y, W), b) only, any number of them.
    After: y = LayerNormalization(x, 1), read by Add(MatMul(y, diag(gamma) W), b + beta W).

    Norms of one tensor, such as a decoder block's self-attention's and the other view's cross-attention's, then compute the same,
    which `CommonSubexpressions` makes one; and what differs between twins is in their products, which `BatchTwins` batches.
    The new weights are computed in float64 and rounded once. Where they are float16 that is more exact than a scale and weights that are
    rounded each by itself, so that norms without twins gain as well.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for norm in [node for node in graph.nodes if node.op == "LayerNormalization"]:
            with report.attempt(norm):
                if _fold(edit, norm):
                    report.rewrites += 1


def _fold(edit: Editor, norm: gs.Node) -> bool:
    """Whether there was something to fold. Raises Refusal where it cannot be."""
    scale = _constant(norm, 1)
    bias = _constant(norm, 2) if has_input(norm, 2) else np.zeros_like(scale)
    if (scale == 1).all() and not has_input(norm, 2):
        return False
    if not is_last_axis(norm.attrs.get("axis", -1), norm.inputs[0]) or has_output(norm, 1) or has_output(norm, 2):
        raise Refusal("it normalises over more than the last axis, or its statistics are read")
    output = norm.outputs[0]
    if is_output(edit.graph, output):
        raise Refusal(f"{output.name} is an output of the graph")
    products = list(output.outputs)
    for product in products:
        if product.op != "MatMul" or product.inputs[0] is not output or product.inputs[1] is output:
            raise Refusal(f"{label(product)} ({product.op}) reads it, which is not a product with weights on the right")
        if rank(product.inputs[1]) != 2 or not isinstance(product.inputs[1], gs.Constant) or not is_number_type(product.inputs[1].dtype):
            raise Refusal(f"{label(product)} multiplies by {product.inputs[1].name}, which is not a constant matrix")
    for product in products:
        weight = product.inputs[1]
        values = weight.values.astype(np.float64)
        if (scale != 1).any():
            product.inputs[1] = gs.Constant(edit.fresh(f"{weight.name}/scaled"), (scale[:, None] * values).astype(weight.dtype))
        if bias.any():
            _add(edit, product, bias.astype(np.float64) @ values)
    ones = edit.constant(np.ones_like(scale), "ones")
    norm.inputs = [norm.inputs[0], ones]
    return True


def _constant(norm: gs.Node, index: int) -> Array:
    value = constant_value(norm.inputs[index])
    if value is None or value.ndim != 1 or not is_number_type(norm.inputs[index].dtype):
        raise Refusal(f"{norm.inputs[index].name} is not a constant vector of a type that NumPy has")
    return value


def _add(edit: Editor, product: gs.Node, term: Array) -> None:
    """Add `term` to a product's result: to the bias that follows, or as a new one."""
    output = product.outputs[0]
    add = output.outputs[0] if len(output.outputs) == 1 and not is_output(edit.graph, output) else None
    if add is not None and add.op == "Add":
        index = 1 if add.inputs[0] is output else 0
        bias = constant_value(add.inputs[index]) if rank(add.inputs[index]) == 1 else None
        if bias is not None and bias.shape == term.shape:
            add.inputs[index] = gs.Constant(edit.fresh(f"{add.inputs[index].name}/shifted"), (bias + term).astype(bias.dtype))
            return
    dtype = product.inputs[1].dtype
    unbiased = gs.Variable(edit.fresh(f"{output.name}/unbiased"), dtype=output.dtype, shape=output.shape)
    product.outputs = [unbiased]
    constant = edit.constant(term.astype(dtype), f"{label(product)}/bias")
    edit.node("Add", [unbiased, constant], name=f"{label(product)}/biased", output=output)
