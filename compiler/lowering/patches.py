"""The first layer: images to rows of a patch's pixels, normalisation included."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import Context, dtype_name
from smc.compiler.lowering.linear import lower_patch_embedding
from smc.compiler.lowering.views import Buffer, CannotView, View, contiguous
from smc.compiler.lowering.weights import kernel_shape
from smc.passes.base import label
from smc.passes.tensors import scalar_value, transposition
from smc.plugins.patches.specification import Patches


@dataclass(frozen=True, eq=False)
class _Start:
    """How a graph begins: the convolution, the nodes before it, and what they do to a pixel: (x - subtract) * multiply."""

    conv: gs.Node
    passed: tuple[gs.Node, ...]
    subtract: float
    multiply: float


def is_patch_embedding(node: gs.Node) -> bool:
    """Whether a Conv's patches do not overlap, cover whole images and are read from all channels."""
    size = kernel_shape(node)
    return bool(
        len(size) == 2
        and size[0] == size[1] > 1
        and node.attrs.get("strides") == size
        and not any(node.attrs.get("pads") or [])
        and node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
        and node.attrs.get("group", 1) == 1
        and set(node.attrs.get("dilations") or [1]) == {1}
    )


def lower_bytes(context: Context, node: gs.Node) -> bool:
    """From the Cast of a graph's image of bytes (B, H, W, C) to the patch embedding. False where something else follows."""
    start = _follow(context, node)
    view = context.view(node.inputs[0])
    if start is None or view.dtype != "uint8" or len(view.dims) != 4 or not view.is_contiguous():
        return False
    batch, height, width, channels = view.shape
    size = kernel_shape(start.conv)[0]
    operation = Patches(
        batch=batch, height=height, width=width, channels=channels, patch=size, layout="nhwc", dtype=view.dtype,
        out_dtype=dtype_name(start.conv.inputs[1]), subtract=start.subtract, multiply=start.multiply,
    )  # fmt: skip
    rows = _rows(context, operation, view, node)
    for passed in (node, *start.passed):
        context.finish(passed)
    lower_patch_embedding(context, start.conv, rows)
    return True


def lower_pixels(context: Context, node: gs.Node) -> None:
    """A patch embedding of an image (B, C, H, W) of floating-point numbers."""

    def use(view: View) -> View:
        if not view.is_contiguous() or view.offset:
            raise CannotView
        return view

    view = context.or_copy(context.view(node.inputs[0]), node, use)
    batch, channels, height, width = view.shape
    size = kernel_shape(node)[0]
    operation = Patches(
        batch=batch, height=height, width=width, channels=channels, patch=size, layout="nchw", dtype=view.dtype,
        out_dtype=dtype_name(node.inputs[1]),
    )  # fmt: skip
    lower_patch_embedding(context, node, _rows(context, operation, view, node))


def _rows(context: Context, operation: Patches, image: View, node: gs.Node) -> View:
    m, k = operation.shape
    rows = contiguous(Buffer(f"{label(node)}/rows", operation.out_dtype, m * k), (m, k))
    context.call(operation, {"image": image.buffer, "out": rows.buffer}, ["out"], node)
    return rows


def _follow(context: Context, cast: gs.Node) -> _Start | None:
    """Numbers that are subtracted and multiplied, channels that come first, and a patch embedding."""
    subtract, multiply = 0.0, 1.0
    passed: list[gs.Node] = []
    node = context.sole_reader(cast.outputs[0])
    while node is not None:
        if node.op == "Conv":
            moves = [move for move in passed if move.op == "Transpose"]
            return _Start(node, tuple(passed), subtract, multiply) if len(moves) == 1 and is_patch_embedding(node) else None
        if node.op == "Transpose":
            if transposition(node) != [0, 3, 1, 2]:
                return None
        elif node.op in ("Sub", "Mul") and (number := scalar_value(node.inputs[1])) is not None:
            if node.op == "Mul":
                multiply *= number
            else:
                subtract += number / multiply
        elif node.op != "Cast":
            return None
        passed.append(node)
        node = context.sole_reader(node.outputs[0])
    return None
