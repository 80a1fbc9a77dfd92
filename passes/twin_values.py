"""What a pair of twin tensors, one of each view, becomes in one stream, and the layouts that this can have.

A value of shape S in one view, and its twin of the same shape in the other, lie in one tensor as if concatenated along an axis:
    axis 0     in memory all of the first view, then all of the second. Any shape of as many elements gives the same memory, so
               that tokens (B, N, C) are (2B, N, C) to an attention and (2, B*N, C) to a product with two weights.
    axis k     what Concat(axis=k) gives: maps (B, C, H, W) along the channels, (B, 2C, H, W), are what a convolution of two
               groups takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Refusal, label
from smc.passes.tensors import Array, Dim, Editor, dims


@dataclass(frozen=True)
class Shared:
    """One tensor that both views read."""

    tensor: gs.Tensor


@dataclass(frozen=True, eq=False)
class Constants:
    """Two constants of one shape and type, one of each view."""

    name: str
    first: Array
    second: Array


@dataclass(frozen=True)
class Twins:
    """The values of both views in one tensor, joined along `axis`. `shape` is that of one view.

    With axis 0, `tensor` may have any shape: the methods of `Stream` give it the one that an operation needs.
    """

    tensor: gs.Tensor
    shape: list[Dim]
    axis: int = 0


Value = Shared | Constants | Twins


def known_shape(tensor: gs.Tensor) -> list[Dim]:
    shape = dims(tensor)
    if shape is None:
        raise Refusal(f"the shape of {tensor.name} is unknown")
    return shape


def alike(a: Sequence[Dim], b: Sequence[Dim]) -> bool:
    """Whether two shapes are equal, where dynamic dimensions count as equal: they come from the same place in both views."""
    return len(a) == len(b) and all(x == y or not (isinstance(x, int) or isinstance(y, int)) for x, y in zip(a, b, strict=True))


def extent(shape: Sequence[Dim], axis: int, size: int) -> Dim:
    """Of the axis that `axis` of a tensor with `size` axes is broadcast with: 1 where `shape` has none there."""
    own = axis - (size - len(shape))
    return shape[own] if own >= 0 else 1


class Stream:
    """Adds to a graph the nodes of both views at once, and what changes the layout of their values."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self._views: dict[tuple[str, tuple[int, ...]], gs.Tensor] = {}
        self._fronts: dict[str, gs.Tensor] = {}
        self._doubled: dict[tuple[str, int], gs.Tensor] = {}

    def emit(self, node: gs.Node, inputs: list[gs.Tensor], shape: list[int], op: str | None = None, **attrs: object) -> gs.Tensor:
        """A node for both views in the place of `node`: its operation and attributes where none others are given.

        shape: of the output, with -1 for a dynamic dimension.
        """
        return self.edit.node(
            op or node.op,
            inputs,
            name=f"{label(node)}/twins",
            dtype=node.outputs[0].dtype,
            shape=_stated(shape),
            **(attrs if op else {**node.attrs, **attrs}),
        )

    def concat(self, first: gs.Tensor, second: gs.Tensor) -> Twins:
        """The two views from a tensor of each."""
        return Twins(self._concat(first, second, 0, f"{first.name}/twins"), known_shape(first))

    def variable(self, like: gs.Tensor, shape: list[int]) -> gs.Variable:
        return gs.Variable(self.edit.fresh(f"{like.name}/twins"), dtype=like.dtype, shape=_stated(shape))

    def split(self, inputs: list[gs.Tensor], outputs: list[gs.Tensor], name: str, **attrs: object) -> None:
        """A Split that makes `outputs`, instead of what made them before."""
        for output in outputs:
            output.inputs.clear()
        self.edit.graph.nodes.append(gs.Node("Split", self.edit.fresh(name), attrs=attrs, inputs=inputs, outputs=outputs))

    def weight(self, values: Array, name: str) -> gs.Constant:
        """A new constant. Not `Editor.constant`, which keeps a copy of the values to find equal ones."""
        return gs.Constant(self.edit.fresh(f"{name}/twins"), values)

    def view(self, tensor: gs.Tensor, shape: list[int]) -> gs.Tensor:
        """`tensor` reshaped, where it has not that shape. -1 stands for at most one dynamic dimension."""
        if dims(tensor) == _stated(shape):
            return tensor
        key = (tensor.name, tuple(shape))
        if key not in self._views:
            target = self.edit.integers(shape, "twins/shape")
            self._views[key] = self.edit.node(
                "Reshape", [tensor, target], name=f"{tensor.name}/view", dtype=tensor.dtype, shape=_stated(shape)
            )
        return self._views[key]

    def stacked(self, value: Twins) -> gs.Tensor:
        """As (2, elements / C, C), where C is the last dimension."""
        value = self.front(value)
        width = value.shape[-1]
        if not isinstance(width, int):
            raise Refusal(f"the last dimension of {value.tensor.name} is dynamic")
        return self.view(value.tensor, [2, _size(value.shape[:-1]), width])

    def rows(self, value: Twins) -> Twins:
        """In any layout whose last axis is the last one of a view."""
        intact = known_shape(value.tensor)[-1] == value.shape[-1] if value.axis == 0 else value.axis < len(value.shape) - 1
        return value if intact else Twins(self.stacked(value), value.shape)

    def joined(self, value: Value, axis: int, name: str) -> gs.Tensor:
        """As Concat(axis) of the two views. What both share is doubled; `name` is for what that makes."""
        if isinstance(value, Constants):
            return self.weight(np.concatenate([value.first, value.second], axis), name)
        if isinstance(value, Shared):
            return self._double(value.tensor, axis, name)
        if value.axis == axis > 0:
            return value.tensor
        value, target = self.front(value), joined_shape(value.shape, axis)
        if axis == 0:
            return self.view(value.tensor, target)
        before, after = (_size(part) for part in (value.shape[:axis], value.shape[axis:]))
        if before == 1:
            return self.view(value.tensor, target)
        split = self.view(value.tensor, [2, before, after])
        swapped = self._swap(split, [before, 2, after])
        return self.view(swapped, target)

    def front(self, value: Twins) -> Twins:
        """Joined along axis 0."""
        if value.axis == 0:
            return value
        as_sizes(value.shape)
        before, after = (_size(part) for part in (value.shape[: value.axis], value.shape[value.axis :]))
        if before == 1:
            return Twins(value.tensor, value.shape)
        if value.tensor.name not in self._fronts:
            split = self.view(value.tensor, [before, 2, after])
            self._fronts[value.tensor.name] = self._swap(split, [2, before, after])
        return Twins(self._fronts[value.tensor.name], value.shape)

    def clear_of(self, value: Twins, axes: set[int], node: gs.Node) -> Twins:
        """Joined along an axis that is none of `axes`, those that `node` works along."""
        if value.axis in axes:
            value = self.front(value)
        if value.axis in axes:
            raise Refusal(f"{label(node)} ({node.op}) works along the axis that the views are joined on")
        return value

    def flip(self, value: Value) -> Value:
        """The two views changed for each other."""
        if isinstance(value, Constants):
            return Constants(value.name, value.second, value.first)
        if isinstance(value, Shared):
            return value
        value = self.front(value)
        tensor = value.tensor if known_shape(value.tensor)[0] == 2 else self.stacked(value)
        flipped = self.edit.node(
            "Gather",
            [tensor, self.edit.integers([1, 0], "twins/flip")],
            name=f"{tensor.name}/flip",
            dtype=tensor.dtype,
            shape=dims(tensor),
            axis=0,
        )
        return Twins(flipped, value.shape)

    def _double(self, tensor: gs.Tensor, axis: int, name: str) -> gs.Tensor:
        key = (tensor.name, axis)
        if key not in self._doubled:
            if isinstance(tensor, gs.Constant):
                self._doubled[key] = self.edit.constant(np.concatenate(2 * [tensor.values], axis), f"{tensor.name}/twins")
            else:
                self._doubled[key] = self._concat(tensor, tensor, axis, name)
        return self._doubled[key]

    def _concat(self, first: gs.Tensor, second: gs.Tensor, axis: int, name: str) -> gs.Tensor:
        shape = _stated(joined_shape(known_shape(first), axis))
        return self.edit.node("Concat", [first, second], name=name, dtype=first.dtype, shape=shape, axis=axis)

    def _swap(self, tensor: gs.Tensor, shape: list[int]) -> gs.Tensor:
        name = f"{tensor.name}/swap"
        return self.edit.node("Transpose", [tensor], name=name, dtype=tensor.dtype, shape=_stated(shape), perm=[1, 0, 2])


def joined_shape(shape: Sequence[Dim], axis: int) -> list[int]:
    """The shape of two tensors of `shape` joined along `axis`, as a Reshape takes it."""
    return [2 * size if i == axis and size > 0 else size for i, size in enumerate(as_sizes(shape))]


def as_sizes(shape: Sequence[Dim]) -> list[int]:
    """A shape as a Reshape takes it: with -1 for the one dimension that may be dynamic."""
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    if sizes.count(-1) > 1:
        raise Refusal(f"more than one dimension of {list(shape)} is dynamic")
    return sizes


def _size(shape: Sequence[Dim]) -> int:
    """The number of elements, -1 where it is dynamic."""
    sizes = as_sizes(shape)
    return -1 if -1 in sizes else math.prod(sizes)


def _stated(shape: Sequence[int]) -> list[Dim]:
    """As a tensor's shape is stated: nothing is known of a dynamic dimension, which is of two views and so has a new size."""
    return [None if size == -1 else size for size in shape]
