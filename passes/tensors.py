"""Reading and editing onnx-graphsurgeon graphs: constants, shapes, readers, new nodes.

A dimension is an int when it is static, a name when it is dynamic, and None when nothing is known about it. Axes that are
counted from the end, which survive broadcasting, are negative.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx.reference import ReferenceEvaluator

from smc.passes.base import Refusal, label

Array = npt.NDArray[Any]
Dim = int | str | None

OPSET = 23
"""The first opset whose standard operations include Attention and RotaryEmbedding, and the oldest that passes work on."""

_UNKNOWN = -(2**61) - 1  # stands for a dynamic dimension among the values of a Shape: no size, no index and no bound
_MOVES = frozenset({"Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
_COMPUTES = frozenset(
    {"Add", "Cast", "ConstantOfShape", "Div", "Equal", "Floor", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Range", "Reciprocal", "Sqrt"}
    | {"Sub", "Where"}
)
_RANDOM = frozenset({"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
_ARITHMETIC: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


def producer(tensor: gs.Tensor) -> gs.Node | None:
    return tensor.inputs[0] if tensor.inputs else None


def is_output(graph: gs.Graph, tensor: gs.Tensor) -> bool:
    return any(tensor is output for output in graph.outputs)


def sole_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node:
    """The one node that reads `tensor`, once. Raises Refusal where it is read elsewhere as well."""
    if is_output(graph, tensor):
        raise Refusal(f"{tensor.name} is an output of the graph")
    if len(tensor.outputs) != 1:
        raise Refusal(f"{tensor.name} is read by {', '.join(label(node) for node in tensor.outputs) or 'nothing'}, not by one node alone")
    return tensor.outputs[0]


def has_output(node: gs.Node, index: int) -> bool:
    """Whether an optional output is there and read."""
    return len(node.outputs) > index and bool(node.outputs[index].outputs)


def has_input(node: gs.Node, index: int) -> bool:
    return len(node.inputs) > index and not node.inputs[index].is_empty()


def dims(tensor: gs.Tensor) -> list[Dim] | None:
    return None if tensor.shape is None else list(tensor.shape)


def rank(tensor: gs.Tensor) -> int | None:
    return None if tensor.shape is None else len(tensor.shape)


def static_dim(tensor: gs.Tensor, axis: int) -> int | None:
    """The size of an axis where it is known, 1 for a leading axis that broadcasting would add."""
    shape = dims(tensor)
    if shape is None or axis >= len(shape):
        return None
    if axis < -len(shape):
        return 1
    size = shape[axis]
    return size if isinstance(size, int) else None


def may_differ(a: Dim, b: Dim, input_dims: frozenset[str]) -> bool:
    """Whether two dimensions that a broadcast brings together are known not to be one and the same.

    Known are: different sizes, 1 against anything else, and two different names of dimensions of the graph's inputs. Other
    dynamic dimensions are taken for equal: an exporter's shape computations often leave equal dimensions with made-up names.
    """
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    if a == 1 or b == 1:
        return True
    return a != b and a in input_dims and b in input_dims


def input_dims(graph: gs.Graph) -> frozenset[str]:
    """Names of the dynamic dimensions of the graph's inputs."""
    return frozenset(size for tensor in graph.inputs for size in tensor.shape or () if isinstance(size, str))


def is_made_up(size: Dim) -> bool:
    """Whether a dimension is unknown, or has a name of shape inference's own, which means nothing in its next run."""
    return size is None or (isinstance(size, str) and size.startswith("unk__"))


def dim_value(size: Dim, sizes: Mapping[str, int]) -> int | None:
    """A dimension's size where the named dimensions have `sizes`: of a name, or of arithmetic such as 16*rows; None if unknown."""
    if not isinstance(size, str):
        return size
    if size in sizes:
        return sizes[size]
    try:
        return _arithmetic(ast.parse(size, mode="eval").body, sizes)
    except SyntaxError:
        return None


def _arithmetic(term: ast.expr, sizes: Mapping[str, int]) -> int | None:
    match term:
        case ast.Constant(value=int(value)):
            return value
        case ast.Name(id=name):
            return sizes.get(name)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            a, b = _arithmetic(left, sizes), _arithmetic(right, sizes)
            return None if a is None or b is None else _ARITHMETIC[type(op)](a, b)
    return None


def is_number_type(dtype: object) -> bool:
    """Whether a tensor's type is one that NumPy has. bfloat16 is not: graphsurgeon gives its ONNX code instead."""
    return dtype is not None and not isinstance(dtype, int)


def constant_value(tensor: gs.Tensor) -> Array | None:
    """The value of a tensor that does not depend on the graph's inputs, or None.

    Sees through Constant nodes and the small arithmetic on static dimensions that exporters leave in a graph, such as
    1 / Sqrt(Cast(Slice(Shape(q)))). Loads the values: look at `shape` first where those may be many.
    """
    value = _evaluate(tensor)
    return None if value is None or _has_unknown(value) else value


def scalar_value(tensor: gs.Tensor) -> float | None:
    """The value of a constant of one element and of at most one axis, so that it changes no shape, or None."""
    if dims(tensor) not in (None, [], [1]):
        return None
    value = constant_value(tensor)
    return float(value.item()) if value is not None and value.size == 1 and value.ndim <= 1 else None


def _has_unknown(value: Array) -> bool:
    return value.dtype == np.int64 and bool((value == _UNKNOWN).any())


def _evaluate(tensor: gs.Tensor) -> Array | None:
    if isinstance(tensor, gs.Constant):
        return tensor.values
    node = producer(tensor)
    if node is None:
        return None
    if node.op == "Constant":
        (value,) = node.attrs.values()
        if isinstance(value, gs.Constant):
            return value.values
        # value_float(s) and value_int(s)
        return np.array(value, dtype=np.float32 if np.asarray(value).dtype.kind == "f" else np.int64)
    if node.op == "Shape":
        shape = dims(node.inputs[0])
        if shape is None:
            return None
        sizes = [size if isinstance(size, int) else _UNKNOWN for size in shape]
        start, end = node.attrs.get("start", 0), node.attrs.get("end", len(sizes))
        return np.array(sizes[start:end], dtype=np.int64)
    if node.op not in _MOVES | _COMPUTES or len(node.outputs) != 1:
        return None
    values: dict[str, Array] = {}
    for i, operand in enumerate(node.inputs):
        if not operand.is_empty():
            value = _evaluate(operand)
            # Unknowns may be moved, but neither computed with nor taken for the indices, bounds, axes or shape of a movement.
            is_moved = node.op == "Concat" or (node.op in _MOVES and i == 0)
            if value is None or (_has_unknown(value) and not is_moved):
                return None
            values[operand.name] = value
    return run_node(node, values)[0]


def is_repeatable(node: gs.Node) -> bool:
    """Whether a node makes the same of the same inputs every time: it draws no random numbers and runs no subgraph."""
    return node.op not in _RANDOM and not any(isinstance(value, gs.Graph) for value in node.attrs.values())


def run_node(node: gs.Node, values: Mapping[str, Array]) -> list[Array]:
    """The outputs of a standard operation, from the values of its inputs by their names, as onnx's reference computes them."""
    attrs = {
        name: onnx.numpy_helper.from_array(value.values) if isinstance(value, gs.Constant) else value for name, value in node.attrs.items()
    }
    names = [f"out{i}" if output.name else "" for i, output in enumerate(node.outputs)]
    proto = onnx.helper.make_node(node.op, [tensor.name for tensor in node.inputs], names, **attrs)
    feed = {tensor.name: values[tensor.name] for tensor in node.inputs if not tensor.is_empty()}
    results = ReferenceEvaluator(proto, opsets={"": OPSET}).run([name for name in names if name], feed)
    return [np.asarray(result) for result in results]


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Let all readers of `old` read `new`."""
    for reader in list(old.outputs):
        for i, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[i] = new


def unscaled(node: gs.Node) -> tuple[gs.Tensor, float] | None:
    """For a Mul or Div by one number, the tensor that it scales and the factor; None for any other node."""
    if node.op == "Mul":
        for data, other in (node.inputs, reversed(node.inputs)):
            if (factor := scalar_value(other)) is not None:
                return data, factor
    elif node.op == "Div" and (divisor := scalar_value(node.inputs[1])):
        return node.inputs[0], 1.0 / divisor
    return None


def transposition(node: gs.Node) -> list[int] | None:
    """The permutation of a Transpose, written out; None where it is left to an unknown rank."""
    perm = node.attrs.get("perm")
    size = rank(node.inputs[0])
    if perm is None:
        return None if size is None else list(reversed(range(size)))
    return list(perm)


def is_last_axis(axis: int, tensor: gs.Tensor) -> bool:
    size = rank(tensor)
    return axis == -1 or (size is not None and axis == size - 1)


def slices(node: gs.Node) -> dict[int, slice] | None:
    """Axis -> slice of a Slice whose parameters are constants, axes counted from the front; None for any other."""
    size = rank(node.inputs[0])
    values = [constant_value(node.inputs[i]) if has_input(node, i) else None for i in range(5)]
    starts, ends, axes, steps = values[1:]
    if size is None or starts is None or ends is None or any(has_input(node, i) and values[i] is None for i in (3, 4)):
        return None
    count = len(starts)
    axes = np.arange(count) if axes is None else axes
    steps = np.ones(count, dtype=np.int64) if steps is None else steps
    result: dict[int, slice] = {}
    for start, end, axis, step in zip(starts.tolist(), ends.tolist(), axes.tolist(), steps.tolist(), strict=True):
        # ONNX's "to the very front", for a negative step, is below -size; Python would take it for an offset from the end.
        width = static_dim(node.inputs[0], axis)
        stop = None if step < 0 and (width is None or end < -width) else end
        result[axis % size] = slice(start, stop, step)
    return result


def split_starts(node: gs.Node, width: int) -> list[int] | None:
    """Where each output of a Split of `width` elements starts, and the end; None where the sizes are not constants."""
    if has_input(node, 1):
        sizes = constant_value(node.inputs[1])
        return None if sizes is None else [0, *np.cumsum(sizes).tolist()]
    size = -(-width // len(node.outputs))  # the last one is smaller where they do not divide
    return [min(i * size, width) for i in range(len(node.outputs) + 1)]


def last_axis_selection(node: gs.Node, output: gs.Tensor, width: int) -> Array | None:
    """Which of the `width` channels a Split, Slice or Gather on the last axis alone picks for `output`; None for any other node.

    A Gather of one index is none of these: it removes the axis.
    """
    data = node.inputs[0]
    channels = np.arange(width)
    if node.op == "Split" and is_last_axis(node.attrs.get("axis", 0), data):
        starts = split_starts(node, width)
        index = next(i for i, tensor in enumerate(node.outputs) if tensor is output)
        return None if starts is None else channels[starts[index] : starts[index + 1]]
    if node.op == "Slice" and (chosen := slices(node)) is not None and set(chosen) == {len(data.shape) - 1}:
        return channels[chosen[len(data.shape) - 1]]
    if node.op == "Gather" and is_last_axis(node.attrs.get("axis", 0), data):
        indices = constant_value(node.inputs[1])
        return None if indices is None or indices.ndim != 1 else channels[indices]
    return None


class Editor:
    """Adds to a graph: nodes and constants whose names are new in it, each constant once."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._names = {node.name for node in graph.nodes} | set(graph.tensors())
        self._constants: dict[tuple[str, tuple[int, ...], bytes], gs.Constant] = {}

    def fresh(self, name: str) -> str:
        """`name`, or `name` with the first number that makes it new."""
        candidate, number = name, 1
        while candidate in self._names:
            number += 1
            candidate = f"{name}_{number}"
        self._names.add(candidate)
        return candidate

    def constant(self, values: Array, name: str) -> gs.Constant:
        key = (values.dtype.str, values.shape, values.tobytes())
        if key not in self._constants:
            self._constants[key] = gs.Constant(self.fresh(name), np.ascontiguousarray(values).reshape(values.shape))
        return self._constants[key]

    def integers(self, values: list[int], name: str) -> gs.Constant:
        return self.constant(np.array(values, dtype=np.int64), name)

    def node(
        self,
        op: str,
        inputs: list[gs.Tensor],
        *,
        name: str,
        dtype: object = None,
        shape: list[Dim] | None = None,
        output: gs.Tensor | None = None,
        **attrs: object,
    ) -> gs.Tensor:
        """Append a node of one output, and return that.

        The output is a new tensor of `dtype` and `shape` or, with `output`, that tensor of the graph, whose old producer loses
        it: its readers, its name and its being an output of the graph stay as they were.
        """
        if output is None:
            output = gs.Variable(self.fresh(f"{name}_out"), dtype=dtype, shape=shape)
        else:
            output.inputs.clear()
        self.graph.nodes.append(gs.Node(op, self.fresh(name), attrs=dict(attrs), inputs=inputs, outputs=[output]))
        return output

    def transpose(self, tensor: gs.Tensor, perm: list[int], *, name: str, output: gs.Tensor | None = None) -> gs.Tensor:
        """`tensor` with its axes permuted: itself where that is the identity."""
        if perm == sorted(perm) and output is None:
            return tensor
        shape = dims(tensor)
        permuted = None if shape is None else [shape[axis] for axis in perm]
        return self.node("Transpose", [tensor], name=name, dtype=tensor.dtype, shape=permuted, output=output, perm=perm)

    def unsqueeze(self, tensor: gs.Tensor, axis: int, *, name: str) -> gs.Tensor:
        shape = dims(tensor)
        if shape is not None:
            shape.insert(axis, 1)
        return self.node("Unsqueeze", [tensor, self.integers([axis], "axes")], name=name, dtype=tensor.dtype, shape=shape)

    def squeeze(self, tensor: gs.Tensor, axis: int, *, name: str, output: gs.Tensor | None = None) -> gs.Tensor:
        shape = dims(tensor)
        if shape is not None:
            del shape[axis]
        return self.node("Squeeze", [tensor, self.integers([axis], "axes")], name=name, dtype=tensor.dtype, shape=shape, output=output)

    def split(self, tensor: gs.Tensor, sizes: gs.Tensor, outputs: list[gs.Tensor], *, name: str) -> None:
        """Make `outputs`, tensors of the graph whose old producers lose them, parts of `tensor`'s last axis."""
        for output in outputs:
            output.inputs.clear()
        self.graph.nodes.append(gs.Node("Split", self.fresh(name), attrs={"axis": -1}, inputs=[tensor, sizes], outputs=outputs))
