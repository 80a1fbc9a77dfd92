"""CommonSubexpressions: what is computed twice is computed once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable

import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import is_number_type, is_output, is_repeatable, redirect


class CommonSubexpressions(Pass):
    """Equal nodes become one.

    Before: a = Cos(x), b = Cos(x).
    After: a = Cos(x), and what read b reads a.

    Equal are nodes of one operation with equal attributes, whose inputs are the same tensors, constants of equal values, or the
    outputs of equal nodes. Of two, the one that makes an output of the graph stays; where both do, both stay.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        for equal in _Groups(graph.nodes).all:
            kept = next((node for node in equal if _makes_output(graph, node)), equal[0])
            for node in equal:
                if node is kept:
                    continue
                with report.attempt(node):
                    if _makes_output(graph, node):
                        raise Refusal(f"it computes the same as {label(kept)}, and both make outputs of the graph")
                    for old, new in zip(node.outputs, kept.outputs, strict=True):
                        redirect(old, new)
                    report.rewrites += 1


def _makes_output(graph: gs.Graph, node: gs.Node) -> bool:
    return any(is_output(graph, tensor) for tensor in node.outputs)


class _Groups:
    """The nodes of a graph, `all`, in groups that compute the same. `nodes` are in topological order."""

    def __init__(self, nodes: Iterable[gs.Node]) -> None:
        self.all: list[list[gs.Node]] = []
        self._by_key: dict[Hashable, list[list[gs.Node]]] = defaultdict(list)
        self._first: dict[str, str] = {}  # name of a tensor -> name of the first that is equal to it
        for node in nodes:
            if is_repeatable(node):
                self._add(node)

    def _add(self, node: gs.Node) -> None:
        alike = self._by_key[self._key(node)]
        for group in alike:
            if all(_equal(a, b) for a, b in zip(group[0].inputs, node.inputs, strict=True)):
                self._first |= {new.name: self._named(old) for old, new in zip(group[0].outputs, node.outputs, strict=True)}
                group.append(node)
                return
        alike.append([node])
        self.all.append(alike[-1])

    def _key(self, node: gs.Node) -> Hashable:
        """Of everything but the values of constants, which may be large: those are compared where all else is equal."""
        inputs = tuple((str(tensor.dtype), *tensor.shape) if _is_comparable(tensor) else self._named(tensor) for tensor in node.inputs)
        attrs = tuple(sorted((name, _hashable(value)) for name, value in node.attrs.items()))
        return node.op, node.domain or "", attrs, inputs, tuple(tensor.is_empty() for tensor in node.outputs)

    def _named(self, tensor: gs.Tensor) -> str:
        return self._first.get(tensor.name, tensor.name)


def _is_comparable(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and is_number_type(tensor.dtype)


def _equal(a: gs.Tensor, b: gs.Tensor) -> bool:
    """Of two inputs of nodes with the same key, so that anything but constants is equal."""
    return not _is_comparable(a) or a is b or a.values.tobytes() == b.values.tobytes()


def _hashable(value: object) -> Hashable:
    if isinstance(value, gs.Constant):
        return str(value.dtype), tuple(value.shape), value.values.tobytes()
    return tuple(value) if isinstance(value, list) else value
