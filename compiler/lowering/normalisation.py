"""LayerNormalization over the last axis, and the Cast of its result."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import CannotLower, Context, aligned, dtype_name, stride, unit
from smc.compiler.lowering.views import View
from smc.passes.base import label
from smc.passes.tensors import constant_value, has_input
from smc.plugins.launch import ITEMSIZES
from smc.plugins.layer_norm.specification import LayerNorm


def lower_layer_norm(context: Context, node: gs.Node) -> None:
    data, (out, *more) = node.inputs[0], node.outputs
    if any(tensor.outputs for tensor in more) or node.attrs.get("axis", -1) not in (-1, len(data.shape) - 1):
        raise CannotLower(f"{label(node)} (LayerNormalization): only the normalised last axis is possible")
    weights = [constant_value(node.inputs[i]) if has_input(node, i) else None for i in (1, 2)]
    if any(value is None and has_input(node, i) for i, value in enumerate(weights, 1)):
        raise CannotLower(f"{label(node)} (LayerNormalization): its weights are not constants")
    scale, bias = weights

    def use(view: View) -> tuple[int, View]:
        unit(view.dims[-1])
        aligned(view)
        return stride(view.flat(0, -1)), view

    row, view = context.or_copy(context.view(data), node, use)
    cast = _cast(context, out)
    made = out if cast is None else cast.outputs[0]
    result = context.new(made)
    channels = view.shape[-1]
    operation = LayerNorm(
        groups=1, rows=view.size // channels, channels=channels, dtype=view.dtype, out_dtype=result.dtype,
        x_row=row, x_group=0, out_row=channels, out_group=0, eps=node.attrs.get("epsilon", 1e-5),
        scale=None if scale is None else scale.dtype.name, bias=None if bias is None else bias.dtype.name, shared=True,
        x_offset=view.offset,
    )  # fmt: skip
    operands = {
        "x": view.buffer,
        "scale": None if scale is None else context.view(node.inputs[1]).buffer,
        "bias": None if bias is None else context.view(node.inputs[2]).buffer,
        "out": result.buffer,
    }
    context.call(operation, operands, ["out"], node)
    context.bind(made, result)
    for done in (node, cast):
        if done is not None:
            context.finish(done)


def _cast(context: Context, tensor: gs.Tensor) -> gs.Node | None:
    """The Cast to a type that the kernel writes, if that is all that reads a tensor."""
    reader = context.sole_reader(tensor)
    return reader if reader is not None and reader.op == "Cast" and dtype_name(reader.outputs[0]) in ITEMSIZES else None
