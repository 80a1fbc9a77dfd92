"""FuseGelu: the exact GELU as one node where an exporter wrote it out with Erf, as torch's does for opsets before 20."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import Editor, producer, scalar_value, sole_reader, unscaled

_EXACT = 1e-3
"""How far a written factor may be from the true one, relative: some are rounded to float16."""


class FuseGelu(Pass):
    """x/2 (1 + erf(x / sqrt 2)) becomes Gelu(x).

    Before: Erf(x / 1.4142), read by Add(1), multiplied with x and 0.5 in any order.
    After: Gelu(x), not approximated.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for erf in [node for node in graph.nodes if node.op == "Erf"]:
            with report.attempt(erf):
                x, out = _match(graph, erf)
                edit.node("Gelu", [x], name=f"{label(erf)}/gelu", output=out)
                report.rewrites += 1


def _match(graph: gs.Graph, erf: gs.Node) -> tuple[gs.Tensor, gs.Tensor]:
    """x and the product's output. Raises Refusal where an Erf is no GELU's."""
    scaling = producer(erf.inputs[0])
    scaled = None if scaling is None else unscaled(scaling)
    if scaled is None or not math.isclose(scaled[1], math.sqrt(0.5), rel_tol=_EXACT):
        raise Refusal("its input is not divided by the root of 2")
    x = scaled[0]
    plus = sole_reader(graph, erf.outputs[0])
    if plus.op != "Add" or {scalar_value(tensor) for tensor in plus.inputs if tensor is not erf.outputs[0]} != {1.0}:
        raise Refusal(f"{label(plus)} does not add 1")
    factor, has_x, tensor = 1.0, False, plus.outputs[0]
    while not has_x or not math.isclose(factor, 0.5, rel_tol=_EXACT):
        node = sole_reader(graph, tensor)
        by_number = unscaled(node)
        if by_number is not None and by_number[0] is tensor:
            factor *= by_number[1]
        elif node.op == "Mul" and not has_x and (times := _times(node, tensor, x)) is not None:
            factor, has_x = factor * times, True
        else:
            raise Refusal(f"{label(node)} is no multiplication with its input or a number")
        tensor = node.outputs[0]
    return x, tensor


def _times(product: gs.Node, tensor: gs.Tensor, x: gs.Tensor) -> float | None:
    """The f of a product of `tensor` with f x; None for any other."""
    other = product.inputs[1] if product.inputs[0] is tensor else product.inputs[0]
    if other is x:
        return 1.0
    maker = producer(other)
    scaled = None if maker is None else unscaled(maker)
    return scaled[1] if scaled is not None and scaled[0] is x else None
