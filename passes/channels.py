"""Following the channels, the last axis, of tensors through a graph: what RoPE does is seen from this, not from its spelling.

Two questions are answered. `LinearTrace`: how does each channel of a tensor depend on the channels of x, as a sum of terms
coefficient * x[i] * factor, where a factor is a channel of some other tensor? `Columns`: do two channels of such tensors, the
cos and sin tables, hold equal values?
"""

from __future__ import annotations

from collections.abc import Hashable

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Refusal, label
from smc.passes.tensors import (
    Array,
    constant_value,
    dims,
    is_last_axis,
    is_number_type,
    last_axis_selection,
    producer,
    rank,
    static_dim,
    unscaled,
)

Factor = tuple[str, int]
"""A channel of a tensor, given by the tensor's name and the index on its last axis."""

Channel = dict[tuple[int, Factor | None], float]
"""A sum of terms: (channel of x, factor) -> coefficient."""

LINEAR = frozenset({"Add", "Concat", "Div", "Gather", "Identity", "Mul", "Neg", "Slice", "Split", "Sub"})
"""Operations that LinearTrace follows."""

_LARGEST_TABLE = 1 << 24  # elements; a constant above that is not a cos or sin table, and is compared by name


class LinearTrace:
    """Channels of tensors as sums of terms of x. Raises Refusal at the node where a tensor that depends on x is no such sum."""

    def __init__(self, x: gs.Tensor, width: int, columns: Columns) -> None:
        self.factors: dict[str, gs.Tensor] = {}
        self._x = x
        self._columns = columns
        self._memo: dict[str, list[Channel] | None] = {x.name: [{(i, None): 1.0} for i in range(width)]}

    def channels(self, tensor: gs.Tensor) -> list[Channel] | None:
        """None where nothing leads to x by the operations in LINEAR."""
        if tensor.name not in self._memo:
            node = producer(tensor)
            self._memo[tensor.name] = None if node is None or node.op not in LINEAR else self._through(node, tensor)
        return self._memo[tensor.name]

    def _through(self, node: gs.Node, output: gs.Tensor) -> list[Channel] | None:
        if node.op in ("Split", "Slice", "Gather"):
            channels = self.channels(node.inputs[0])
            if channels is None:
                return None
            selection = last_axis_selection(node, output, len(channels))
            if selection is None:
                raise Refusal(f"{label(node)} ({node.op}) does not pick channels by constants")
            return [channels[i] for i in selection]
        if (scaled := unscaled(node)) is not None:
            channels = self.channels(scaled[0])
            return None if channels is None else [_times(channel, scaled[1]) for channel in channels]
        operands = [self.channels(tensor) for tensor in node.inputs]
        reached = [channels for channels in operands if channels is not None]
        if not reached:
            return None
        if node.op == "Mul" and len(reached) == 1:
            other = node.inputs[0 if operands[0] is None else 1]
            return self._scale_by(node, reached[0], other)
        if len(reached) < len(operands) or node.op in ("Mul", "Div"):
            raise Refusal(f"{label(node)} ({node.op}) mixes channels of {self._x.name} with something else")
        if node.op == "Identity":
            return reached[0]
        if node.op == "Neg":
            return [_times(channel, -1.0) for channel in reached[0]]
        if node.op == "Concat":
            if not is_last_axis(node.attrs["axis"], output):
                raise Refusal(f"{label(node)} (Concat) joins along another axis than the last")
            return [channel for channels in reached for channel in channels]
        first, second = reached
        if len(first) != len(second):
            raise Refusal(f"{label(node)} ({node.op}) broadcasts channels")
        sign = 1.0 if node.op == "Add" else -1.0
        return [_plus(a, _times(b, sign)) for a, b in zip(first, second, strict=True)]

    def _scale_by(self, node: gs.Node, channels: list[Channel], other: gs.Tensor) -> list[Channel]:
        columns = self._columns.of(other)
        if columns is None or len(columns) not in (1, len(channels)):
            raise Refusal(f"{label(node)} (Mul) multiplies by {other.name}, whose channels do not match or are unknown")
        if any(factor is not None for channel in channels for _, factor in channel):
            raise Refusal(f"{label(node)} (Mul) multiplies what was multiplied before")
        self.factors[other.name] = other
        indices = range(len(channels)) if len(columns) > 1 else [0] * len(channels)
        return [
            {(i, (other.name, index)): coefficient for (i, _), coefficient in channel.items()}
            for channel, index in zip(channels, indices, strict=True)
        ]


def _times(channel: Channel, number: float) -> Channel:
    return {term: number * coefficient for term, coefficient in channel.items()}


def _plus(a: Channel, b: Channel) -> Channel:
    total = dict(a)
    for term, coefficient in b.items():
        total[term] = total.get(term, 0.0) + coefficient
    return total


Column = tuple[int, int]
"""A sign and the number of a value: equal pairs are equal channels, opposite signs are channels that differ in sign alone."""


class Columns:
    """Numbers the values of channels of tensors, as far as equality can be proved from the graph.

    A channel is a function of the position, that is of the leading axes. Operations between channels are followed, operations
    on the leading axes are noted with their parameters, and everything else is a value of its own, known by its name. Constants
    are compared by value. Leading axes of size one make no difference, and neither does an Expand: every use broadcasts.
    """

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._memo: dict[str, list[Column] | None] = {}

    def of(self, tensor: gs.Tensor) -> list[Column] | None:
        """The channels of a tensor, one for a tensor without axes; None where their count is unknown."""
        if tensor.name not in self._memo:
            columns = self._of_constant(tensor)
            if columns is None and (node := producer(tensor)) is not None:
                columns = self._through(node, tensor)
            self._memo[tensor.name] = self._as_leaf(tensor) if columns is None else columns
        return self._memo[tensor.name]

    def _number(self, *key: Hashable) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _as_leaf(self, tensor: gs.Tensor) -> list[Column] | None:
        width = 1 if rank(tensor) == 0 else static_dim(tensor, -1)
        return None if width is None else [(1, self._number("tensor", tensor.name, i)) for i in range(width)]

    def _of_constant(self, tensor: gs.Tensor) -> list[Column] | None:
        if tensor.shape is not None and np.prod([size if isinstance(size, int) else 1 for size in tensor.shape]) > _LARGEST_TABLE:
            return None
        if not is_number_type(tensor.dtype) or np.dtype(tensor.dtype).kind != "f":
            return None
        value = constant_value(tensor)
        if value is None:
            return None
        if value.ndim == 0:
            value = value[None]
        lead = list(value.shape[:-1])
        while lead and lead[0] == 1:
            del lead[0]
        return [self._constant_column(column, tuple(lead)) for column in value.reshape(-1, value.shape[-1]).T]

    def _constant_column(self, column: Array, lead: tuple[int, ...]) -> Column:
        nonzero = column[column != 0]
        sign = -1 if nonzero.size and nonzero[0] < 0 else 1
        column = sign * column + 0.0  # + 0.0: one zero instead of two
        if column.size and (column == column[0]).all():
            return sign, self._number("number", float(column[0]))
        return sign, self._number("constant", lead, column.dtype.str, column.tobytes())

    def _through(self, node: gs.Node, output: gs.Tensor) -> list[Column] | None:
        if node.op in ("Mul", "Div", "Add", "Sub"):
            return self._arithmetic(node)
        if node.op == "Concat":
            return self._concat(node, output)
        columns = self.of(node.inputs[0]) if node.inputs else None
        if columns is None:
            return None
        if node.op == "Identity":
            return columns
        if node.op == "Neg":
            return [(-sign, number) for sign, number in columns]
        if node.op == "Cos":
            return [(1, self._number("Cos", number)) for _, number in columns]
        if node.op == "Sin":
            return [(sign, self._number("Sin", number)) for sign, number in columns]
        if node.op == "Cast":
            return [(sign, self._number("Cast", node.attrs["to"], number)) for sign, number in columns]
        if node.op in ("Split", "Slice", "Gather") and (selection := last_axis_selection(node, output, len(columns))) is not None:
            return [columns[i] for i in selection]
        if node.op == "Expand":
            width = static_dim(output, -1)
            return columns if width == len(columns) else None
        if _keeps_last_axis(node, output):
            how = self._parameters(node)
            return [(sign, self._number(*how, number)) for sign, number in columns]
        return None

    def _arithmetic(self, node: gs.Node) -> list[Column] | None:
        a, b = (self.of(tensor) for tensor in node.inputs)
        if a is None or b is None or (len(a) != len(b) and 1 not in (len(a), len(b))):
            return None
        width = max(len(a), len(b))
        pairs = zip(a * (width // len(a)), b * (width // len(b)), strict=True)
        return [self._of_two(node.op, first, second) for first, second in pairs]

    def _of_two(self, op: str, a: Column, b: Column) -> Column:
        if op == "Mul":
            return a[0] * b[0], self._number("Mul", *sorted((a[1], b[1])))
        if op == "Div":
            return a[0] * b[0], self._number("Div", a[1], b[1])
        if op == "Sub":
            b = (-b[0], b[1])
        return 1, self._number("Add", *sorted((a, b)))

    def _concat(self, node: gs.Node, output: gs.Tensor) -> list[Column] | None:
        size = rank(output)
        parts = [self.of(tensor) for tensor in node.inputs]
        if size is None or any(part is None for part in parts):
            return None
        axis = node.attrs["axis"] % size - size
        if axis == -1:
            return [column for part in parts for column in part or ()]
        if len({len(part or ()) for part in parts}) > 1:
            return None
        lengths = tuple(static_dim(tensor, axis) or tensor.name for tensor in node.inputs)
        return [(1, self._number("Concat", axis, lengths, *columns)) for columns in zip(*(part or () for part in parts), strict=True)]

    def _parameters(self, node: gs.Node) -> tuple[Hashable, ...]:
        """What, besides the values, decides the result of an operation on the leading axes."""
        others: list[Hashable] = []
        for tensor in node.inputs[1:]:
            value = None if tensor.is_empty() else constant_value(tensor)
            others.append(tensor.name if value is None else (value.shape, value.tobytes()))
        attrs = tuple(sorted((name, repr(value)) for name, value in node.attrs.items()))
        return (node.op, rank(node.inputs[0]), attrs, tuple(others))


def _keeps_last_axis(node: gs.Node, output: gs.Tensor) -> bool:
    """Whether an operation acts on the leading axes alone, in the same way for every channel."""
    before, after = dims(node.inputs[0]), dims(output)
    if not before or not after:
        return False
    if node.op == "Reshape":
        return isinstance(before[-1], int) and before[-1] == after[-1]
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        return perm is not None and perm[-1] == len(perm) - 1
    if node.op == "Gather":
        return not is_last_axis(node.attrs.get("axis", 0), node.inputs[0])
    if node.op in ("Unsqueeze", "Squeeze"):
        axes = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
        longer = after if node.op == "Unsqueeze" else before
        return axes is not None and all(axis % len(longer) != len(longer) - 1 for axis in axes.tolist())
    if node.op == "Slice":
        axes = constant_value(node.inputs[3]) if len(node.inputs) > 3 else None
        return axes is not None and all(axis % len(before) != len(before) - 1 for axis in axes.tolist())
    return False
