"""How each operation runs on both views at once: one rule for each.

A rule takes a node of the first view and its operands, which stand for those of both views, and returns the node's outputs. Its
node in the second view has the same operation and attributes, and its outputs have the same shapes. Where a rule does not
cover what a node does it raises Refusal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Refusal, label
from smc.passes.tensors import Array, constant_value, has_input, has_output, is_last_axis, slices, transposition
from smc.passes.twin_values import Constants, Shared, Stream, Twins, Value, alike, as_sizes, extent, joined_shape, known_shape

Operands = list[Value | None]
Rule = Callable[[Stream, gs.Node, Operands], list[Value]]


def only_data(node: gs.Node) -> list[gs.Tensor]:
    """The inputs that rules read as operands: all but the shape of a Reshape, which follows from its output's."""
    return list(node.inputs[:1] if node.op == "Reshape" else node.inputs)


def _twins(node: gs.Node, operand: Value | None, name: str = "first input") -> Twins:
    if not isinstance(operand, Twins):
        kind = "a constant in" if isinstance(operand, Constants) else "shared by"
        raise Refusal(f"the {name} of {label(node)} ({node.op}) is {kind} both views")
    return operand


def _shared(node: gs.Node, operands: Iterable[Value | None]) -> list[gs.Tensor]:
    """The tensors of operands that both views must share; of those that are not given, empty ones."""
    tensors = []
    for operand in operands:
        if isinstance(operand, Constants | Twins):
            raise Refusal(f"{label(node)} ({node.op}) has another parameter in each view")
        tensors.append(gs.Variable.empty() if operand is None else operand.tensor)
    return tensors


def _arrays(node: gs.Node, operand: Value | None) -> tuple[Array, Array]:
    """The two values of a constant operand."""
    if isinstance(operand, Constants):
        return operand.first, operand.second
    value = constant_value(operand.tensor) if isinstance(operand, Shared) else None
    if value is None:
        raise Refusal(f"the weights of {label(node)} ({node.op}) are not constants")
    return value, value


def _rank(node: gs.Node) -> int:
    return len(known_shape(node.inputs[0]))


def _apply(stream: Stream, node: gs.Node, value: Twins, others: list[gs.Tensor], axis: int) -> list[Value]:
    """The same node on joined views, which its one output is along `axis`."""
    shape = known_shape(node.outputs[0])
    data = stream.joined(value, value.axis, f"{label(node)}/operand")
    return [Twins(stream.emit(node, [data, *others], joined_shape(shape, axis)), shape, axis)]


def _elementwise(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """One tensor and perhaps numbers, such as a Clip's: in any layout."""
    value = _twins(node, operands[0])
    out = stream.emit(node, [value.tensor, *_shared(node, operands[1:])], _sizes(value.tensor))
    return [Twins(out, value.shape, value.axis)]


def _sizes(tensor: gs.Tensor) -> list[int]:
    return [size if isinstance(size, int) else -1 for size in known_shape(tensor)]


def _cast_like(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Of a number that both views share, to a type that they share as well."""
    (number,), other = _shared(node, operands[:1]), _twins(node, operands[1], "second input")
    return [Shared(stream.emit(node, [number, other.tensor], _sizes(number)))]


def _broadcast(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Two operands, of which one has the result's shape."""
    shape = known_shape(node.outputs[0])
    full = [i for i, operand in enumerate(operands) if isinstance(operand, Twins) and alike(operand.shape, shape)]
    if not full:
        raise Refusal(f"{label(node)} ({node.op}) broadcasts both its operands")
    value, other = operands[full[0]], operands[1 - full[0]]
    assert isinstance(value, Twins)
    tensor, second, axis = _matched(stream, node, value, other)
    pair = [tensor, second] if full[0] == 0 else [second, tensor]
    return [Twins(stream.emit(node, pair, _sizes(tensor)), shape, axis)]


def _matched(stream: Stream, node: gs.Node, value: Twins, other: Value | None) -> tuple[gs.Tensor, gs.Tensor, int]:
    """The operands of an elementwise node in layouts that go together, and the axis that its result is joined along."""
    name = f"{label(node)}/operand"
    if isinstance(other, Constants):
        return _matched_constants(stream, value, other)
    if isinstance(other, Twins) and alike(other.shape, value.shape):
        axis = value.axis or other.axis  # maps stay joined along their channels
        if axis > 0:
            return stream.joined(value, axis, name), stream.joined(other, axis, name), axis
        # A stack, from a product or for one, is the shape to stay in: a residual stream then changes to it once.
        stacked = [tensor for tensor in (value.tensor, other.tensor) if known_shape(tensor)[0] == 2]
        sizes = _sizes(stacked[0] if stacked else value.tensor)
        return stream.view(value.tensor, sizes), stream.view(other.tensor, sizes), 0
    if isinstance(other, Twins):
        if len(other.shape) != len(value.shape) or not alike([other.shape[value.axis]], [value.shape[value.axis]]):
            value, other = stream.front(value), stream.front(other)
        if len(other.shape) != len(value.shape) or not alike(other.shape[:1], value.shape[:1]):
            raise Refusal(f"{label(node)} ({node.op}) broadcasts an operand along the axis that the views are joined on")
        return stream.joined(value, value.axis, name), stream.joined(other, value.axis, name), value.axis
    (tensor,) = _shared(node, [other])
    own = known_shape(tensor)
    if own in ([], [1]):
        return value.tensor, tensor, value.axis
    if extent(own, value.axis, len(value.shape)) != 1:
        # One for each sample: both views have it.
        tensor = stream.joined(Shared(tensor), value.axis - (len(value.shape) - len(own)), name)
    return stream.joined(value, value.axis, name), tensor, value.axis


def _matched_constants(stream: Stream, value: Twins, other: Constants) -> tuple[gs.Tensor, gs.Tensor, int]:
    own, size = other.first.shape, len(value.shape)
    if value.axis > 0 and extent(own, value.axis, size) == value.shape[value.axis]:
        joined = np.concatenate([other.first, other.second], value.axis - (size - len(own)))
        return value.tensor, stream.weight(joined, other.name), value.axis
    both = np.stack([other.first, other.second])
    if other.first.size == (own[-1] if own else 1):  # a number for each channel, or one
        return stream.stacked(value), stream.weight(both.reshape(2, 1, -1), other.name), 0
    value = stream.front(value)
    constant = stream.weight(both.reshape(2, *(size - len(own)) * [1], *own), other.name)
    return stream.view(value.tensor, [2, *as_sizes(value.shape)]), constant, 0


def _matmul(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    value, other = _twins(node, operands[0]), operands[1]
    weights: gs.Tensor
    if isinstance(other, Constants) and other.first.ndim == 2:
        rows, weights = Twins(stream.stacked(value), value.shape), stream.weight(np.stack([other.first, other.second]), other.name)
    elif isinstance(other, Shared) and len(known_shape(other.tensor)) == 2:
        rows, weights = stream.rows(value), other.tensor
    elif isinstance(other, Twins) and len(value.shape) == len(other.shape) >= 3 and alike(value.shape[:1], other.shape[:1]):
        return _apply(stream, node, stream.front(value), [stream.joined(other, 0, f"{label(node)}/operand")], 0)
    else:
        raise Refusal(f"the operands of {label(node)} (MatMul) are neither activations and a matrix nor two activations of one batch")
    out = stream.emit(node, [rows.tensor, weights], [*_sizes(rows.tensor)[:-1], *_sizes(weights)[-1:]])
    return [Twins(out, known_shape(node.outputs[0]), rows.axis)]


def _layer_norm(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Where the views' scales and biases differ they follow as a product and a sum."""
    value = _twins(node, operands[0])
    if not is_last_axis(node.attrs.get("axis", -1), node.inputs[0]) or has_output(node, 1) or has_output(node, 2):
        raise Refusal(f"{label(node)} normalises over more than the last axis, or its statistics are read")
    rows = stream.rows(value)
    sizes = _sizes(rows.tensor)
    if all(operand is None or isinstance(operand, Shared) for operand in operands[1:]):
        out = stream.emit(node, [rows.tensor, *_shared(node, operands[1:])], sizes, axis=-1)
        return [Twins(out, value.shape, rows.axis)]
    ones = stream.edit.constant(np.ones_like(_arrays(node, operands[1])[0]), "twins/ones")
    result = Twins(stream.emit(node, [rows.tensor, ones], sizes, axis=-1), value.shape, rows.axis)
    for op, operand in zip(("Mul", "Add"), operands[1:], strict=False):
        first, second = _arrays(node, operand)
        tensor, constant, axis = _matched_constants(stream, result, Constants(f"{label(node)}/{op.lower()}", first, second))
        result = Twins(stream.emit(node, [tensor, constant], _sizes(tensor), op), value.shape, axis)
    return [result]


def _convolution(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Of other weights: a convolution of twice the groups, along the channels. Of shared ones: of twice the batch."""
    shape = known_shape(node.outputs[0])
    value = _twins(node, operands[0])
    if all(operand is None or isinstance(operand, Shared) for operand in operands[1:]):
        return _apply(stream, node, stream.front(value), _shared(node, operands[1:]), 0)
    weights = [
        stream.weight(np.concatenate(_arrays(node, operand)), f"{label(node)}/{i}") for i, operand in enumerate(operands[1:]) if operand
    ]
    data = stream.joined(value, 1, f"{label(node)}/operand")
    groups = 2 * node.attrs.get("group", 1)
    return [Twins(stream.emit(node, [data, *weights], joined_shape(shape, 1), group=groups), shape, 1)]


def _by_sample(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Three operands with the samples along axis 0: q, k and v, or what is rotated and the tables."""
    if len(node.inputs) != 3 or any(has_output(node, i) for i in range(1, len(node.outputs))):
        raise Refusal(f"{label(node)} ({node.op}) has more than three inputs and one output")
    batch = [known_shape(tensor)[:1] for tensor in node.inputs]
    if not alike(batch[0], batch[1]) or not alike(batch[0], batch[2]):
        raise Refusal(f"the inputs of {label(node)} ({node.op}) are not of one batch")
    shape = known_shape(node.outputs[0])
    _twins(node, operands[0])
    inputs = [stream.joined(operand, 0, f"{tensor.name}/twins") for operand, tensor in zip(operands, node.inputs, strict=True) if operand]
    return [Twins(stream.emit(node, inputs, joined_shape(shape, 0)), shape)]


def _reshape(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    """Nothing: joined along axis 0, any shape of a view is as good as the other."""
    value = stream.front(_twins(node, operands[0]))
    return [Twins(value.tensor, known_shape(node.outputs[0]))]


def _transpose(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    value = _twins(node, operands[0])
    perm = transposition(node)
    if perm is None:
        raise Refusal(f"{label(node)} (Transpose) has an unknown permutation")
    if value.axis == perm[-1]:
        value = stream.front(value)  # what follows works on the last axis
    return _apply(stream, node, value, [], perm.index(value.axis))


def _slice(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    parts = slices(node)
    if parts is None:
        raise Refusal(f"{label(node)} (Slice) cuts at places that are not constants")
    value = stream.clear_of(_twins(node, operands[0]), set(parts), node)
    return _apply(stream, node, value, _shared(node, operands[1:]), value.axis)


def _gather(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    (indices,) = _shared(node, operands[1:])
    axis = node.attrs.get("axis", 0) % _rank(node)
    value = stream.clear_of(_twins(node, operands[0]), {axis}, node)
    moved = len(known_shape(indices)) - 1 if value.axis > axis else 0
    return _apply(stream, node, value, [indices], value.axis + moved)


def _squeeze(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    axes = constant_value(node.inputs[1]) if has_input(node, 1) else None
    if axes is None:
        raise Refusal(f"{label(node)} (Squeeze) does not say which axes")
    gone = {axis % _rank(node) for axis in axes.tolist()}
    value = stream.clear_of(_twins(node, operands[0]), gone, node)
    return _apply(stream, node, value, _shared(node, operands[1:]), value.axis - sum(axis < value.axis for axis in gone))


def _unsqueeze(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    axes = constant_value(node.inputs[1])
    size = len(known_shape(node.outputs[0]))
    if axes is None:
        raise Refusal(f"{label(node)} (Unsqueeze) adds axes that are not constants")
    new = {axis % size for axis in axes.tolist()}
    value = _twins(node, operands[0])
    kept = [axis for axis in range(size) if axis not in new]
    return _apply(stream, node, value, _shared(node, operands[1:]), kept[value.axis])


def _reduce(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    axes = constant_value(node.inputs[1]) if has_input(node, 1) else None
    if axes is None or not node.attrs.get("keepdims", 1):
        raise Refusal(f"{label(node)} ({node.op}) reduces over all axes, or drops them")
    value = stream.clear_of(_twins(node, operands[0]), {axis % _rank(node) for axis in axes.tolist()}, node)
    return _apply(stream, node, value, _shared(node, operands[1:]), value.axis)


def _softmax(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    value = stream.clear_of(_twins(node, operands[0]), {node.attrs.get("axis", -1) % _rank(node)}, node)
    return _apply(stream, node, value, [], value.axis)


def _resize(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    scales = constant_value(node.inputs[2]) if has_input(node, 2) else None
    if scales is None or has_input(node, 1) or "axes" in node.attrs:
        raise Refusal(f"{label(node)} (Resize) is not by constant scales of all axes")
    value = stream.clear_of(_twins(node, operands[0]), set(np.flatnonzero(scales != 1).tolist()), node)
    return _apply(stream, node, value, _shared(node, operands[1:]), value.axis)


def _depth_to_space(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    return _apply(stream, node, stream.clear_of(_twins(node, operands[0]), {1, 2, 3}, node), [], 0)


def _concat(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    shape = known_shape(node.outputs[0])
    axis = node.attrs["axis"] % len(shape)
    values = [_twins(node, operand, "operands") for operand in operands]
    if axis == len(shape) - 1 and all(value.axis == 0 for value in values):
        rows = [stream.stacked(value) for value in values]
        return [Twins(stream.emit(node, rows, [*_sizes(rows[0])[:-1], *_sizes(node.outputs[0])[-1:]], axis=-1), shape)]
    (common, *others) = {value.axis for value in values}
    if others or common == axis:
        common = 0
    if common == axis:
        raise Refusal(f"{label(node)} (Concat) works along the axis that the views are joined on")
    inputs = [stream.joined(value, common, f"{label(node)}/operand") for value in values]
    return [Twins(stream.emit(node, inputs, joined_shape(shape, common)), shape, common)]


def _split(stream: Stream, node: gs.Node, operands: Operands) -> list[Value]:
    axis = node.attrs.get("axis", 0) % _rank(node)
    value = stream.clear_of(_twins(node, operands[0]), {axis}, node)
    shapes = [known_shape(output) for output in node.outputs]
    inputs = [stream.joined(value, value.axis, f"{label(node)}/operand"), *_shared(node, operands[1:])]
    outputs = [stream.variable(output, joined_shape(shape, value.axis)) for output, shape in zip(node.outputs, shapes, strict=True)]
    stream.split(inputs, outputs, f"{label(node)}/twins", **node.attrs)
    return [Twins(output, shape, value.axis) for output, shape in zip(outputs, shapes, strict=True)]


_UNARY = (
    "Abs",
    "Cast",
    "Clip",
    "Cos",
    "Erf",
    "Exp",
    "Gelu",
    "Identity",
    "Log",
    "Neg",
    "Reciprocal",
    "Relu",
    "Sigmoid",
    "Sin",
    "Sqrt",
    "Tanh",
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_UNARY, _elementwise),
    **dict.fromkeys(("Add", "Div", "Mul", "Pow", "Sub"), _broadcast),
    **dict.fromkeys(("Conv", "ConvTranspose"), _convolution),
    **dict.fromkeys(("Attention", "RotaryEmbedding"), _by_sample),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum", "ReduceSumSquare"), _reduce),
    "CastLike": _cast_like,
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Gather": _gather,
    "LayerNormalization": _layer_norm,
    "MatMul": _matmul,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Softmax": _softmax,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
