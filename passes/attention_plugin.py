"""AttentionPlugin: attention becomes the custom operation that TensorRT runs with this project's kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal
from smc.passes.tensors import (
    Editor,
    constant_value,
    dims,
    has_input,
    is_made_up,
    is_output,
    producer,
    rank,
    slices,
    split_starts,
    static_dim,
    transposition,
)
from smc.plugins.flash_attention.specification import DOMAIN, HEAD_SIZES, NAME

_TYPES = (np.dtype(np.float16), onnx.TensorProto.BFLOAT16)
_ALIGNMENT = 16  # of the operands' channel counts and offsets
_HEADS_AND_TOKENS = [0, 2, 1, 3]  # (B, H, N, D) <-> (B, N, H, D)
_PARSER_ATTRIBUTES = {"plugin_namespace": DOMAIN, "aot": 1}
"""Read by TensorRT's parser and by nothing else: where the plugin is registered, and that its compiled form is wanted."""

Axis = str | tuple[int, int]
"""What an axis runs over: "batch", "tokens", or channels, as (size, stride)."""


class AttentionPlugin(Pass):
    """`Attention` in float16 or bfloat16 becomes smc::FlashAttention (plugins/flash_attention/specification.py).

    Before: out (B, H, N, D) = Attention(q, k, v), where q, k and v are mostly parts of one projection (B, N, C), taken apart by
    Reshape, Transpose, Slice, Split, Squeeze and Gather in any order.
    After: out = Transpose(Reshape(FlashAttention(p, p, p, q_offset=..., ...))): operands that are parts of a projection are read in
    place; others, such as those that RotaryEmbedding made, get a Transpose and a Reshape.

    Run CancelLayout after it: the Transpose and Reshape of the result mostly cancel with those that follow it. Before, every
    tensor must have its final type. Only TensorRT's parser understands the graph, with the plugin registered.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        for node in [node for node in graph.nodes if node.op == "Attention"]:
            with report.attempt(node):
                heads, size, scale = _check(graph, node)
                _replace(edit, node, heads, size, scale)
                report.rewrites += 1
        if report.rewrites:
            graph.import_domains = [*(graph.import_domains or ()), onnx.helper.make_opsetid(DOMAIN, 1)]


def _check(graph: gs.Graph, node: gs.Node) -> tuple[int, int, float]:
    """Heads, head size and scale of an attention that the kernel can do."""
    if any(has_input(node, i) for i in range(3, len(node.inputs))) or node.attrs.get("is_causal") or node.attrs.get("softcap"):
        raise Refusal("it has a mask, a cache or a cap of the scores, and the kernel does plain attention")
    if any(tensor.outputs or is_output(graph, tensor) for tensor in node.outputs[1:]):
        raise Refusal("it has outputs besides the first, and the kernel makes that one alone")
    operands = dict(zip("qkv", node.inputs[:3], strict=True))
    types = [tensor.dtype for tensor in operands.values()]
    if types[0] not in _TYPES or types != 3 * [types[0]]:
        raise Refusal(f"q, k and v are of type {', '.join(map(str, types))}; the kernel takes float16 or bfloat16, all alike")
    if any(rank(tensor) != 4 for tensor in operands.values()):
        found = ", ".join(f"{name} {dims(tensor) or 'unknown'}" for name, tensor in operands.items())
        raise Refusal(f"q, k and v must have four dimensions (batch, heads, tokens, channels), and have {found}")
    shapes = {(static_dim(tensor, 1), static_dim(tensor, 3)) for tensor in operands.values()}
    heads, size = shapes.pop()
    if shapes or heads is None or size is None:
        found = ", ".join(f"{name} {static_dim(tensor, 1)} of {static_dim(tensor, 3)}" for name, tensor in operands.items())
        raise Refusal(f"heads and their sizes must be known and equal, and are {found}")
    if size not in HEAD_SIZES:
        raise Refusal(f"the head size is {size}, and the kernel takes {', '.join(map(str, HEAD_SIZES))}")
    scale = node.attrs.get("scale", 1 / math.sqrt(size))
    if not scale > 0:
        raise Refusal(f"the scale is {scale}, and the kernel takes positive ones")
    return heads, size, scale


def _replace(edit: Editor, node: gs.Node, heads: int, size: int, scale: float) -> None:
    name, out = node.name or "attention", node.outputs[0]
    parts = {x: _operand(edit, tensor, heads, size, f"{name}/{x}") for x, tensor in zip("qkv", node.inputs[:3], strict=True)}
    shape = dims(node.inputs[0]) or []
    attrs = {"num_heads": heads, "head_size": size, "scale": scale} | {f"{x}_offset": offset for x, (_, offset) in parts.items()}
    inputs = [tensor for tensor, _ in parts.values()]
    made = [shape[0], shape[2], heads * size]
    flat = edit.node(NAME, inputs, name=f"{name}/plugin", dtype=out.dtype, shape=made, **attrs, **_PARSER_ATTRIBUTES)
    flat.inputs[0].domain = DOMAIN
    split = _reshape(edit, flat, [heads, size], name=f"{name}/split")
    edit.transpose(split, _HEADS_AND_TOKENS, name=f"{name}/heads", output=out)


def _operand(edit: Editor, tensor: gs.Tensor, heads: int, size: int, name: str) -> tuple[gs.Tensor, int]:
    """A tensor (B, N, C) that holds the heads of `tensor` (B, H, N, D), head after head, and the channel where they start."""
    view = _view(tensor)
    if view is not None and view.axes == ("batch", (heads, size), "tokens", (size, 1)):
        channels = static_dim(view.source, 2)
        if channels is not None and channels % _ALIGNMENT == 0 and view.offset % _ALIGNMENT == 0:
            return view.source, view.offset
    tokens = edit.transpose(tensor, _HEADS_AND_TOKENS, name=f"{name}_tokens")
    return _reshape(edit, tokens, [heads * size], name=f"{name}_flat"), 0


def _reshape(edit: Editor, tensor: gs.Tensor, sizes: list[int], *, name: str) -> gs.Tensor:
    """`tensor` with axes of `sizes` in place of those after its first two."""
    shape = [*(dims(tensor) or [])[:2], *sizes]
    return edit.node("Reshape", [tensor, edit.integers([0, 0, *sizes], "shape")], name=name, dtype=tensor.dtype, shape=shape)


@dataclass(frozen=True)
class _View:
    """A tensor as a part of `source` (B, N, C): what its axes run over, and the first channel."""

    source: gs.Tensor
    axes: tuple[Axis, ...]
    offset: int = 0

    def pick(self, axis: int, start: int, count: int) -> _View | None:
        """`count` neighbours on an axis of channels; None on any other axis."""
        axes = list(self.axes)
        if isinstance(chosen := axes[axis], str):
            return None
        axes[axis] = count, chosen[1]
        return replace(self, axes=tuple(axes), offset=self.offset + start * chosen[1])

    def drop(self, axis: int) -> _View | None:
        """Without an axis of one channel; None for an axis of something else."""
        axes = list(self.axes)
        return None if isinstance(axes.pop(axis), str) else replace(self, axes=tuple(axes))


def _view(tensor: gs.Tensor) -> _View | None:
    """The tensor as a part of the first one (B, N, C) that no layout operation made; None where it is none."""
    node = producer(tensor)
    inner = _view(node.inputs[0]) if node is not None and node.op in _THROUGH else None
    view = None if node is None or inner is None else _THROUGH[node.op](inner, node, tensor)
    if view is None and rank(tensor) == 3 and (channels := static_dim(tensor, 2)) is not None:
        return _View(tensor, ("batch", "tokens", (channels, 1)))
    return view


def _through_transpose(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    perm = transposition(node)
    return None if perm is None else replace(view, axes=tuple(view.axes[axis] for axis in perm))


def _through_reshape(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    """The last axis taken apart, the others as they are."""
    before, after, last = dims(node.inputs[0]) or [], dims(output) or [], view.axes[-1]
    kept = len(before) - 1
    sizes = [size for size in after[kept:] if isinstance(size, int)]
    if isinstance(last, str) or any(map(is_made_up, before[:kept])) or before[:kept] != after[:kept] or len(sizes) < len(after) - kept:
        return None
    strides = [*accumulate([last[1], *reversed(sizes[1:])], mul)][::-1]
    return replace(view, axes=(*view.axes[:kept], *zip(sizes, strides, strict=True)))


def _through_slice(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    parts, found = slices(node), view
    for axis, part in (parts or {}).items():
        size = static_dim(node.inputs[0], axis)
        if size is None:
            return None
        start, stop, step = part.indices(size)
        picked = found.pick(axis, start, stop - start) if step == 1 else None
        if picked is None:
            return None
        found = picked
    return None if parts is None else found


def _through_split(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    axis = node.attrs.get("axis", 0)
    width = static_dim(node.inputs[0], axis)
    starts = None if width is None else split_starts(node, width)
    if starts is None:
        return None
    index = next(i for i, tensor in enumerate(node.outputs) if tensor is output)
    return view.pick(axis, starts[index], starts[index + 1] - starts[index])


def _through_gather(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    axis, index = node.attrs.get("axis", 0), constant_value(node.inputs[1])
    size = static_dim(node.inputs[0], axis)
    if index is None or index.ndim != 0 or size is None:
        return None
    picked = view.pick(axis, int(index) % size, 1)
    return None if picked is None else picked.drop(axis)


def _through_squeeze(view: _View, node: gs.Node, output: gs.Tensor) -> _View | None:
    axes = constant_value(node.inputs[1]) if has_input(node, 1) else None
    return view.drop(int(axes[0])) if axes is not None and axes.size == 1 else None


_THROUGH = {
    "Transpose": _through_transpose,
    "Reshape": _through_reshape,
    "Slice": _through_slice,
    "Split": _through_split,
    "Gather": _through_gather,
    "Squeeze": _through_squeeze,
}
