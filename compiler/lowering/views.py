"""Tensors as views of memory: reshapes, transpositions, slices and the like without moving anything.

A dimension of a view is a row of factors (size, stride), outermost first, since a reshape may join what is not adjacent: a tensor of two
views' channels, (2 * C), is the factors (2, stride from view to view) and (C, 1).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Factor = tuple[int, int]
"""Size, and stride in elements, which may be negative, or 0 for a broadcast."""

Dim = tuple[Factor, ...]


class CannotView(Exception):
    """The result cannot be expressed as a view of the same memory: it takes a copy."""


@dataclass(eq=False)
class Buffer:
    """Memory for a tensor.

    Attributes:
        name: for messages.
        dtype: element type, as numpy names it, or "bfloat16".
        size: elements.
        values: of a constant; None for what is computed.
    """

    name: str
    dtype: str
    size: int
    values: NDArray[Any] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class View:
    """A tensor that lies in a buffer: `offset` elements from its start, one `Dim` for each dimension."""

    buffer: Buffer
    offset: int
    dims: tuple[Dim, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(size for size, _ in dim) for dim in self.dims)

    @property
    def dtype(self) -> str:
        return self.buffer.dtype

    def reshape(self, shape: Sequence[int]) -> View:
        """Raises CannotView where a factor would have to be cut unevenly."""
        left = list(self.flat())
        dims = []
        for size in shape:
            factors = []
            wanted = size
            while wanted > 1:
                if not left:
                    raise CannotView
                have, stride = left.pop(0)
                if wanted % have == 0:
                    factors.append((have, stride))
                    wanted //= have
                elif have % wanted == 0:
                    inner = have // wanted
                    factors.append((wanted, stride * inner))
                    left.insert(0, (inner, stride))
                    wanted = 1
                else:
                    raise CannotView
            dims.append(_merged(factors))
        return replace(self, dims=tuple(dims))

    def transpose(self, order: Sequence[int]) -> View:
        return replace(self, dims=tuple(self.dims[axis] for axis in order))

    def slice(self, axis: int, start: int, count: int, step: int = 1) -> View:
        """`count` elements of an axis from `start`, every `step`-th. Raises CannotView where its factors do not allow it."""
        offset, dim = _slice(self.dims[axis], start, count, step)
        return replace(self, offset=self.offset + offset, dims=(*self.dims[:axis], dim, *self.dims[axis + 1 :]))

    def expand(self, shape: Sequence[int]) -> View:
        """Broadcast to a shape, as numpy does."""
        dims = list(self.reshape((1,) * (len(shape) - len(self.dims)) + self.shape).dims)
        for axis, (dim, size) in enumerate(zip(dims, shape, strict=True)):
            if math.prod(factor[0] for factor in dim) != size:
                dims[axis] = ((size, 0),)
        return replace(self, dims=tuple(dims))

    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return self.flat() == ((self.size, 1),) or self.size == 1

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def flat(self, first: int = 0, last: int | None = None) -> Dim:
        """The dimensions from `first` up to `last` as one."""
        return _merged([factor for dim in self.dims[first:last] for factor in dim])

    def as_array(self, values: NDArray[Any]) -> NDArray[Any]:
        """The tensor, given its buffer's values."""
        flat = values.reshape(-1)[self.offset :] if self.offset else values.reshape(-1)
        sizes = [size for dim in self.dims for size, _ in dim]
        strides = [stride * flat.itemsize for dim in self.dims for _, stride in dim]
        return np.lib.stride_tricks.as_strided(flat, sizes, strides).reshape(self.shape)


def contiguous(buffer: Buffer, shape: Sequence[int], offset: int = 0) -> View:
    """A buffer as a row-major tensor."""
    dims: list[Dim] = []
    stride = 1
    for size in reversed(shape):
        dims.append(((size, stride),) if size > 1 else ())
        stride *= size
    return View(buffer, offset, tuple(reversed(dims)))


def alike(view: View, buffer: Buffer) -> View:
    """A tensor of a view's shape without gaps in a buffer, its dimensions in the order that the view's have in memory."""
    factors = [(stride, axis, i, size) for axis, dim in enumerate(view.dims) for i, (size, stride) in enumerate(dim)]
    if any(stride <= 0 for stride, *_ in factors):
        return contiguous(buffer, view.shape)
    dims = [list(dim) for dim in view.dims]
    step = 1
    for _, axis, i, size in sorted(factors):
        dims[axis][i] = (size, step)
        step *= size
    return View(buffer, 0, tuple(map(_merged, dims)))


def joined(views: Sequence[View], axis: int) -> View:
    """Views that lie one behind the other in one buffer, as one. Raises CannotView if they do not."""
    first = views[0]
    counts = {view.shape[axis] for view in views}
    rest = [{view.dims[i] for view in views} for i in range(len(first.dims)) if i != axis]
    steps = {b.offset - a.offset for a, b in itertools.pairwise(views)}
    if len({id(view.buffer) for view in views}) > 1 or len(counts) > 1 or any(len(dims) > 1 for dims in rest) or len(steps) > 1:
        raise CannotView
    if len({view.dims[axis] for view in views}) > 1:
        raise CannotView
    dim = _merged([(len(views), steps.pop()), *first.dims[axis]]) if steps else first.dims[axis]
    return replace(first, dims=(*first.dims[:axis], dim, *first.dims[axis + 1 :]))


def _merged(factors: Sequence[Factor]) -> Dim:
    """Without factors of 1, and neighbours that make one factor made one."""
    merged: list[Factor] = []
    for size, stride in factors:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride and merged[-1][1] != 0:
            merged[-1] = (merged[-1][0] * size, stride)
        elif merged and merged[-1][1] == 0 and stride == 0:
            merged[-1] = (merged[-1][0] * size, 0)
        else:
            merged.append((size, stride))
    return tuple(merged)


def _slice(dim: Dim, start: int, count: int, step: int) -> tuple[int, Dim]:
    """Offset and factors of a part of a dimension."""
    if count == 1:
        return _position(dim, start), ()
    if len(dim) == 1:
        ((_, stride),) = dim
        return start * stride, ((count, step * stride),)
    (_, stride), *rest = dim
    inner = math.prod(size for size, _ in rest)
    if start // inner == (start + (count - 1) * step) // inner and start >= 0:
        offset, part = _slice(tuple(rest), start % inner, count, step)
        return offset + start // inner * stride, part
    if step == 1 and start % inner == 0 and count % inner == 0:
        return start // inner * stride, _merged([(count // inner, stride), *rest])
    raise CannotView


def _position(dim: Dim, index: int) -> int:
    offset = 0
    for size, stride in reversed(dim):
        index, remainder = divmod(index, size)
        offset += remainder * stride
    return offset


def flipped(view: View, axis: int, order: Sequence[int]) -> View:
    """Along an axis the elements at `order`, which must be evenly spaced. Raises CannotView."""
    count = len(order)
    step = order[1] - order[0] if count > 1 else 1
    if any(b - a != step for a, b in itertools.pairwise(order)):
        raise CannotView
    if step > 0:
        return view.slice(axis, order[0], count, step)
    dim = view.dims[axis]
    if len(dim) == 1:
        ((_, stride),) = dim
        part = ((count, step * stride),)
        return replace(view, offset=view.offset + order[0] * stride, dims=(*view.dims[:axis], part, *view.dims[axis + 1 :]))
    raise CannotView


def refine(views: Sequence[View]) -> list[tuple[int, tuple[int, ...]]]:
    """Views of one shape as common loops, outermost first: (size, each view's stride). Loops that go on for all views are made one.

    Raises CannotView where their factors have no common refinement.
    """
    merged: list[tuple[int, tuple[int, ...]]] = []
    for dims in zip(*(view.dims for view in views), strict=True):
        for size, strides in _refine_dim(dims):
            if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides, strict=True)):
                merged[-1] = (merged[-1][0] * size, strides)
            else:
                merged.append((size, strides))
    return merged


def _refine_dim(dims: Sequence[Dim]) -> list[tuple[int, tuple[int, ...]]]:
    left = [list(dim) for dim in dims]
    loops = []
    while any(left):
        if not all(left):
            raise CannotView
        size = min(dim[-1][0] for dim in left)
        strides = []
        for dim in left:
            have, stride = dim.pop()
            if have % size:
                raise CannotView
            strides.append(stride)
            if have > size:
                dim.append((have // size, stride * size))
        loops.append((size, tuple(strides)))
    return loops[::-1]


def strides_along(axes: Sequence[Factor], layout: View, other: View) -> list[int]:
    """The strides of `other`, a tensor of `layout`'s shape, along the axes of the memory that `layout` covers.

    Args:
        axes: (size, stride) in elements of `layout`'s buffer, such as group, row and channel, outermost first. Together they are the
            whole of `layout`, each element once.
        layout: the tensor that lies along the axes.
        other: the one that is wanted along them.

    Raises:
        CannotView: it does not go along an axis in equal steps.
    """
    loops = refine([layout, other])
    for _, stride in axes:  # no loop may go on from one axis to the next
        loops = [part for loop in loops for part in _cut(loop, stride)]
    found = []
    for size, stride in axes:
        inside = sorted((loop for loop in loops if stride <= loop[1][0] < stride * size), key=lambda loop: -loop[1][0])
        dim = _merged([(count, theirs) for count, (_, theirs) in inside])
        if math.prod(count for count, _ in inside) != size or len(dim) > 1:
            raise CannotView
        found.append(dim[0][1] if dim else 0)
    return found


def _cut(loop: tuple[int, tuple[int, ...]], stride: int) -> list[tuple[int, tuple[int, ...]]]:
    """A loop that steps over `stride` in the first view's memory, as one that does not and one that starts there."""
    count, strides = loop
    if not strides[0] < stride < strides[0] * count:
        return [loop]
    inner = stride // strides[0]
    if strides[0] * inner != stride or count % inner:
        raise CannotView
    return [(count // inner, tuple(step * inner for step in strides)), (inner, strides)]
