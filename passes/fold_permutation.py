"""FoldPermutation: a Gather that permutes channels moves into the weights that make them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import (
    Array,
    Dim,
    Editor,
    constant_value,
    dims,
    is_last_axis,
    is_number_type,
    is_output,
    producer,
    rank,
    slices,
    split_starts,
    static_dim,
    transposition,
    unscaled,
)

_ELEMENTWISE = ("Add", "Sub", "Mul", "Div")

# Addresses. A tensor whose every element comes from one column of a product's weight has an index array: its last axes are the
# tensor's, of size one where the column does not depend on that axis, and its entries are the columns. Axes before those stand
# for axes that a Reshape merged with others: the columns are all of theirs, which one depends on the position.


class FoldPermutation(Pass):
    """A Gather on the last axis that permutes it moves into the columns of the product above.

    Before: Gather(f(MatMul(x, W) + b), permutation, axis=-1), or the same of Gemm, where f is made of Reshape, Transpose, Slice,
    Split, Squeeze, Unsqueeze, Gather of constants, Identity, Cast, and arithmetic with one number.
    After: f(MatMul(x, W') + b'), W' and b' being W and b with their columns permuted where f reads them for this Gather.

    Which columns an element of f's result comes from is followed from the product downwards, for all that reads the product. The
    permutation stays where it is, which is still correct, when another read touches the same columns. Weights that other nodes
    read too are copied first.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for gather in [node for node in graph.nodes if node.op == "Gather"]:
            permutation = _permutation(gather)
            if permutation is not None:
                with report.attempt(gather):
                    self._fold(edit, gather, permutation)
                    report.rewrites += 1

    def _fold(self, edit: Editor, gather: gs.Node, permutation: Array) -> None:
        if is_output(edit.graph, gather.outputs[0]):
            raise Refusal(f"{gather.outputs[0].name} is an output of the graph")
        product = _find_product(gather.inputs[0])
        reads = _Reads(edit.graph, gather)
        reads.follow_product(product)
        order = reads.new_order(permutation)
        for node, index in reads.constants:
            _permute_columns(edit, node, index, order)
        for reader in list(gather.outputs[0].outputs):
            for i, tensor in enumerate(reader.inputs):
                if tensor is gather.outputs[0]:
                    reader.inputs[i] = gather.inputs[0]


def _permutation(gather: gs.Node) -> Array | None:
    """The permutation that a Gather does on the last axis, None where it does something else."""
    data, indices = gather.inputs
    if not is_last_axis(gather.attrs.get("axis", 0), data) or rank(indices) != 1:
        return None
    value = constant_value(indices)
    width = static_dim(data, -1)
    return value % width if value is not None and width is not None and sorted((value % width).tolist()) == list(range(width)) else None


def _find_product(tensor: gs.Tensor) -> gs.Node:
    """The MatMul or Gemm with constant weights that makes the channels of `tensor`."""
    while (node := producer(tensor)) is not None:
        if node.op in ("MatMul", "Gemm"):
            weight = node.inputs[1]
            if rank(weight) != 2 or not _is_constant(weight):
                raise Refusal(f"{label(node)} ({node.op}) multiplies by {weight.name}, which is not a constant matrix")
            if not is_number_type(weight.dtype):
                raise Refusal(f"the weights {weight.name} are of a type that NumPy does not have")
            return node
        if node.op in _ELEMENTWISE:
            operands = [operand for operand in node.inputs if not _is_constant(operand)]
            if len(operands) != 1:
                raise Refusal(f"{label(node)} ({node.op}) stands between the weights and the permutation")
            tensor = operands[0]
        elif node.op in _FOLLOWED:
            tensor = node.inputs[0]
        else:
            raise Refusal(f"{label(node)} ({node.op}) stands between the weights and the permutation")
    raise Refusal(f"{tensor.name} is not made by a product with weights")


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) or constant_value(tensor) is not None


@dataclass
class _Reads:
    """Which columns of a product are read, and by what: a walk from the product to all that its columns reach."""

    graph: gs.Graph
    gather: gs.Node
    constants: list[tuple[gs.Node, int]] = field(default_factory=list)  # (node, input) whose last axis is the columns
    gathered: Array | None = None  # the columns that the Gather reads
    touched: set[int] = field(default_factory=set)  # the columns that anything else reads
    readers: dict[int, str] = field(default_factory=dict)  # column -> what touched it first
    columns: int = 0

    def follow_product(self, product: gs.Node) -> None:
        weight, output = product.inputs[1], product.outputs[0]
        self.columns = weight.shape[0 if product.op == "Gemm" and product.attrs.get("transB", 0) else 1]
        self.constants.append((product, 1))
        if product.op == "Gemm" and len(product.inputs) > 2:
            self._note_constant(product, 2)
        size = rank(output)
        if size is None:
            raise Refusal(f"the rank of {output.name} is unknown")
        self._follow(output, np.arange(self.columns).reshape([1] * (size - 1) + [-1]), whole=True)

    def _note_constant(self, node: gs.Node, index: int) -> None:
        bias = node.inputs[index]
        if not _is_constant(bias) or not is_number_type(bias.dtype):
            raise Refusal(f"{bias.name} of {label(node)} is not a constant of a type that NumPy has")
        if static_dim(bias, -1) == self.columns:
            self.constants.append((node, index))

    def _follow(self, tensor: gs.Tensor, address: Array, whole: bool) -> None:
        """`whole`: the last axis is still all the columns in their order."""
        if is_output(self.graph, tensor):
            self._touch(address, f"the output {tensor.name} of the graph")
        for node in tensor.outputs:
            if node.op == "Shape":
                continue  # which a permutation does not change
            if node is self.gather:
                self.gathered = address
            elif whole and (bias := _bias(node, tensor, self.columns)) is not None:
                self._note_constant(node, bias)
                self._follow(node.outputs[0], address, whole=True)
            else:
                for output in node.outputs:
                    result = _advance(node, tensor, output, address)
                    if result is None:
                        self._touch(address, f"{label(node)} ({node.op})")
                    else:
                        self._follow(output, result, whole and node.op in ("Identity", "Cast"))

    def _touch(self, address: Array, reader: str) -> None:
        for column in np.unique(address).tolist():
            self.touched.add(column)
            self.readers.setdefault(column, reader)

    def new_order(self, permutation: Array) -> Array:
        """For every column, the one that takes its place."""
        if self.gathered is None:
            raise Refusal("the columns cannot be followed down to it")
        if self.gathered.shape[-1] != len(permutation):
            raise Refusal("the axis permuted is not one of the weights' columns")
        shared = self.touched & set(np.unique(self.gathered).tolist())
        if shared:
            raise Refusal(f"{self.readers[min(shared)]} reads the same columns")
        order = np.arange(self.columns)
        order[self.gathered] = self.gathered[..., permutation]
        if (order[self.gathered] != self.gathered[..., permutation]).any() or len(np.unique(order)) != self.columns:
            raise Refusal("a column is read at several places, which the permutation moves differently")
        return order


def _bias(node: gs.Node, data: gs.Tensor, columns: int) -> int | None:
    """The index of the operand that has something of its own for each column, or for all, in an elementwise node on `data`."""
    if node.op not in _ELEMENTWISE or len(node.inputs) != 2 or node.inputs[0] is node.inputs[1]:
        return None
    index = 1 if node.inputs[0] is data else 0
    other = node.inputs[index]
    fits = static_dim(other, -1) in (1, columns) and (rank(other) or 0) <= (rank(data) or 0)
    return index if fits and _is_constant(other) else None


def _advance(node: gs.Node, data: gs.Tensor, output: gs.Tensor, address: Array) -> Array | None:
    """The address of `output`, one of `node`'s, from that of its input `data`; None where it cannot be followed."""
    if node.op in _ELEMENTWISE:
        scaled = unscaled(node)
        return address if scaled is not None and scaled[0] is data else None
    rule = _FOLLOWED.get(node.op)
    if rule is None or node.inputs[0] is not data or any(tensor is data for tensor in list(node.inputs)[1:]):
        return None
    return rule(node, output, address)


def _hidden(address: Array, tensor: gs.Tensor) -> int:
    """How many axes of an address stand before the tensor's own."""
    return address.ndim - len(tensor.shape)


def _same(node: gs.Node, output: gs.Tensor, address: Array) -> Array:
    return address


def _transpose(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    perm = transposition(node)
    if perm is None:
        return None
    hidden = address.ndim - len(perm)
    return address.transpose([*range(hidden), *(hidden + axis for axis in perm)])


def _squeeze(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    axes = constant_value(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None:
        return None
    hidden, size = _hidden(address, node.inputs[0]), len(node.inputs[0].shape)
    return address.squeeze(tuple(hidden + axis % size for axis in axes.tolist()))


def _unsqueeze(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    axes = constant_value(node.inputs[1])
    if axes is None:
        return None
    hidden, size = _hidden(address, node.inputs[0]), len(node.inputs[0].shape) + len(axes)
    return np.expand_dims(address, tuple(hidden + axis % size for axis in axes.tolist()))


def _take(address: Array, axis: int, chosen: slice | Array) -> Array:
    """Part of an address along one axis: all of it where the column does not depend on that axis."""
    if address.shape[axis] == 1:
        return address
    return address[(*[slice(None)] * axis, chosen)]


def _slice(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    chosen = slices(node)
    if chosen is None:
        return None
    hidden = _hidden(address, node.inputs[0])
    for axis, part in chosen.items():
        address = _take(address, hidden + axis, part)
    return address


def _split(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    axis = node.attrs.get("axis", 0) % len(node.inputs[0].shape)
    axis += _hidden(address, node.inputs[0])
    starts = split_starts(node, address.shape[axis])
    if starts is None:
        return None
    index = next(i for i, tensor in enumerate(node.outputs) if tensor is output)
    return _take(address, axis, slice(starts[index], starts[index + 1]))


def _gather(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    indices = constant_value(node.inputs[1])
    if indices is None or indices.ndim > 1:
        return None
    axis = node.attrs.get("axis", 0) % len(node.inputs[0].shape)
    axis += _hidden(address, node.inputs[0])
    address = _take(address, axis, np.atleast_1d(indices))
    return address if indices.ndim else address.squeeze(axis)


def _reshape(node: gs.Node, output: gs.Tensor, address: Array) -> Array | None:
    """Follow the axes that keep to themselves: the same elements in the last axes before and after."""
    before, after = dims(node.inputs[0]), dims(output)
    if before is None or after is None:
        return None
    lead = address.shape[: address.ndim - len(before)]
    best: Array | None = None
    for start in range(len(before) - 1, -1, -1):
        block = _static(before[start:])
        end = None if block is None else _matching_end(after, int(np.prod(block)))
        if block is None or end is None:
            continue
        own = address.shape[len(lead) : len(lead) + start]
        kept = np.broadcast_to(address, (*lead, *own, *block))
        hidden = int(np.prod((*lead, *own)))
        tail = _static(after[end:]) or []
        best = kept.reshape(hidden, *[1] * end, *tail)
        if np.prod(own) == 1:
            break  # no column is left among the axes before; otherwise those are merged into others, and the most axes stay
    return best


def _static(sizes: list[Dim]) -> list[int] | None:
    static = [size for size in sizes if isinstance(size, int)]
    return static if len(static) == len(sizes) else None


def _matching_end(shape: list[Dim], count: int) -> int | None:
    """From which axis on the last axes have `count` elements."""
    for start in range(len(shape) - 1, -1, -1):
        block = _static(shape[start:])
        if block is None:
            return None
        if np.prod(block) == count:
            return start
    return None


_FOLLOWED = {
    "Cast": _same,
    "Gather": _gather,
    "Identity": _same,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}


def _permute_columns(edit: Editor, node: gs.Node, index: int, order: Array) -> None:
    constant = node.inputs[index]
    value = constant_value(constant)
    assert value is not None
    transposed = node.op == "Gemm" and index == 1 and node.attrs.get("transB", 0)
    value = value[order] if transposed else np.ascontiguousarray(value[..., order])
    if isinstance(constant, gs.Constant) and len(constant.outputs) == 1:
        constant.values = value
    else:
        node.inputs[index] = gs.Constant(edit.fresh(f"{constant.name}_permuted"), value)
