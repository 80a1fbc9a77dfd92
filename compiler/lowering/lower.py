"""The walk over a graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from smc.compiler.launch_program import ALIGNMENT, itemsize
from smc.compiler.lowering.attention import lower_attention, lower_rotary
from smc.compiler.lowering.context import Call, CannotLower, Context, dtype_name, sources
from smc.compiler.lowering.elementwise import FUNCTIONS, lower_clip, lower_elementwise, lower_reduction
from smc.compiler.lowering.heads import lower_descriptor_head, lower_point_head
from smc.compiler.lowering.linear import lower_matmul, lower_pointwise, lower_transposed
from smc.compiler.lowering.maps import lower_conv, lower_resize
from smc.compiler.lowering.movement import MOVES, lower_cast, lower_concat, lower_movement
from smc.compiler.lowering.normalisation import lower_layer_norm
from smc.compiler.lowering.patches import is_patch_embedding, lower_bytes, lower_pixels
from smc.compiler.lowering.rotation import Rotations
from smc.compiler.lowering.views import Buffer, CannotView, View, contiguous
from smc.compiler.lowering.weights import kernel_shape
from smc.passes.base import label
from smc.passes.tensors import constant_value


@dataclass(frozen=True)
class Lowered:
    """A graph as calls.

    Attributes:
        calls: in order.
        inputs, outputs: name -> where it lies, contiguous.
    """

    calls: Sequence[Call]
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]

    def only(self, outputs: Collection[str]) -> Lowered:
        """The same with but some of its outputs, and the calls that those need."""
        kept = {name: view for name, view in self.outputs.items() if name in outputs}
        needed = sources(self.calls, {view.buffer for view in kept.values()})
        return Lowered([call for number, call in enumerate(self.calls) if number in needed], self.inputs, kept)


def lower(graph: gs.Graph) -> Lowered:
    """Turn a typed graph whose dimensions are all static into calls of this project's operations.

    Raises:
        CannotLower: it holds something that none of them does, or a dimension that is not static.
    """
    _check_shapes(graph)
    context = Context(graph)
    rotations = Rotations(graph)
    inputs = _place_inputs(context)
    for node in graph.nodes:
        if not context.is_done(node):
            _lower_or_refuse(context, node, rotations)
    outputs = {tensor.name: _output(context, tensor) for tensor in graph.outputs}
    return Lowered(context.calls, inputs, outputs)


def _check_shapes(graph: gs.Graph) -> None:
    """Raise CannotLower unless every dimension of what is given and computed is static."""
    for tensor in graph.inputs:
        _check_static(tensor, "the graph's input")
    for node in graph.nodes:
        for tensor in node.outputs:
            if not tensor.is_empty() and constant_value(tensor) is None:
                _check_static(tensor, f"{label(node)} ({node.op}): its output")


def _check_static(tensor: gs.Tensor, what: str) -> None:
    if tensor.shape is None:
        raise CannotLower(f"{what} {tensor.name} is of a shape that cannot be told beforehand")
    for axis, size in enumerate(tensor.shape):
        if not isinstance(size, int):
            sizes = ", ".join(map(str, tensor.shape))
            raise CannotLower(f"{what} {tensor.name} is of the shape ({sizes}), whose dimension {axis} cannot be told beforehand")


def _lower_or_refuse(context: Context, node: gs.Node, rotations: Rotations) -> None:
    try:
        _lower(context, node, rotations)
    except CannotLower:
        raise
    except CannotView as error:
        raise CannotLower(f"{label(node)} ({node.op}): its operands cannot be put in memory as a kernel reads them") from error
    except ValueError as error:  # an operation's specification: sizes or types that its kernels do not take
        raise CannotLower(f"{label(node)} ({node.op}): {error}") from error


def _lower(context: Context, node: gs.Node, rotations: Rotations) -> None:
    if all(constant_value(tensor) is not None for tensor in node.outputs):
        context.finish(node)
        return
    match node.op:
        case "MatMul":
            lower_matmul(context, node, rotations)
        case "Attention":
            lower_attention(context, node, rotations)
        case "RotaryEmbedding":
            lower_rotary(context, node, rotations)
        case "LayerNormalization":
            lower_layer_norm(context, node)
        case "Conv" if is_patch_embedding(node):
            lower_pixels(context, node)
        case "Conv" if _is_pointwise(node):
            lower_pointwise(context, node)
        case "Conv":
            if not lower_point_head(context, node):
                lower_conv(context, node)
        case "ConvTranspose":
            lower_transposed(context, node)
        case "Resize":
            lower_resize(context, node)
        case "Cast":
            if not lower_bytes(context, node):
                lower_cast(context, node)
        case "Concat":
            lower_concat(context, node)
        case "Exp" | "ReduceL2" if lower_descriptor_head(context, node):
            pass
        case "ReduceL2" | "ReduceSum":
            lower_reduction(context, node)
        case "Clip":
            lower_clip(context, node)
        case op if op in FUNCTIONS:
            lower_elementwise(context, node)
        case op if op in MOVES:
            lower_movement(context, node)
        case _:
            raise CannotLower(f"{label(node)}: the operation {node.op} is not known to this backend")


def _is_pointwise(node: gs.Node) -> bool:
    attrs = node.attrs
    return kernel_shape(node) == [1, 1] and set(attrs.get("strides") or [1]) == {1} and not any(attrs.get("pads") or [])


def _place_inputs(context: Context) -> dict[str, View]:
    """New memory for the graph's inputs. Those of one type and shape lie side by side, so that joining them moves nothing."""
    tensors = context.graph.inputs
    alike = len({(dtype_name(tensor), tuple(tensor.shape)) for tensor in tensors}) == 1
    views: dict[str, View] = {}
    whole = None
    for i, tensor in enumerate(tensors):
        view = context.new(tensor)
        if alike and view.size * itemsize(view.dtype) % ALIGNMENT == 0:
            whole = whole or Buffer("inputs", view.dtype, len(tensors) * view.size)
            view = contiguous(whole, tensor.shape, i * view.size)
        views[tensor.name] = view
        context.bind(tensor, view)
    return views


def _output(context: Context, tensor: gs.Tensor) -> View:
    """An output, contiguous and of its own type; copied if it does not lie so."""
    view = context.view(tensor)
    if not tensor.inputs:
        raise CannotLower(f"the output {tensor.name} is made by no node")
    node = tensor.inputs[0]
    is_written = view.buffer.values is None
    if is_written and view.is_contiguous() and view.dtype == dtype_name(tensor) and view.offset * itemsize(view.dtype) % ALIGNMENT == 0:
        return view
    return context.or_copy(view, node, lambda source: context.copied(source, node, dtype_name(tensor)))
