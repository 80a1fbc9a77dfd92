"""Operations that move data: views wherever memory allows, copies elsewhere."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import CannotLower, Context, dtype_name
from smc.compiler.lowering.views import Buffer, CannotView, View, alike, flipped, joined
from smc.passes.base import label
from smc.passes.tensors import constant_value, slices, split_starts, transposition

Move = Callable[[gs.Node, View], list[View]]
"""From a node and the view of its data to the views of its outputs. Raises CannotView where it takes a copy."""


def lower_movement(context: Context, node: gs.Node) -> None:
    """One of `MOVES`: its outputs become views, of a copy if need be."""
    move = MOVES[node.op]
    views = context.or_copy(context.view(node.inputs[0]), node, lambda view: move(node, view))
    for tensor, view in zip(node.outputs, views, strict=True):
        context.bind(tensor, view)
    context.finish(node)


def lower_concat(context: Context, node: gs.Node) -> None:
    """Side by side already, as the two features of a pair are, or copied there."""
    (out,) = node.outputs
    axis = node.attrs["axis"] % len(out.shape)
    views = [context.view(tensor) for tensor in node.inputs]
    try:
        context.bind(out, joined(views, axis))
    except CannotView:
        whole = context.new(out)
        start = 0
        for view in views:
            count = view.shape[axis]
            part = whole.slice(axis, start, count)
            context.or_copy(view, node, partial(context.copy, to=part, node=node))
            start += count
        context.bind(out, whole)
    context.finish(node)


def lower_cast(context: Context, node: gs.Node) -> None:
    """To a wider type nothing is done: every kernel reads narrower operands. To a narrower one the values must be rounded."""
    (out,) = node.outputs
    view = context.view(node.inputs[0])
    if (view.dtype, dtype_name(out)) in _WIDENING or view.dtype == dtype_name(out):
        context.bind(out, view)
    else:
        result = alike(view, Buffer(out.name, dtype_name(out), view.size))
        context.or_copy(view, node, lambda source: context.copy(source, result, node))
        context.bind(out, result)
    context.finish(node)


_WIDENING = {("float16", "float32"), ("bfloat16", "float32")}


@dataclass(frozen=True, eq=False)
class Read:
    """A node that reads a tensor, perhaps through movements: which of its inputs that is, where it lies, and the nodes passed."""

    node: gs.Node
    index: int
    view: View
    passed: tuple[gs.Node, ...]


def reads(tensor: gs.Tensor, view: View, through_casts: bool = False, passed: tuple[gs.Node, ...] = ()) -> Iterator[Read]:
    """Everything but movements that reads a tensor, which lies in `view`. Raises CannotView where a movement takes a copy."""
    for node in {id(node): node for node in tensor.outputs}.values():
        index = next(i for i, given in enumerate(node.inputs) if given is tensor)
        if node.op in MOVES and index == 0:
            for output, moved in zip(node.outputs, MOVES[node.op](node, view), strict=True):
                yield from reads(output, moved, through_casts, (*passed, node))
        elif node.op == "Cast" and through_casts:
            yield from reads(node.outputs[0], view, through_casts, (*passed, node))
        else:
            yield Read(node, index, view, passed)


def _reshape(node: gs.Node, view: View) -> list[View]:
    return [view.reshape(node.outputs[0].shape)]


def _transpose(node: gs.Node, view: View) -> list[View]:
    order = transposition(node)
    assert order is not None  # every shape is static
    return [view.transpose(order)]


def _slice(node: gs.Node, view: View) -> list[View]:
    chosen = slices(node)
    if chosen is None:
        raise CannotLower(f"{label(node)} (Slice): its bounds are not constants")
    for axis, part in chosen.items():
        view = flipped(view, axis, range(view.shape[axis])[part])
    return [view]


def _split(node: gs.Node, view: View) -> list[View]:
    axis = node.attrs.get("axis", 0) % len(view.dims)
    starts = split_starts(node, view.shape[axis])
    if starts is None:
        raise CannotLower(f"{label(node)} (Split): its sizes are not constants")
    return [view.slice(axis, start, end - start) for start, end in itertools.pairwise(starts)]


def _gather(node: gs.Node, view: View) -> list[View]:
    indices = constant_value(node.inputs[1])
    axis = node.attrs.get("axis", 0) % len(view.dims)
    if indices is None:
        raise CannotLower(f"{label(node)} (Gather): its indices are not constants")
    indices = np.where(indices < 0, indices + view.shape[axis], indices)
    if indices.ndim > 1:
        raise CannotView
    return [flipped(view, axis, indices.reshape(-1).tolist()).reshape(node.outputs[0].shape)]


def _depth_to_space(node: gs.Node, view: View) -> list[View]:
    block = node.attrs["blocksize"]
    batch, channels, height, width = view.shape
    inner = channels // block**2
    if node.attrs.get("mode", "DCR") == "CRD":
        parts = view.reshape((batch, inner, block, block, height, width)).transpose((0, 1, 4, 2, 5, 3))
    else:
        parts = view.reshape((batch, block, block, inner, height, width)).transpose((0, 3, 4, 1, 5, 2))
    return [parts.reshape(node.outputs[0].shape)]


def _expand(node: gs.Node, view: View) -> list[View]:
    return [view.expand(node.outputs[0].shape)]


def _identity(node: gs.Node, view: View) -> list[View]:
    return [view]


MOVES: dict[str, Move] = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten"), _reshape),
    "Transpose": _transpose,
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Identity": _identity,
}
