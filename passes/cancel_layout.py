"""CancelLayout: transposes and reshapes that undo one another, or do nothing, disappear."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import (
    Dim,
    Editor,
    constant_value,
    dims,
    has_input,
    is_made_up,
    is_output,
    producer,
    redirect,
    scalar_value,
    transposition,
)

_RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
_ELEMENTWISE = frozenset({"Add", "Cast", "Div", "Erf", "Exp", "Gelu", "Mul", "Neg", "Relu", "Sigmoid", "Sqrt", "Sub", "Tanh"})


class CancelLayout(Pass):
    """Layout changes that are not needed disappear, by these rules, applied until none applies:

    1. A node that passes its input on is bypassed: Identity, a Transpose that moves nothing, a Reshape, Squeeze, Unsqueeze,
       Flatten, Expand or Slice to the shape that is there.
    2. Transpose(Transpose(x)) becomes Transpose(x).
    3. A Transpose that moves only axes of size one becomes a Reshape.
    4. A Reshape, Squeeze, Unsqueeze or Flatten of another becomes Reshape(x).
    5. A Reshape to a computed shape takes a constant one.
    6. A Transpose or Reshape of elementwise operations is bypassed where all that they read are results of its inverse and numbers.

    Dimensions are equal where their sizes or names are. The shapes of 3, 4 and 5 are constants, in which dynamic dimensions are
    0 where they stay in place, and one other may be -1; with more of those the nodes stay. Counted is every rule applied.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        rules = (_bypass_idle, _compose_transposes, _reshape_instead, _compose_reshapes, _state_shape, _cancel_around_elementwise)
        changed = True
        while changed:
            changed = False
            report.declined.clear()  # what still stands at the end is reported
            for node in list(graph.nodes):
                for rule in rules:
                    with report.attempt(node):
                        if _is_read(graph, node) and rule(edit, node):
                            report.rewrites += 1
                            changed = True
            graph.cleanup(remove_unused_graph_inputs=False).toposort()


def _is_read(graph: gs.Graph, node: gs.Node) -> bool:
    return any(tensor.outputs or is_output(graph, tensor) for tensor in node.outputs)


def _bypass_idle(edit: Editor, node: gs.Node) -> bool:
    if not _is_idle(node):
        return False
    _bypass(edit.graph, node)
    return True


def _is_idle(node: gs.Node) -> bool:
    """Whether a node's output is its first input."""
    if node.op == "Identity":
        return True
    if node.op == "Transpose":
        perm = transposition(node)
        return perm is not None and perm == sorted(perm)
    before, after = dims(node.inputs[0]) if node.inputs else None, dims(node.outputs[0])
    if node.op in _RESHAPES:
        # The elements stay as many, so that one dimension that is not known follows from the others.
        return _differences(before, after) <= 1
    if node.op == "Slice" and has_input(node, 4):
        steps = constant_value(node.inputs[4])
        if steps is None or (steps < 0).any():
            return False
    return node.op in ("Expand", "Slice") and _differences(before, after) == 0


def _differences(before: list[Dim] | None, after: list[Dim] | None) -> int:
    """How many dimensions are not known to be equal: 2, which is too many, where the ranks are not."""
    if before is None or after is None or len(before) != len(after):
        return 2
    return sum(not _is_same(a, b) for a, b in zip(before, after, strict=True))


def _is_same(a: Dim, b: Dim) -> bool:
    return a == b and not is_made_up(a)


def _bypass(graph: gs.Graph, node: gs.Node) -> None:
    """Give what reads a node's output its first input instead; an output of the graph is then made by what made that."""
    data, output = node.inputs[0], node.outputs[0]
    if not is_output(graph, output):
        redirect(output, data)
        return
    source = producer(data)
    if source is None or is_output(graph, data):
        raise Refusal(f"{output.name} is an output of the graph and {data.name} is another, an input or a constant")
    index = next(i for i, tensor in enumerate(source.outputs) if tensor is data)
    node.outputs.clear()
    source.outputs[index] = output
    redirect(data, output)


def _compose_transposes(edit: Editor, node: gs.Node) -> bool:
    inner = producer(node.inputs[0]) if node.op == "Transpose" else None
    if inner is None or inner.op != "Transpose":
        return False
    first, second = transposition(inner), transposition(node)
    if first is None or second is None:
        raise Refusal(f"the rank of {inner.inputs[0].name} is unknown")
    node.attrs["perm"] = [first[axis] for axis in second]
    node.inputs[0] = inner.inputs[0]
    return True


def _reshape_instead(edit: Editor, node: gs.Node) -> bool:
    perm, before = transposition(node) if node.op == "Transpose" else None, dims(node.inputs[0]) if node.inputs else None
    if perm is None or before is None or perm == sorted(perm):
        return False
    moved = [axis for axis in perm if before[axis] != 1]
    if moved != sorted(moved):
        return False
    _reshape(edit, node, node.inputs[0])
    return True


def _compose_reshapes(edit: Editor, node: gs.Node) -> bool:
    inner = producer(node.inputs[0]) if node.op in _RESHAPES else None
    if inner is None or inner.op not in _RESHAPES:
        return False
    if _means_the_same_anywhere(node):
        node.inputs[0] = inner.inputs[0]
    else:
        _reshape(edit, node, inner.inputs[0])
    return True


def _means_the_same_anywhere(node: gs.Node) -> bool:
    """Whether a Reshape states its shape without reference to that of its input."""
    if node.op != "Reshape":
        return False
    shape = constant_value(node.inputs[1])
    return bool(node.attrs.get("allowzero", 0)) if shape is None else bool((shape != 0).all())


def _state_shape(edit: Editor, node: gs.Node) -> bool:
    if node.op != "Reshape" or constant_value(node.inputs[1]) is not None:
        return False
    shape = _constant_shape(node.inputs[0], node.outputs[0])
    if shape is None:
        return False
    node.inputs[1] = edit.integers(shape, "shape")
    node.attrs["allowzero"] = 0
    return True


def _reshape(edit: Editor, node: gs.Node, data: gs.Tensor) -> None:
    """Make a node's output by a Reshape of `data`."""
    output = node.outputs[0]
    shape = _constant_shape(data, output)
    if shape is None:
        raise Refusal(f"the shape {dims(output)} of {output.name} cannot be written as constants when {data.name} is {dims(data)}")
    edit.node("Reshape", [data, edit.integers(shape, "shape")], name=f"{label(node)}/reshape", output=output)


def _constant_shape(data: gs.Tensor, output: gs.Tensor) -> list[int] | None:
    """The shape by which a Reshape makes `output` of `data`, None where that has to be computed or is not known."""
    before, after = dims(data), dims(output)
    if before is None or after is None or 0 in after:
        return None
    kept = [i < len(before) and _is_same(before[i], size) for i, size in enumerate(after)]
    shape = [size if isinstance(size, int) else 0 if keep else -1 for size, keep in zip(after, kept, strict=True)]
    return shape if shape.count(-1) <= 1 else None


def _cancel_around_elementwise(edit: Editor, node: gs.Node) -> bool:
    if node.op != "Transpose" and node.op not in _RESHAPES:
        return False
    inside, undone, others = [], [], []
    pending = [node.inputs[0]]
    while pending:
        tensor = pending.pop()
        maker = producer(tensor)
        if maker is not None and maker.op in _ELEMENTWISE and len(tensor.outputs) == 1 and not is_output(edit.graph, tensor):
            inside.append(maker)
            pending.extend(maker.inputs)
        elif maker is not None and _undoes(maker, node):
            undone.append(tensor)
        elif scalar_value(tensor) is None:
            others.append(tensor)
    if not inside or not undone:
        return False
    if others:
        raise Refusal(f"{others[0].name} does not come from the inverse of it, as {undone[0].name} does")
    for tensor in undone[1:]:
        if node.op != "Transpose" and _differences(dims(tensor), dims(undone[0])) > 0:
            raise Refusal(f"{tensor.name} and {undone[0].name} are not known to be of one shape")
    perm = transposition(node) if node.op == "Transpose" else None
    for maker in inside:
        for i, tensor in enumerate(maker.inputs):
            if any(tensor is other for other in undone):
                maker.inputs[i] = tensor.inputs[0].inputs[0]
        shape = dims(maker.outputs[0])
        if perm is None:
            maker.outputs[0].shape = dims(node.outputs[0])
        elif shape is not None:
            maker.outputs[0].shape = [shape[axis] for axis in perm]
    _bypass(edit.graph, node)
    return True


def _undoes(first: gs.Node, last: gs.Node) -> bool:
    """Whether `last`, a Transpose or a Reshape, would turn the result of `first` into what that was made of."""
    if first.op == last.op == "Transpose":
        a, b = transposition(first), transposition(last)
        return a is not None and b is not None and [a[axis] for axis in b] == sorted(a)
    reshapes = first.op in _RESHAPES and last.op in _RESHAPES
    return reshapes and _differences(dims(first.inputs[0]), dims(last.outputs[0])) == 0
