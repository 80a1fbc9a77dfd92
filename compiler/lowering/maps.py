"""Feature maps: convolutions and enlargements, with each group's channels last in memory, as (groups, B, H, W, C)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.context import CannotLower, Context, constant, stride, unit
from smc.compiler.lowering.epilogue import Epilogue, absorb
from smc.compiler.lowering.views import Buffer, CannotView, Factor, View, contiguous
from smc.compiler.lowering.weights import own_weights, with_own_bias
from smc.passes.base import label
from smc.plugins.conv.specification import Conv, Map
from smc.plugins.conv.specification import contiguous as whole_map
from smc.plugins.upsample.specification import Upsample


@dataclass(frozen=True)
class MapOperand:
    """A map that a kernel reads: its buffer, and where it lies in it."""

    buffer: Buffer
    map: Map


def lower_conv(context: Context, node: gs.Node) -> None:
    weight, bias = own_weights(node)
    groups = node.attrs.get("group", 1)
    size = weight.shape[2]
    if weight.shape[2:] != (size, size) or same(node, "dilations", 1) != 1:
        raise CannotLower(f"{label(node)} (Conv): only square kernels without dilation are possible")
    n, k = weight.shape[0] // groups, weight.shape[1]
    x = map_operand(context, node, groups, weight.dtype.name)
    batch, _, height, width = node.inputs[0].shape
    shape = (groups, batch, *node.outputs[0].shape[2:], n)
    steps = ("bias", "residual", "activation")[bias is not None :]
    epilogue = with_own_bias(absorb(context, node, map_output(node, shape), map_axes(shape), steps, ("Relu",)), bias, groups)
    out, residual, out_relu = _results(epilogue, shape)
    operation = Conv(
        groups, batch, height, width, k, n, x.map, out, size, same(node, "strides", 1), same(node, "pads", 0),
        bias=None if epilogue.bias is None else epilogue.bias.dtype.name,  # type: ignore[arg-type]
        residual=residual,
        activation=epilogue.activation,  # type: ignore[arg-type]
        out_relu=out_relu,
    )  # fmt: skip
    operands = {
        "x": x.buffer,
        "weight": constant(f"{label(node)}/weight", conv_weight(weight, groups)).buffer,
        "bias": None if epilogue.bias is None else constant(f"{label(node)}/bias", epilogue.bias).buffer,
    }
    _emit(context, node, operation, operands, epilogue)


def lower_resize(context: Context, node: gs.Node) -> None:
    """Bilinear, with the corners on each other."""
    attrs = node.attrs
    batch, channels, height, width = node.inputs[0].shape
    if attrs.get("mode") != "linear" or attrs.get("coordinate_transformation_mode") != "align_corners" or attrs.get("antialias", 0):
        raise CannotLower(f"{label(node)} (Resize): only linear interpolation with aligned corners is possible")
    if list(node.outputs[0].shape[:2]) != [batch, channels]:
        raise CannotLower(f"{label(node)} (Resize): only images are enlarged, not batches or channels")
    groups = _groups(context.view(node.inputs[0]))
    view = context.view(node.inputs[0])
    x = map_operand(context, node, groups, view.dtype)
    shape = (groups, batch, *node.outputs[0].shape[2:], channels // groups)
    epilogue = absorb(context, node, map_output(node, shape), map_axes(shape), ("residual",), ())
    out, residual, out_relu = _results(epilogue, shape)
    operation = Upsample(groups, batch, height, width, shape[2], shape[3], channels // groups, x.map, out, residual, out_relu)
    _emit(context, node, operation, {"x": x.buffer}, epilogue)


def map_operand(context: Context, node: gs.Node, groups: int, dtype: str) -> MapOperand:
    """A node's first input (B, groups * C, H, W) as a map of just this type; a copy where it does not lie so."""
    view = context.operand(node.inputs[0], node, dtype)
    try:
        return MapOperand(view.buffer, _as_map(view, groups))
    except (CannotView, ValueError):
        copy = channels_last_copy(context, node, view, groups)
        return MapOperand(copy.buffer, _as_map(copy, groups))


def channels_last_copy(context: Context, node: gs.Node, view: View, groups: int) -> View:
    """A copy of a map (B, groups * C, H, W) as (groups, B, H, W, C), seen as before."""
    batch, channels, height, width = view.shape
    split = (batch, groups, channels // groups, height, width)

    def copied(source: View) -> View:
        return context.copied(source.reshape(split).transpose((1, 0, 3, 4, 2)), node)

    copy = context.or_copy(view, node, copied)
    return copy.transpose((1, 0, 4, 2, 3)).reshape(view.shape)


def map_output(node: gs.Node, shape: Sequence[int]) -> View:
    """New memory of a shape (groups, B, H, W, C), seen as the node's output (B, groups * C, H, W)."""
    groups, batch, height, width, channels = shape
    whole = contiguous(Buffer(node.outputs[0].name, "float32", math.prod(shape)), shape)
    return whole.transpose((1, 0, 4, 2, 3)).reshape((batch, groups * channels, height, width))


def map_axes(shape: Sequence[int]) -> tuple[Factor, ...]:
    """The axes of contiguous memory of a shape: (size, stride)."""
    return tuple((size, math.prod(shape[i + 1 :])) for i, size in enumerate(shape))


def conv_weight(weight: NDArray[Any], groups: int) -> NDArray[Any]:
    """(groups * N, K, kh, kw) as (groups, kh, kw, K, N)."""
    n, k, height, width = weight.shape
    return weight.reshape(groups, n // groups, k, height, width).transpose(0, 3, 4, 2, 1)


def same(node: gs.Node, attribute: str, default: int) -> int:
    """An attribute that must be the same number for all sides or axes."""
    values = set(node.attrs.get(attribute) or [default])
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise CannotLower(f"{label(node)} ({node.op}): padding {node.attrs['auto_pad']} is not possible")
    if len(values) > 1:
        raise CannotLower(f"{label(node)} ({node.op}): {attribute} {sorted(values)} differ, and must be one number")
    return int(values.pop())


def _as_map(view: View, groups: int) -> Map:
    batch, channels, row, column = view.dims
    group, channel = View(view.buffer, 0, (channels,)).reshape((groups, view.shape[1] // groups)).dims
    unit(channel)
    return Map(view.dtype, stride(group), stride(batch), stride(row), stride(column), view.offset)  # type: ignore[arg-type]


def _groups(view: View) -> int:
    """Into how many pieces a map's channels are parted in memory."""
    channels = view.dims[1]
    return channels[0][0] if len(channels) == 2 else 1


def _results(epilogue: Epilogue, shape: Sequence[int]) -> tuple[Map, Map | None, Map | None]:
    """Where out, residual and out_relu lie."""
    _, batch, height, width, channels = shape
    out = whole_map(epilogue.out.dtype, batch, height, width, channels)  # type: ignore[arg-type]
    residual = None
    if epilogue.residual is not None:
        view = epilogue.residual.view
        group, one, row, column, _ = epilogue.residual.strides
        residual = Map(view.dtype, group, one, row, column, view.offset)  # type: ignore[arg-type]
    return out, residual, None if epilogue.relu is None else out


def _emit(context: Context, node: gs.Node, operation: Conv | Upsample, operands: dict[str, Buffer | None], epilogue: Epilogue) -> None:
    given = operands | {
        "residual": None if epilogue.residual is None else epilogue.residual.view.buffer,
        "out": epilogue.out.buffer,
        "out_relu": None if epilogue.relu is None else epilogue.relu.buffer,
    }
    context.call(operation, given, ["out", *(["out_relu"] if epilogue.relu else [])], node)
    context.finish(node)
