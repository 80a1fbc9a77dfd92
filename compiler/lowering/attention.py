"""Attention, whose operands are parts of the buffers that products wrote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import CannotLower, Context, aligned, constant, dtype_name, stride, unit
from smc.compiler.lowering.rotation import Rotations, rotation_before, rotation_uses, tables
from smc.compiler.lowering.views import Buffer, CannotView, View, contiguous
from smc.passes.base import label
from smc.passes.tensors import has_input
from smc.plugins.flash_attention.launches import Attention, Heads
from smc.plugins.flash_attention.specification import HEAD_SIZES


@dataclass(frozen=True)
class _Operand:
    buffer: Buffer
    heads: Heads
    shift: int
    """Images by which a batch is turned: image b of the operand is image (b + shift) % batch of what `heads` says."""


def lower_attention(context: Context, node: gs.Node, rotations: Rotations) -> None:
    """One Attention of q, k and v (B, H, N, D), and the rotations of q and k that their products could not do."""
    _check(node)
    q, k, v = node.inputs[:3]
    dtype = dtype_name(q)
    batch, heads, n, size = q.shape
    turns = [rotation_before(tensor) for tensor in (q, k)]
    angles = [tables(turn) if turn is not None and not rotations.is_done(turn) else None for turn in turns]
    rotates = all(pair is not None for pair in angles)
    table_type = np.result_type(*(table for pair in angles if pair is not None for table in pair)) if rotates else None
    if rotates:
        q, k = (turn.inputs[0] for turn in turns if turn is not None)
    operands = {name: _operand(context, node, tensor, dtype) for name, tensor in zip("qkv", (q, k, v), strict=True)}
    if operands["q"].shift or operands["k"].shift != operands["v"].shift:
        operands = {name: _straight(context, node, tensor, dtype) for name, tensor in zip("qkv", (q, k, v), strict=True)}
    (out,) = node.outputs[:1]
    # The order (B, N, H, D) is what the product behind it reads.
    result = contiguous(Buffer(out.name, dtype, batch * heads * n * size), (batch, n, heads, size))
    operation = Attention(
        batch=batch, heads=heads, n=n, m=k.shape[2], head_size=size, scale=node.attrs.get("scale", size**-0.5), dtype=dtype,
        **{name: operand.heads for name, operand in operands.items()},
        out=Heads(batch=n * heads * size, row=heads * size, head=size),
        tables=None if table_type is None else table_type.name,  # type: ignore[arg-type]
        kv_shift=operands["k"].shift,
    )  # fmt: skip
    buffers: dict[str, Buffer | None] = {"out": result.buffer, **{name: operand.buffer for name, operand in operands.items()}}
    if rotates:
        for name, pair in zip("qk", angles, strict=True):
            assert pair is not None
            for table, values in zip(("cos", "sin"), pair, strict=True):
                buffers[f"{table}_{name}"] = constant(f"{label(node)}/{table}_{name}", values.astype(table_type)).buffer
    context.call(operation, buffers, ["out"], node)
    context.bind(out, result.transpose((0, 2, 1, 3)))
    context.finish(node)


def lower_rotary(context: Context, node: gs.Node, rotations: Rotations) -> None:
    """A rotation that a product did, or that attention does: its output is bound where its input lies, or to nothing."""
    (out,) = node.outputs
    if rotations.is_done(node):
        context.bind(out, context.view(node.inputs[0]))
    elif tables(node) is None or not _is_paired(context.graph, node):
        raise CannotLower(f"{label(node)} (RotaryEmbedding): only rotations of both q and k by constant tables are possible")
    else:
        casts = list(out.outputs)
        while casts:  # the attention casts what it rotates
            cast = casts.pop()
            if cast.op == "Cast":
                context.finish(cast)
                casts += cast.outputs[0].outputs
    context.finish(node)


def _is_paired(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether attention alone reads a rotation, as q or k, and has one for its other operand, too."""
    uses = rotation_uses(graph, node)
    return bool(uses) and all(
        reader.op == "Attention" and i < 2 and all(rotation_before(tensor) is not None for tensor in reader.inputs[:2])
        for reader, i in uses
    )


def _operand(context: Context, node: gs.Node, tensor: gs.Tensor, dtype: str) -> _Operand:
    view = context.operand(tensor, node, dtype)
    try:
        return _heads(*_turned(view))
    except CannotView:
        return _straight(context, node, tensor, dtype)


def _straight(context: Context, node: gs.Node, tensor: gs.Tensor, dtype: str) -> _Operand:
    """An operand whose images lie in their order; a copy if need be."""
    view = context.operand(tensor, node, dtype)
    try:
        return _heads(view, 0)
    except CannotView:
        copy = context.or_copy(view.transpose((0, 2, 1, 3)), node, lambda source: context.copied(source, node))
        return _heads(copy.transpose((0, 2, 1, 3)), 0)


def _turned(view: View) -> tuple[View, int]:
    """A view whose two halves of the batch lie the other way round, as the other view's keys do, as one in order, and the shift."""
    batch = view.dims[0]
    if not batch or batch[0][0] != 2 or batch[0][1] >= 0:
        return view, 0
    (_, back), *inner = batch
    straight = View(view.buffer, view.offset + back, (((2, -back), *inner), *view.dims[1:]))
    merged = straight.reshape(straight.shape)
    return merged, view.shape[0] // 2


def _heads(view: View, shift: int) -> _Operand:
    batch, head, row, channel = view.dims
    unit(channel)
    steps = (stride(batch), stride(row), stride(head))
    aligned(view, *steps)
    return _Operand(view.buffer, Heads(batch=steps[0], row=steps[1], head=steps[2], offset=view.offset), shift)


def _check(node: gs.Node) -> None:
    more = any(has_input(node, i) for i in range(3, len(node.inputs))) or any(tensor.outputs for tensor in node.outputs[1:])
    shape = node.inputs[0].shape
    if more or node.attrs.get("is_causal") or node.attrs.get("softcap") or len(shape) != 4:
        raise CannotLower(f"{label(node)} (Attention): only plain attention of (batch, heads, tokens, channels) is possible")
    others = [(tensor.shape[1], tensor.shape[3]) for tensor in node.inputs[1:3]]
    if shape[3] not in HEAD_SIZES or set(others) != {(shape[1], shape[3])}:
        raise CannotLower(
            f"{label(node)} (Attention): {shape[1]} heads of {shape[3]} channels, k and v {others}; "
            f"{HEAD_SIZES} channels are possible, as many heads and channels in all"
        )
