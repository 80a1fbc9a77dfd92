"""The last layers of MASt3R's two heads, each as one kernel: points from the DPT head, descriptors from the MLP.

Both are found by what they compute. Where a graph spells them otherwise, they are lowered operation by operation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import Context, constant, stride
from smc.compiler.lowering.maps import conv_weight, map_operand, map_output, same
from smc.compiler.lowering.movement import MOVES, Read, reads
from smc.compiler.lowering.views import Buffer, CannotView, View, contiguous
from smc.compiler.lowering.weights import kernel_shape, own_weights
from smc.passes.base import label
from smc.passes.tensors import constant_value, has_input, producer, scalar_value
from smc.plugins.descriptor_head.specification import DescriptorHead
from smc.plugins.point_head.specification import PointHead


@dataclass(frozen=True, eq=False)
class _Activations:
    """A vector and a confidence out of one tensor: vector / max(norm, least) [* (exp(norm) - 1)], and offset + exp(confidence).

    Attributes:
        vector, confidence: where the two lie in the tensor.
        outputs: the tensors that hold the results.
        nodes: all that the two take, movements and casts included.
        least: what the norm is raised to; None for no such limit.
        expands: whether the vector's length grows as exp(norm) - 1.
        offset: what is added to the confidence.
    """

    vector: View
    confidence: View
    outputs: tuple[gs.Tensor, gs.Tensor]
    nodes: tuple[gs.Node, ...]
    least: float | None
    expands: bool
    offset: float


def lower_point_head(context: Context, node: gs.Node) -> bool:
    """From the Conv before the head's last one to points and confidences. False where the graph computes something else."""
    relu = context.sole_reader(node.outputs[0])
    last = context.sole_reader(relu.outputs[0]) if relu is not None and relu.op == "Relu" else None
    if relu is None or last is None or last.op != "Conv" or kernel_shape(last) != [1, 1]:
        return False
    groups = node.attrs.get("group", 1)
    weight, bias = own_weights(node)
    weight_out, bias_out = own_weights(last)
    n, k, size = weight.shape[0] // groups, weight.shape[1], weight.shape[2]
    padded = node.attrs.get("pads") == [size // 2] * 4 and size % 2 == 1 and same(node, "strides", 1) == same(node, "dilations", 1) == 1
    if bias is None or bias_out is None or not padded or weight_out.shape[0] != 4 * groups or last.attrs.get("group", 1) != groups:
        return False
    batch, _, height, width = last.outputs[0].shape
    found = _activations(context, last.outputs[0], map_output(last, (groups, batch, height, width, 4)))
    if found is None or not found.expands or n > 256 or n % 8 or k % 8:
        return False
    vectors = contiguous(found.vector.buffer, (groups * batch, height, width, 4))
    if found.vector.dims != vectors.slice(3, 0, 3).dims or found.vector.offset or not _is_at(found.confidence, vectors, 3):
        return False
    x = map_operand(context, node, groups, weight.dtype.name)
    pixels = batch * height * width
    operation = PointHead(
        groups, batch, height, width, k, n, x.map, pts3d_group=3 * pixels, conf_group=pixels, bias=bias.dtype.name,  # type: ignore[arg-type]
        size=size, norm_floor=found.least or 0.0, conf_floor=found.offset,
    )  # fmt: skip
    points, confidence = (context.new(tensor, "float32") for tensor in found.outputs)
    operands: dict[str, Buffer | None] = {
        "x": x.buffer,
        "weight": constant(f"{label(node)}/weight", conv_weight(weight, groups)).buffer,
        "bias": constant(f"{label(node)}/bias", bias).buffer,
        "weight_out": constant(f"{label(last)}/weight", weight_out.reshape(groups, 4, n).swapaxes(1, 2)).buffer,
        "bias_out": constant(f"{label(last)}/bias", bias_out.astype(bias.dtype)).buffer,
        "pts3d": points.buffer,
        "conf": confidence.buffer,
    }
    context.call(operation, operands, ["pts3d", "conf"], node)
    _finish(context, (node, relu, last, *found.nodes), found.outputs, (points, confidence))
    return True


def lower_descriptor_head(context: Context, node: gs.Node) -> bool:
    """From a token's features, which a node of the head reads through movements, to descriptors. False for anything else."""
    tensor = node.inputs[0]
    while (maker := producer(tensor)) is not None and (maker.op in MOVES or maker.op == "Cast") and context.is_ready(maker.inputs[0]):
        tensor = maker.inputs[0]  # one that is not ready is a product's, whose kernel does the Cast as well
    try:
        features = context.view(tensor)
        found = _activations(context, tensor, features)
    except CannotView:
        return False
    if found is None or found.expands or len(found.vector.dims) != 4:
        return False
    images, height, width, channels = found.vector.shape
    patch = round(np.sqrt(features.shape[-1] // (channels + 1)))
    if patch**2 * (channels + 1) != features.shape[-1] or height % patch or width % patch:
        return False
    h, w = height // patch, width // patch
    try:
        tokens = features.reshape((images, h, w, channels + 1, patch, patch))
        pixels = tokens.transpose((0, 1, 4, 2, 5, 3)).reshape((images, height, width, channels + 1))
        rows = features.reshape((images, h * w, features.shape[-1]))
        group, row = stride(rows.dims[0]), stride(rows.dims[1])
    except CannotView:
        return False
    if found.vector != pixels.slice(3, 0, channels) or not _is_at(found.confidence, pixels, channels) or stride(rows.dims[2]) != 1:
        return False
    operation = DescriptorHead(
        groups=1 if group == h * w * row else images, batch=images if group == h * w * row else 1, h=h, w=w, channels=channels, patch=patch,
        dtype=features.dtype, f_row=row, f_group=group, confidence=found.offset, least_norm=found.least, f_offset=features.offset,
    )  # fmt: skip
    descriptors, confidence = (context.new(tensor, "float32") for tensor in found.outputs)
    operands = {"f": features.buffer, "desc": descriptors.buffer, "desc_conf": confidence.buffer}
    context.call(operation, operands, ["desc", "desc_conf"], node)
    _finish(context, found.nodes, found.outputs, (descriptors, confidence))
    return True


def _finish(context: Context, nodes: Iterable[gs.Node], tensors: tuple[gs.Tensor, gs.Tensor], views: tuple[View, View]) -> None:
    for node in nodes:
        context.finish(node)
    for tensor, view in zip(tensors, views, strict=True):
        context.bind(tensor, view)


def _activations(context: Context, tensor: gs.Tensor, view: View) -> _Activations | None:
    """The activations behind a tensor, if they are all that reads it."""
    try:
        found = list(reads(tensor, view, through_casts=True))
    except CannotView:
        return None
    by_op = {read.node.op: read for read in found}
    if len(found) != 3 or by_op.keys() != {"ReduceL2", "Div", "Exp"}:
        return None
    reduce, divide, exponential = by_op["ReduceL2"], by_op["Div"], by_op["Exp"]
    axes = constant_value(reduce.node.inputs[1]) if has_input(reduce.node, 1) else None
    last = [-1], [len(reduce.view.dims) - 1]
    if divide.index != 0 or divide.view != reduce.view or axes is None or axes.reshape(-1).tolist() not in last:
        return None
    confidence = context.sole_reader(exponential.node.outputs[0])
    if confidence is None or confidence.op != "Add" or (offset := scalar_value(confidence.inputs[1])) is None:
        return None
    nodes = [*_nodes(found), confidence]
    norm = reduce.node.outputs[0]
    readers = {node.op: node for node in norm.outputs}
    least = None
    result = divide.node
    if "Clip" in readers:
        clip = readers.pop("Clip")
        least = scalar_value(clip.inputs[1])
        if least is None or has_input(clip, 2) or context.sole_reader(clip.outputs[0]) is not divide.node:
            return None
        nodes.append(clip)
    elif readers.pop("Div", None) is not divide.node:
        return None
    expands = bool(readers)
    if expands:
        grown = _growth(context, readers, divide.node)
        if grown is None:
            return None
        nodes += grown
        result = grown[-1]
    outputs = result.outputs[0], confidence.outputs[0]
    return _Activations(reduce.view, exponential.view, outputs, tuple(nodes), least, expands, offset)


def _growth(context: Context, readers: dict[str, gs.Node], divide: gs.Node) -> list[gs.Node] | None:
    """exp(norm) - 1, multiplied with the direction: the nodes, the last of which makes the result."""
    if readers.keys() != {"Exp"}:
        return None
    exponential = readers["Exp"]
    less = context.sole_reader(exponential.outputs[0])
    if less is None or (less.op, scalar_value(less.inputs[1])) not in (("Sub", 1.0), ("Add", -1.0)):
        return None
    product = context.sole_reader(less.outputs[0])
    if product is None or product.op != "Mul" or context.sole_reader(divide.outputs[0]) is not product:
        return None
    return [exponential, less, product]


def _nodes(found: Iterable[Read]) -> list[gs.Node]:
    return list({id(node): node for read in found for node in (*read.passed, read.node)}.values())


def _is_at(view: View, whole: View, channel: int) -> bool:
    """Whether a view is one channel of a map (.., channels)."""
    return replace(whole.slice(3, channel, 1), dims=whole.dims[:3]) in (view, replace(view, dims=view.dims[:3]))
