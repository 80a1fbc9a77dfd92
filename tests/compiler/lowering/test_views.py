"""Views against numpy: random rows of operations on one array, and what the lowering asks of the results."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from smc.compiler.lowering.views import Buffer, CannotView, Factor, View, alike, contiguous, flipped, joined, refine, strides_along

Ints = NDArray[np.int64]
Both = tuple[View, Ints]
"""A view, and the array that it must be: of a buffer that holds 0, 1, 2, .."""

SIZES = (1, 2, 3, 4, 6)


def whole(shape: Sequence[int], name: str = "buffer") -> Both:
    size = int(np.prod(shape))
    return contiguous(Buffer(name, "int64", size), shape), np.arange(size).reshape(shape)


def elements(view: View) -> Ints:
    """Where each element lies."""
    found = np.full(view.shape, view.offset)
    for axis, dim in enumerate(view.dims):
        places = along(dim, 0).reshape([-1 if i == axis else 1 for i in range(len(view.dims))])
        found = found + places
    return found


def along(loops: Sequence[Factor], offset: int) -> Ints:
    """Where loops of (size, stride) go, outermost first."""
    found = np.array([offset])
    for size, stride in loops:
        found = (found[:, None] + np.arange(size) * stride).reshape(-1)
    return found


def transposed(view: View, array: Ints, choose: random.Random) -> Both:
    order = choose.sample(range(array.ndim), array.ndim)
    return view.transpose(order), array.transpose(order)


def reshaped(view: View, array: Ints, choose: random.Random) -> Both:
    left, shape = array.size, [1] * choose.randint(0, 2)
    while left > 1 and len(shape) < 4:
        shape.append(choose.choice([size for size in (2, 3, 4, 6, left) if left % size == 0]))
        left //= shape[-1]
    shape.append(left)
    choose.shuffle(shape)
    return view.reshape(shape), array.reshape(shape)


def sliced(view: View, array: Ints, choose: random.Random) -> Both:
    axis = choose.randrange(array.ndim)
    start, step = choose.randrange(array.shape[axis]), choose.choice([1, 1, 2])
    count = choose.randint(1, -(-(array.shape[axis] - start) // step))
    return view.slice(axis, start, count, step), array.take(range(start, start + count * step, step), axis)


def reversed_along(view: View, array: Ints, choose: random.Random) -> Both:
    axis = choose.randrange(array.ndim)
    order = list(range(array.shape[axis]))[:: choose.choice([1, -1, -2, 2])]
    return flipped(view, axis, order), array.take(order, axis)


def expanded(view: View, array: Ints, choose: random.Random) -> Both:
    shape = [choose.choice([2, 3])] * choose.randint(0, 1) + [size if size > 1 else choose.choice([1, 3]) for size in array.shape]
    return view.expand(shape), np.broadcast_to(array, shape)


STEPS: Sequence[Callable[[View, Ints, random.Random], Both]] = (transposed, reshaped, sliced, reversed_along, expanded)


def chains(count: int) -> Iterator[Both]:
    """Rows of up to five operations, those left out that take a copy."""
    choose = random.Random(0)
    for _ in range(count):
        view, array = whole([choose.choice(SIZES) for _ in range(choose.randint(1, 4))])
        for _ in range(choose.randint(1, 5)):
            try:
                view, array = choose.choice(STEPS)(view, array, choose)
            except CannotView:
                continue
        yield view, array


def test_every_operation_is_numpys() -> None:
    for view, array in chains(2000):
        assert view.shape == array.shape
        np.testing.assert_array_equal(elements(view), array)
        np.testing.assert_array_equal(view.as_array(np.arange(view.buffer.size)), array)
        if view.is_contiguous():
            np.testing.assert_array_equal(array.reshape(-1), view.offset + np.arange(array.size))


def test_no_single_operation_on_contiguous_memory_takes_a_copy() -> None:
    choose = random.Random(1)
    refused = []
    for _ in range(1000):
        view, array = whole([choose.choice(SIZES) for _ in range(choose.randint(1, 4))])
        step = choose.choice(STEPS)
        try:
            step(view, array, choose)
        except CannotView:
            refused.append(step)
    assert refused == []


def test_refined_loops_visit_all_views_alike() -> None:
    found = 0
    for view, array in chains(1000):
        other, _ = whole(array.shape, "other")
        try:
            loops = refine([other, view])
        except CannotView:
            continue
        first = along([(size, strides[0]) for size, strides in loops], other.offset)
        second = along([(size, strides[1]) for size, strides in loops], view.offset)
        np.testing.assert_array_equal(array.reshape(-1)[first], second)
        assert sorted(first) == list(range(array.size))
        assert all(a != tuple(s * size for s in b) for (_, a), (size, b) in itertools.pairwise(loops)), "loops that could be one"
        found += 1
    assert found > 800


def test_strides_along_the_axes_of_other_memory() -> None:
    found = 0
    for view, array in chains(1000):
        layout, _ = whole(array.shape, "layout")
        axes = [factor for dim in layout.dims for factor in dim]
        try:
            strides = strides_along(axes, layout, view)
        except CannotView:
            continue
        steps = [(size, stride) for (size, _), stride in zip(axes, strides, strict=True)]
        np.testing.assert_array_equal(along(steps, view.offset), array.reshape(-1))
        found += 1
    assert found > 500


def test_strides_along_axes_that_a_tensor_does_not_show() -> None:
    """A product's memory is (groups, rows, channels); the tensor may have the groups behind, and rows of rows."""
    groups, rows, cols, channels = 2, 3, 5, 4
    memory, _ = whole((groups, rows, cols, channels))
    tensor = memory.transpose((1, 2, 0, 3)).reshape((rows, cols, groups * channels))
    axes = [(groups, rows * cols * channels), (rows * cols, channels), (channels, 1)]
    other, _ = whole((rows, cols, groups * channels), "other")
    assert strides_along(axes, tensor, other) == [channels, groups * channels, 1]
    bias, _ = whole((groups * channels,), "bias")
    assert strides_along(axes, tensor, bias.expand(tensor.shape)) == [channels, 0, 1]
    by_column, _ = whole((cols, 1), "by column")
    with pytest.raises(CannotView):
        strides_along(axes, tensor, by_column.expand(tensor.shape))


def test_parts_are_joined_where_they_lie_evenly() -> None:
    view, array = whole((4, 6, 5))
    for axis, size in enumerate(array.shape):
        singles = [view.slice(axis, i, 1) for i in range(size)]
        assert elements(joined(singles, axis)).tolist() == array.tolist()
        assert elements(joined(singles[::-1], axis)).tolist() == np.flip(array, axis).tolist()
    halves = [view.slice(1, 0, 3), view.slice(1, 3, 3)]
    assert joined(halves, 1) == view
    assert elements(joined(halves, 0)).tolist() == np.concatenate([array[:, :3], array[:, 3:]]).tolist()
    assert elements(joined([view, view], 2)).tolist() == np.concatenate([array, array], 2).tolist()


def test_parts_that_do_not_lie_evenly_are_not_joined() -> None:
    view, _ = whole((4, 6))
    other, _ = whole((4, 6), "other")
    for parts in (
        [view, other],
        [view.slice(0, 0, 1), view.slice(0, 1, 3)],
        [view.slice(0, 0, 1), view.slice(0, 1, 1), view.slice(0, 3, 1)],
        [view.reshape((6, 4)), view.reshape((2, 3, 4)).transpose((1, 0, 2)).reshape((6, 4))],
    ):
        with pytest.raises(CannotView):
            joined(parts, 0)


def test_what_takes_a_copy() -> None:
    view, _ = whole((4, 6))
    with pytest.raises(CannotView):
        view.transpose((1, 0)).reshape((8, 3))
    with pytest.raises(CannotView):
        flipped(view, 1, [0, 1, 3])
    both = view.reshape((2, 2, 6)).transpose((1, 0, 2)).reshape((4, 6))
    with pytest.raises(CannotView):
        both.slice(0, 1, 2)
    assert elements(both.slice(0, 2, 2)).tolist() == [[6, 7, 8, 9, 10, 11], [18, 19, 20, 21, 22, 23]]
    assert not view.transpose((1, 0)).is_contiguous()
    assert view.slice(0, 1, 2).is_contiguous()


def test_memory_in_the_same_order_without_gaps() -> None:
    view, _ = whole((4, 6, 5))
    other = Buffer("other", "int64", 60)
    maps = view.slice(1, 1, 3).transpose((2, 0, 1))
    made = alike(maps, other)
    assert made.shape == (5, 4, 3)
    assert made.dims == (((5, 1),), ((4, 15),), ((3, 5),))
    twins = view.reshape((2, 2, 6, 5)).transpose((1, 0, 2, 3)).reshape((2, 60))
    assert alike(twins, other).dims == twins.dims
    assert alike(view.slice(0, 0, 1).expand((2, 6, 5)), other).is_contiguous()
    for chain, expected in chains(300):
        made = alike(chain, Buffer("made", "int64", expected.size))
        assert made.shape == expected.shape
        assert sorted(elements(made).reshape(-1)) == list(range(expected.size))
