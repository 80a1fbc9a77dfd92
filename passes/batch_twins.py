"""BatchTwins: two branches of equal structure and different weights become one (part of GraphFusion, Speedy MASt3R, section 3.4.2)."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import Editor, constant_value, dims, is_made_up, is_repeatable, producer
from smc.passes.twin_rules import RULES, only_data
from smc.passes.twin_values import Constants, Shared, Stream, Value, alike, known_shape

_SMALL = 1024  # bytes up to which constants are compared by value to find shared computations; weights are when they are used

TensorPair = tuple[gs.Tensor, gs.Tensor]
NodePair = tuple[gs.Node, gs.Node]


class BatchTwins(Pass):
    """The branches of the two views, their decoders and heads, run as one stream of twice the batch.

    Before: x1 = MatMul(a1, W1), x2 = MatMul(a2, W2), and so on, from inputs of equal shapes to outputs NAME1 and NAME2.
    After: x = MatMul(a, W), where a (2, B*N, C) has both views and W (2, C, K) both weights; in the end a Split gives the outputs.

    Starting from the outputs whose names end in 1 and 2, both branches are walked to the inputs in lock step. Two nodes go
    together when their operations, attributes and shapes are equal and so are, two by two, what makes their inputs. Where the
    first view reads what the second one makes and the other way round, as cross-attention does, the views are flipped. Products
    with different weights become batched, convolutions grouped; `twin_rules` has what becomes of each operation, and
    `twin_values` the layouts.

    Everything between the inputs and all paired outputs is batched or nothing. The dimensions must be static but for one, such as
    the batch. Counted are the pairs of nodes.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        pairs = _paired_outputs(graph)
        if not pairs:
            return
        with report.attempt(pairs[0][0].inputs[0]):
            walk = _Walk(graph)
            walk.run(pairs)
            _check_separate(graph, pairs, walk)
            report.rewrites = _lift(Stream(Editor(graph)), pairs, walk)


def _paired_outputs(graph: gs.Graph) -> list[TensorPair]:
    """Outputs that nodes make and whose names differ in a last 1 and 2."""
    named = {output.name: output for output in graph.outputs if producer(output) is not None}
    return [(tensor, named[f"{name[:-1]}2"]) for name, tensor in named.items() if name.endswith("1") and f"{name[:-1]}2" in named]


class _Walk:
    """Which nodes of two branches go together.

    Attributes:
        nodes: the pairs, those that make the inputs of others before them.
        shared: the tensors that both branches read and that are not constants.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.nodes: list[NodePair] = []
        self.shared: list[gs.Tensor] = []
        self._graph = graph
        self._equal = _equal_tensors(graph)

    def run(self, outputs: list[TensorPair]) -> None:
        """Walk to the inputs, depth first. Raises Refusal where the branches differ."""
        seen: set[tuple[int, int]] = set()
        pending: list[tuple[TensorPair, bool]] = [(pair, False) for pair in reversed(outputs)]
        while pending:
            (a, b), inputs_are_done = pending.pop()
            if inputs_are_done:
                self.nodes.append((a.inputs[0], b.inputs[0]))
                continue
            if self._is_leaf(a, b):
                continue
            first, second = _checked(a, b)
            if (id(first), id(second)) in seen or (id(second), id(first)) in seen:
                continue
            seen.add((id(first), id(second)))
            pending.append(((a, b), True))
            # First inputs first: the data's own path, a residual stream or a query, says which view comes first, and what
            # reads the other view is flipped. The other way round, a block would flip its stream as well.
            pending.extend((pair, False) for pair in reversed(list(zip(only_data(first), only_data(second), strict=True))))

    def is_shared(self, a: gs.Tensor, b: gs.Tensor) -> bool:
        return self._equal[a.name] == self._equal[b.name]

    def _is_leaf(self, a: gs.Tensor, b: gs.Tensor) -> bool:
        if a.is_empty() and b.is_empty():
            return True
        if a.is_empty() or b.is_empty():
            raise Refusal(f"an input is given in one view only: {a.name or b.name}")
        if self.is_shared(a, b):
            if constant_value(a) is None:
                self.shared.append(a)
            return True
        if _is_constant(a) and _is_constant(b):
            if dims(a) != dims(b) or a.dtype != b.dtype:
                raise Refusal(f"{a.name} is {a.dtype} {dims(a)}, and its twin {b.name} {b.dtype} {dims(b)}")
            return True
        if all(any(tensor is one for one in self._graph.inputs) for tensor in (a, b)):
            if dims(a) != dims(b) or a.dtype != b.dtype:
                raise Refusal(f"the views are not of one shape: {a.name} is {a.dtype} {dims(a)}, {b.name} {b.dtype} {dims(b)}")
            return True
        return False


def _is_constant(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return isinstance(tensor, gs.Constant) or (node is not None and node.op == "Constant")


def _checked(a: gs.Tensor, b: gs.Tensor) -> NodePair:
    """The nodes that make two tensors, which must be twins as far as that can be seen without their inputs."""
    first, second = producer(a), producer(b)
    if first is None or second is None:
        raise Refusal(f"{a.name} has no twin: it would be {b.name}, and one of them is not computed")
    names = f"{label(first)} ({first.op}) and {label(second)} ({second.op})"
    if first.op != second.op or first.domain != second.domain:
        raise Refusal(f"{names} differ")
    if first.op not in RULES:
        raise Refusal(f"{names} cannot be batched: there is no rule for {first.op}")
    if first.attrs != second.attrs:
        raise Refusal(f"the attributes of {names} differ")
    if len(first.inputs) != len(second.inputs) or len(first.outputs) != len(second.outputs):
        raise Refusal(f"{names} have different numbers of inputs or outputs")
    for one, other in zip(first.outputs, second.outputs, strict=True):
        if one.dtype != other.dtype or not alike(known_shape(one), known_shape(other)):
            raise Refusal(f"{names} make {one.dtype} {dims(one)} and {other.dtype} {dims(other)}")
    if [one is a for one in first.outputs] != [other is b for other in second.outputs]:
        raise Refusal(f"different outputs of {names} are read")
    return first, second


def _equal_tensors(graph: gs.Graph) -> dict[str, Hashable]:
    """Name of every tensor -> what is the same for tensors that are always equal.

    Equal are the outputs of equal operations on equal inputs, and the shapes of tensors whose dimensions are the same by size or
    by name. So the shape arithmetic of each view and what is computed from it, such as rotary tables, count as shared.
    """
    equal: dict[str, Hashable] = {}
    numbers: dict[Hashable, int] = {}
    for tensor in graph.tensors().values():
        equal[tensor.name] = tensor.name
        if isinstance(tensor, gs.Constant) and np.prod(tensor.shape) * 8 <= _SMALL:
            equal[tensor.name] = (str(tensor.dtype), tuple(tensor.shape), tensor.values.tobytes())
    for node in graph.nodes:  # in topological order
        if not is_repeatable(node):
            continue
        attrs = tuple(sorted((name, _hashable(value)) for name, value in node.attrs.items()))
        inputs: Hashable = tuple(equal[tensor.name] for tensor in node.inputs if not tensor.is_empty())
        if node.op == "Shape":
            shape = (dims(node.inputs[0]) or [None])[node.attrs.get("start", 0) : node.attrs.get("end")]
            if not any(map(is_made_up, shape)):
                attrs, inputs = (), tuple(shape)
        number = numbers.setdefault((node.op, node.domain, attrs, inputs, tuple(tensor.is_empty() for tensor in node.inputs)), len(numbers))
        equal |= {tensor.name: (number, i) for i, tensor in enumerate(node.outputs)}
    return equal


def _hashable(value: object) -> Hashable:
    if isinstance(value, gs.Constant):
        return str(value.dtype), tuple(value.shape), value.values.tobytes()
    return tuple(value) if isinstance(value, list) else value


def _check_separate(graph: gs.Graph, pairs: list[TensorPair], walk: _Walk) -> None:
    """That nothing but the paired outputs needs the nodes that are replaced: they would run as well as what replaces them."""
    replaced = {id(node) for pair in walk.nodes for node in pair}
    paired = {id(tensor) for pair in pairs for tensor in pair}
    kept = [output for output in graph.outputs if id(output) not in paired]
    for node in _ancestors([*kept, *walk.shared]):
        if id(node) in replaced:
            raise Refusal(f"{label(node)} ({node.op}) has a twin, but more than the paired outputs needs it")


def _ancestors(tensors: Iterable[gs.Tensor]) -> list[gs.Node]:
    found: dict[int, gs.Node] = {}
    pending = list(tensors)
    while pending:
        node = producer(pending.pop())
        if node is not None and id(node) not in found:
            found[id(node)] = node
            pending.extend(node.inputs)
    return list(found.values())


def _lift(stream: Stream, outputs: list[TensorPair], walk: _Walk) -> int:
    """Add the nodes of both views at once, and make the outputs from those. Returns how many pairs of nodes they replace."""
    values: dict[tuple[str, str], Value] = {}

    def value(a: gs.Tensor, b: gs.Tensor) -> Value | None:
        if a.is_empty():
            return None
        if (a.name, b.name) not in values:
            values[a.name, b.name] = stream.flip(values[b.name, a.name]) if (b.name, a.name) in values else _leaf(stream, walk, a, b)
        return values[a.name, b.name]

    for first, second in walk.nodes:
        operands = [value(a, b) for a, b in zip(only_data(first), only_data(second), strict=True)]
        results = RULES[first.op](stream, first, operands)
        values |= {(a.name, b.name): result for a, b, result in zip(first.outputs, second.outputs, results, strict=True)}
    # All that can be refused comes before the first change of what is there.
    joined = [stream.joined(values[a.name, b.name], 0, a.name) for a, b in outputs]
    for (a, b), tensor in zip(outputs, joined, strict=True):
        stream.split([tensor], [a, b], f"{a.name}/views", axis=0, num_outputs=2)
    return len(walk.nodes)


def _leaf(stream: Stream, walk: _Walk, a: gs.Tensor, b: gs.Tensor) -> Value:
    """Two tensors that nothing paired makes: shared, constants, or inputs of the graph."""
    if walk.is_shared(a, b):
        return Shared(a)
    if _is_constant(a):
        first, second = constant_value(a), constant_value(b)
        assert first is not None
        assert second is not None
        return Shared(a) if np.array_equal(first, second) else Constants(a.name, first, second)
    return stream.concat(a, b)
