"""Which products rotate their own outputs, so that attention reads q and k as they are.

A rotation takes pairs of channels (i, i + half) of a head. A product's kernel rotates neighbours (2i, 2i + 1), which one thread holds, so
the columns of its weight change places, within each head and in q as in k: their products stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.context import constant
from smc.compiler.lowering.movement import reads
from smc.compiler.lowering.views import Buffer, CannotView, View, contiguous
from smc.passes.tensors import constant_value, has_input, is_output, producer
from smc.plugins.gemm.specification import Rotary


@dataclass(frozen=True)
class Rotation:
    """The rotation that a product does: its attributes and its tables (tokens, half)."""

    rotary: Rotary
    cos: View
    sin: View


class Rotations:
    """The rotations of a graph that its products can do."""

    def __init__(self, graph: gs.Graph) -> None:
        found = {id(node): rotation for node in graph.nodes if node.op == "MatMul" and (rotation := _rotation(graph, node)) is not None}
        product_of = {id(use): product for product, (_, uses) in found.items() for use in uses}
        pairs = [
            [product_of.get(id(rotation_before(tensor))) for tensor in node.inputs[:2]] for node in graph.nodes if node.op == "Attention"
        ]
        # The channels of q and of k must change places alike, so both are rotated by their products, or neither is.
        while alone := {mine for pair in pairs for mine, other in (pair, pair[::-1]) if mine in found and other not in found}:
            for product in alone:
                found.pop(product)
        self._rotations = {product: rotation for product, (rotation, _) in found.items()}
        self._done = {id(use) for _, uses in found.values() for use in uses}

    def of(self, product: gs.Node) -> Rotation | None:
        """What a MatMul rotates."""
        return self._rotations.get(id(product))

    def is_done(self, node: gs.Node) -> bool:
        """Whether a RotaryEmbedding's product has rotated its input already."""
        return id(node) in self._done


def interleaved(values: NDArray[np.generic], rotary: Rotary) -> NDArray[np.generic]:
    """The last axis, with the channels i and i + half of each rotated head as neighbours."""
    heads = np.arange(rotary.columns).reshape(-1, 2, rotary.half).swapaxes(1, 2).reshape(-1)
    return values[..., np.concatenate([heads, np.arange(rotary.columns, values.shape[-1])])]


def tables(node: gs.Node) -> tuple[NDArray[np.generic], NDArray[np.generic]] | None:
    """cos and sin (tokens, half) of a RotaryEmbedding that has the same for every image, of whole heads; None for any other."""
    shape = node.inputs[0].shape
    attrs = node.attrs
    if has_input(node, 3) or attrs.get("interleaved", 0) or len(shape) != 4 or attrs.get("rotary_embedding_dim", 0) not in (0, shape[3]):
        return None
    values = [constant_value(tensor) for tensor in node.inputs[1:3]]
    if any(value is None or value.ndim != 3 or (value != value[:1]).any() for value in values):
        return None
    cos, sin = (value[0] for value in values if value is not None)
    return (cos, sin) if cos.shape == (shape[2], shape[3] // 2) == sin.shape else None


def rotation_before(tensor: gs.Tensor) -> gs.Node | None:
    """The RotaryEmbedding that made a tensor, perhaps with Casts behind it: precisions may differ between it and the attention."""
    node = producer(tensor)
    while node is not None and node.op == "Cast":
        node = producer(node.inputs[0])
    return node if node is not None and node.op == "RotaryEmbedding" else None


def rotation_uses(graph: gs.Graph, node: gs.Node) -> list[tuple[gs.Node, int]]:
    """What reads a rotation, Casts left out, and as which input; nothing where the graph itself gives it out."""
    uses: list[tuple[gs.Node, int]] = []
    tensors = list(node.outputs)
    while tensors:
        tensor = tensors.pop()
        if is_output(graph, tensor):
            return []
        for reader in {id(reader): reader for reader in tensor.outputs}.values():
            if reader.op == "Cast":
                tensors += reader.outputs
            else:
                uses += [(reader, i) for i, given in enumerate(reader.inputs) if given is tensor]
    return uses


def _rotation(graph: gs.Graph, product: gs.Node) -> tuple[Rotation, list[gs.Node]] | None:
    """What a product can rotate, and the nodes that would do it."""
    tensor = _biased(product)
    width = tensor.shape[-1]
    whole = contiguous(Buffer(tensor.name, "float32", int(np.prod(tensor.shape))), tensor.shape)
    try:
        uses = list(reads(tensor, whole))
    except CannotView:
        return None
    rotated = [use for use in uses if use.node.op == "RotaryEmbedding" and use.index == 0]
    if not rotated or any(not _is_for_attention(graph, use.node) for use in rotated):
        return None
    makers = {id(node): node for node in (product, producer(tensor), *(node for use in uses for node in use.passed)) if node is not None}
    if any(is_output(graph, made) for node in makers.values() for made in node.outputs):
        return None
    found = [tables(use.node) for use in rotated]
    if found[0] is None or any(pair is None or not all(map(np.array_equal, pair, found[0])) for pair in found):
        return None
    cos, sin = found[0]
    tokens, half = cos.shape
    ranges = []
    for use in rotated:
        first, last = _columns(use.view, width)
        batch, heads, rows, channels = use.view.dims
        if any(step != 2 * half for _, step in heads) or len(heads) > 1 or channels != ((2 * half, 1),) or rows != ((tokens, width),):
            return None
        if any(step % (tokens * width) for _, step in batch) or use.view.offset // width % tokens:
            return None
        ranges.append((first, last))
    columns = 0
    for first, last in sorted(set(ranges)):
        if first != columns:
            return None
        columns = last
    if any(_columns(use.view, width)[0] < columns for use in uses if use not in rotated):
        return None
    rotary = Rotary(columns, tokens, half, cos.dtype.name)
    rotation = Rotation(rotary, constant(f"{product.name}/cos", cos), constant(f"{product.name}/sin", sin))
    return rotation, [use.node for use in rotated]


def _biased(product: gs.Node) -> gs.Tensor:
    """The product with its bias, a number for each channel (of each group), if nothing else reads it."""
    (tensor,) = product.outputs
    if len(tensor.outputs) != 1 or tensor.outputs[0].op != "Add":
        return tensor
    (add,) = tensor.outputs
    bias = constant_value(add.inputs[1] if add.inputs[0] is tensor else add.inputs[0])
    if bias is None or list(add.outputs[0].shape) != list(tensor.shape):
        return tensor
    is_grouped = len(product.inputs[1].shape) == 3
    sizes = (1,) * (len(tensor.shape) - bias.ndim) + bias.shape[:-1]
    return add.outputs[0] if set(sizes[is_grouped:]) <= {1} else tensor


def _columns(view: View, width: int) -> tuple[int, int]:
    """The first column, and the one behind the last, of a (rows, width) output that a view covers."""
    first = view.offset % width
    inside = sum((size - 1) * abs(step) for dim in view.dims for size, step in dim if abs(step) < width)
    return first, first + inside + 1


def _is_for_attention(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether attention alone reads a rotation, as q or k: it comes out with its channels in another order."""
    uses = rotation_uses(graph, node)
    return bool(uses) and all(reader.op == "Attention" and i < 2 for reader, i in uses)
