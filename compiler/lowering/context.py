"""What lowering knows at a moment: where each tensor of the graph lies, and the calls made so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.views import Buffer, CannotView, Dim, View, contiguous, refine
from smc.exported.engines.cuda_program import ITEMSIZES
from smc.passes.base import label
from smc.passes.tensors import constant_value, is_output
from smc.plugins.elementwise.specification import Elementwise
from smc.plugins.elementwise.specification import View as Strided

MAX_LOOPS = 6
"""Axes that an elementwise kernel goes along."""

_ALIGNMENT = 16  # bytes

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class CannotLower(ValueError):
    """The graph holds something that no kernel of this project does; the message names the node."""


@dataclass(frozen=True, eq=False)
class Call:
    """An operation of `plugins` and the buffers of its operands, some of which it writes.

    Attributes:
        operation: its attributes, such as a `Gemm`.
        operands: name -> buffer; offsets are the operation's.
        writes: names of the operands that it makes.
        label: the node that it is for, for profiles and messages.
    """

    operation: Any
    operands: Mapping[str, Buffer]
    writes: tuple[str, ...]
    label: str


def sources(calls: Sequence[Call], wanted: set[Buffer]) -> set[int]:
    """The calls that buffers come from, by number."""
    wanted, found = set(wanted), set()
    for number in reversed(range(len(calls))):
        call = calls[number]
        if any(call.operands[name] in wanted for name in call.writes):
            found.add(number)
            wanted |= {buffer for name, buffer in call.operands.items() if name not in call.writes}
    return found


class Context:
    """The state of a graph's lowering.

    Attributes:
        graph: typed, every dimension static, its nodes in topological order.
        calls: made so far, in order.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.calls: list[Call] = []
        self._views: dict[str, View] = {}
        self._done: set[int] = set()

    def view(self, tensor: gs.Tensor) -> View:
        """Where a tensor lies. A constant gets its buffer when it is first asked for."""
        if tensor.name not in self._views:
            values = constant_value(tensor)
            if values is None:
                raise CannotLower(f"{tensor.name} is read before it is made")
            self._views[tensor.name] = constant(tensor.name, values)
        return self._views[tensor.name]

    def operand(self, tensor: gs.Tensor, node: gs.Node, dtype: str) -> View:
        """Where a tensor lies in just this type: it may lie there in a narrower one than it has in the graph."""
        view = self.view(tensor)
        return view if view.dtype == dtype else self.or_copy(view, node, lambda source: self.copied(source, node, dtype))

    def is_ready(self, tensor: gs.Tensor) -> bool:
        return tensor.name in self._views or constant_value(tensor) is not None

    def bind(self, tensor: gs.Tensor, view: View) -> None:
        """Note where a tensor lies."""
        assert list(view.shape) == list(tensor.shape), f"{tensor.name}: {view.shape} for {tensor.shape}"
        self._views[tensor.name] = view

    def finish(self, node: gs.Node) -> None:
        """Note that a node's results are there, or that nobody will read them."""
        self._done.add(id(node))

    def is_done(self, node: gs.Node) -> bool:
        return id(node) in self._done

    def call(self, operation: Any, operands: Mapping[str, Buffer | None], writes: Sequence[str], node: gs.Node) -> None:
        given = {name: buffer for name, buffer in operands.items() if buffer is not None}
        self.calls.append(Call(operation, given, tuple(writes), label(node)))

    def new(self, tensor: gs.Tensor, dtype: str | None = None, shape: Sequence[int] | None = None) -> View:
        """New memory for a tensor, row-major, in another type or shape if given."""
        sizes = tuple(tensor.shape if shape is None else shape)
        return contiguous(Buffer(tensor.name, dtype or dtype_name(tensor), math.prod(sizes)), sizes)

    def copied(self, view: View, node: gs.Node, dtype: str | None = None) -> View:
        """A row-major copy of a view, cast if a type is given."""
        out = contiguous(Buffer(f"{view.buffer.name}/copy", dtype or view.dtype, view.size), view.shape)
        self.copy(view, out, node)
        return out

    def copy(self, source: View, to: View, node: gs.Node) -> None:
        """Copy between views of one shape, with a cast where their types differ."""
        loops = refine([to, source])
        if len(loops) > MAX_LOOPS:
            raise CannotLower(
                f"{label(node)} ({node.op}): its data would be moved along {len(loops)} axes, {MAX_LOOPS} at most are possible"
            )
        shape = tuple(size for size, _ in loops)
        x = Strided(source.dtype, tuple(strides[1] for _, strides in loops), source.offset)
        out = Strided(to.dtype, tuple(strides[0] for _, strides in loops), to.offset)
        self.call(Elementwise("copy", shape, (x,), out), {"x": source.buffer, "out": to.buffer}, ["out"], node)

    def readers(self, tensor: gs.Tensor) -> list[gs.Node]:
        """The nodes that read a tensor and are still to be lowered."""
        return [node for node in tensor.outputs if not self.is_done(node)]

    def sole_reader(self, tensor: gs.Tensor) -> gs.Node | None:
        """The one node that reads a tensor, or None where there are others or the graph gives it out."""
        if is_output(self.graph, tensor) or len(tensor.outputs) != 1:
            return None
        return tensor.outputs[0]

    def or_copy(self, view: View, node: gs.Node, use: Callable[[View], Any]) -> Any:
        """`use(view)`, or of a row-major copy where the view does not suit."""
        try:
            return use(view)
        except CannotView:
            return use(self.copied(view, node))


def constant(name: str, values: NDArray[Any]) -> View:
    """A constant's memory."""
    values = np.ascontiguousarray(values).reshape(values.shape)  # a number would have got an axis
    return contiguous(Buffer(name, numpy_name(values.dtype), values.size, values), values.shape)


def numpy_name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def dtype_name(tensor: gs.Tensor) -> str:
    """A tensor's element type, as numpy names it. Raises CannotLower: no kernel knows it."""
    from onnx import TensorProto, helper

    if isinstance(tensor.dtype, int):
        name = "bfloat16" if tensor.dtype == TensorProto.BFLOAT16 else helper.tensor_dtype_to_np_dtype(tensor.dtype).name
    else:  # numpy takes None for float64
        name = "of unknown type" if tensor.dtype is None else numpy_name(np.dtype(tensor.dtype))
    if name not in ITEMSIZES:
        raise CannotLower(f"{tensor.name} is {name}, which this backend's kernels do not take")
    return name


def stride(dim: Dim) -> int:
    """The stride of a dimension of equal steps; 0 for one of a single element. Raises CannotView."""
    if len(dim) > 1:
        raise CannotView
    return dim[0][1] if dim else 0


def aligned(view: View, *strides: int) -> None:
    """Raise CannotView unless a view, and what lies these strides on, starts at multiples of the 16 bytes that kernels read at a time."""
    itemsize = ITEMSIZES[view.dtype]
    if any(elements * itemsize % _ALIGNMENT for elements in (view.offset, *strides)):
        raise CannotView


def unit(dim: Dim) -> None:
    """Raise CannotView unless the elements of a dimension are neighbours."""
    if stride(dim) not in (0, 1) or (dim and dim[0][1] != 1):
        raise CannotView
