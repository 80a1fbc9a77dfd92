"""LayerNormalization over the last axis."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import CannotLower, Context, aligned, dtype_name, stride, unit
from smc.compiler.lowering.views import View
from smc.passes.base import label
from smc.passes.tensors import constant_value, has_input
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
    result = context.new(out, dtype_name(out))
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
    context.bind(out, result)
    context.finish(node)
