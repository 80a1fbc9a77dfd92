"""Operations on single elements and sums of rows that no other kernel does on the way: one launch each."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from smc.compiler.lowering.context import MAX_LOOPS, CannotLower, Context, constant, stride
from smc.compiler.lowering.views import CannotView, View, alike, refine
from smc.passes.base import label
from smc.passes.tensors import constant_value, has_input, is_output
from smc.plugins.elementwise.specification import Elementwise, Function
from smc.plugins.elementwise.specification import View as Strided
from smc.plugins.reduction.specification import Reduction

FUNCTIONS: dict[str, Function] = {
    "Add": "add", "Sub": "sub", "Mul": "mul", "Div": "div", "Max": "maximum", "Min": "minimum",
    "Relu": "relu", "Gelu": "gelu", "Exp": "exp", "Sqrt": "sqrt",
}  # fmt: skip
"""ONNX's operation -> the kernel's."""


def lower_elementwise(context: Context, node: gs.Node) -> None:
    """One of `FUNCTIONS`, of one or two operands."""
    if len(node.inputs) > 2 or node.attrs.get("approximate", "none") != "none":
        raise CannotLower(f"{label(node)} ({node.op}) with {len(node.inputs)} operands and {dict(node.attrs)}")
    (out,) = node.outputs
    operands = [context.view(tensor) for tensor in node.inputs]
    result = context.new(out)
    like = [operand for operand in operands if operand.shape == result.shape and operand.buffer.values is None]
    if like and not is_output(context.graph, out):  # maps whose channels are last in memory stay so
        result = alike(like[0], result.buffer)
    _apply(context, node, FUNCTIONS[node.op], operands, result)
    context.bind(out, result)
    context.finish(node)


def lower_clip(context: Context, node: gs.Node) -> None:
    """Limits that are constants: one launch for each that is given."""
    (out,) = node.outputs
    view = context.view(node.inputs[0])
    functions: tuple[Function, Function] = ("maximum", "minimum")
    for index, function in enumerate(functions, 1):
        if has_input(node, index):
            limit = constant_value(node.inputs[index])
            if limit is None:
                raise CannotLower(f"{label(node)} (Clip): its limits are not constants")
            result = context.new(out)
            _apply(context, node, function, [view, constant(f"{label(node)}/{function}", limit)], result)
            view = result
    context.bind(out, view)
    context.finish(node)


def lower_reduction(context: Context, node: gs.Node) -> None:
    """ReduceL2 and ReduceSum over the last axis."""
    data, (out,) = node.inputs[0], node.outputs
    axes = constant_value(node.inputs[1]) if has_input(node, 1) else None
    if axes is None or axes.reshape(-1).tolist() not in ([-1], [len(data.shape) - 1]):
        raise CannotLower(f"{label(node)} ({node.op}): only sums over the last axis are possible")

    def use(view: View) -> tuple[int, int, View]:
        rows = view.flat(0, -1)
        return stride(rows), stride(view.dims[-1]), view

    row, column, view = context.or_copy(context.view(data), node, use)
    result = context.new(out)
    operation = Reduction(
        function="l2" if node.op == "ReduceL2" else "sum", rows=result.size, columns=view.shape[-1], dtype=view.dtype,
        out_dtype=result.dtype, x_row=row, x_column=column, x_offset=view.offset,
    )  # fmt: skip
    context.call(operation, {"x": view.buffer, "out": result.buffer}, ["out"], node)
    context.bind(out, result)
    context.finish(node)


def _apply(context: Context, node: gs.Node, function: Function, operands: Sequence[View], result: View) -> None:
    spread = [operand.expand(result.shape) for operand in operands]
    try:
        loops = refine([result, *spread])
    except CannotView:
        spread = [context.copied(operand, node).expand(result.shape) for operand in operands]
        loops = refine([result, *spread])
    if len(loops) > MAX_LOOPS:
        raise CannotLower(f"{label(node)} ({node.op}) goes along {len(loops)} axes, {MAX_LOOPS} at most are possible")
    shape = tuple(size for size, _ in loops)
    out, *inputs = (Strided(view.dtype, tuple(strides[i] for _, strides in loops), view.offset) for i, view in enumerate([result, *spread]))
    names = dict(zip("xy", (view.buffer for view in spread), strict=False))
    context.call(Elementwise(function, shape, tuple(inputs), out), {**names, "out": result.buffer}, ["out"], node)
