"""Matrix products, and what are products in disguise: 1x1 convolutions, patch embeddings, and transposed convolutions without overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.context import CannotLower, Context, aligned, constant, stride, unit
from smc.compiler.lowering.epilogue import Epilogue, absorb
from smc.compiler.lowering.maps import channels_last_copy, map_output
from smc.compiler.lowering.rotation import Rotations, interleaved
from smc.compiler.lowering.views import Buffer, CannotView, Factor, View, contiguous
from smc.compiler.lowering.weights import own_weights, with_own_bias
from smc.passes.base import label
from smc.passes.tensors import constant_value
from smc.plugins.gemm.specification import Gemm, Scatter

STEPS = ("bias", "activation", "residual")
ACTIVATIONS = ("Gelu", "Relu")


@dataclass(frozen=True)
class Rows:
    """A product's left operand: rows of neighbours in memory.

    Attributes:
        view: the tensor.
        groups, m: groups of rows, and rows a group.
        group, row: strides in elements.
    """

    view: View
    groups: int
    m: int
    group: int
    row: int

    def __post_init__(self) -> None:
        """Raises CannotView where rows start at no multiple of 16 bytes, which a kernel reads at a time."""
        aligned(self.view, self.group, self.row)


def lower_matmul(context: Context, node: gs.Node, rotations: Rotations) -> None:
    """A product with a constant: (.., m, k) @ (k, n), or (groups, m, k) @ (groups, k, n)."""
    a, weight = node.inputs
    values = constant_value(weight)
    if values is None or not (values.ndim == 2 or (values.ndim == 3 and len(a.shape) == 3 and values.shape[0] == a.shape[0])):
        raise CannotLower(f"{label(node)} (MatMul) is no product with one weight, or with one for each group")
    rows = context.or_copy(context.operand(a, node, values.dtype.name), node, _shared_rows if values.ndim == 2 else _grouped_rows)
    *_, k, n = values.shape
    product = contiguous(Buffer(node.outputs[0].name, "float32", rows.groups * rows.m * n), node.outputs[0].shape)
    epilogue = absorb(context, node, product, _axes(rows, n), STEPS, ACTIVATIONS)
    operation = _gemm(rows, n, k, w_shared=values.ndim == 2)
    tables: dict[str, Buffer] = {}
    if (rotation := rotations.of(node)) is not None:
        operation = replace(operation, rotary=rotation.rotary)
        tables = {"cos": rotation.cos.buffer, "sin": rotation.sin.buffer}
        values = interleaved(values, rotation.rotary)
        if epilogue.bias is not None:
            epilogue = replace(epilogue, bias=interleaved(epilogue.bias, rotation.rotary))
    _emit(context, node, operation, rows.view, values, epilogue, tables)


def lower_pointwise(context: Context, node: gs.Node) -> None:
    """A 1x1 convolution: a product at each pixel."""
    weight, bias = own_weights(node)
    groups = node.attrs.get("group", 1)
    batch, _, height, width = node.outputs[0].shape
    n, k = weight.shape[0] // groups, weight.shape[1]
    rows = _pixels(context, node, groups, weight.dtype.name)
    epilogue = _absorb_map(context, node, (groups, batch, height, width, n), bias)
    _emit(context, node, _gemm(rows, n, k), rows.view, weight.reshape(groups, n, k).swapaxes(1, 2), epilogue)


def lower_patch_embedding(context: Context, node: gs.Node, patches: View) -> None:
    """A convolution whose stride is its kernel's size, of pixels that were put into rows (m, k)."""
    weight, bias = own_weights(node)
    m, k = patches.shape
    n = weight.shape[0]
    batch, _, height, width = node.outputs[0].shape
    epilogue = _absorb_map(context, node, (1, batch, height, width, n), bias)
    _emit(context, node, _gemm(Rows(patches, 1, m, 0, k), n, k), patches, weight.reshape(1, n, k).swapaxes(1, 2), epilogue)


def lower_transposed(context: Context, node: gs.Node) -> None:
    """A transposed convolution whose stride is its kernel's size: a product whose columns are pixels."""
    weight, bias = own_weights(node)
    groups = node.attrs.get("group", 1)
    scale = weight.shape[2]
    sizes = {*weight.shape[2:], *node.attrs.get("strides", [1])}
    if sizes != {scale} or any(node.attrs.get("pads", [])) or any(node.attrs.get("output_padding", [])):
        raise CannotLower(f"{label(node)} (ConvTranspose): only kernels of the stride's size, without padding, are possible")
    batch, _, height, width = node.inputs[0].shape
    if list(node.outputs[0].shape[2:]) != [scale * height, scale * width]:
        raise CannotLower(f"{label(node)} (ConvTranspose): its output is cut or padded to {node.outputs[0].shape[2:]}")
    k, channels = weight.shape[0] // groups, weight.shape[1]
    rows = _pixels(context, node, groups, weight.dtype.name)
    epilogue = _absorb_map(context, node, (groups, batch, scale * height, scale * width, channels), bias)
    if epilogue.bias is not None:
        epilogue = replace(epilogue, bias=np.tile(epilogue.bias, (1, scale * scale)))
    n = scale * scale * channels
    operation = replace(_gemm(rows, n, k), out_row=channels, scatter=Scatter(scale, width))
    values = weight.reshape(groups, k, channels, scale, scale).transpose(0, 1, 3, 4, 2).reshape(groups, k, n)
    _emit(context, node, operation, rows.view, values, epilogue)


def _gemm(rows: Rows, n: int, k: int, w_shared: bool = False) -> Gemm:
    """The bare product, into contiguous memory."""
    return Gemm(
        groups=rows.groups, m=rows.m, n=n, k=k, a_row=rows.row, a_group=rows.group, a_offset=rows.view.offset, dtype=rows.view.dtype,
        w_shared=w_shared, out_row=n, out_group=rows.m * n,
    )  # fmt: skip


def _axes(rows: Rows, n: int) -> tuple[Factor, ...]:
    return (rows.groups, rows.m * n), (rows.m, n), (n, 1)


def _absorb_map(context: Context, node: gs.Node, shape: Sequence[int], bias: NDArray[Any] | None) -> Epilogue:
    """What follows a product whose output is a map (groups, B, H, W, C)."""
    groups, *pixels, channels = shape
    m = math.prod(pixels)
    axes = ((groups, m * channels), (m, channels), (channels, 1))
    epilogue = absorb(context, node, map_output(node, shape), axes, STEPS[bias is not None :], ACTIVATIONS)
    return with_own_bias(epilogue, bias, groups)


def _emit(
    context: Context,
    node: gs.Node,
    operation: Gemm,
    a: View,
    weight: NDArray[Any],
    epilogue: Epilogue,
    tables: dict[str, Buffer] | None = None,
) -> None:
    """The call, with the epilogue in it."""
    bias, residual = epilogue.bias, epilogue.residual
    shared = bias is not None and bool((bias == bias[:1]).all())
    activation: Any = epilogue.activation  # one of ACTIVATIONS
    operation = replace(operation, activation=activation, out_dtype=epilogue.out.dtype, out_relu=epilogue.relu is not None)
    if bias is not None:
        operation = replace(operation, bias=bias.dtype.name, bias_shared=shared)
    if residual is not None:
        group, row, _ = residual.strides
        operation = replace(operation, residual=residual.view.dtype, r_group=group, r_row=row, r_offset=residual.view.offset)
    operands: dict[str, Buffer | None] = {
        "a": a.buffer,
        "weight": constant(f"{label(node)}/weight", weight).buffer,
        "bias": None if bias is None else constant(f"{label(node)}/bias", bias[:1] if shared else bias).buffer,
        "residual": None if residual is None else residual.view.buffer,
        "out": epilogue.out.buffer,
        "out_relu": None if epilogue.relu is None else epilogue.relu.buffer,
        **(tables or {}),
    }
    context.call(operation, operands, ["out", *(["out_relu"] if epilogue.relu else [])], node)
    context.finish(node)


def _shared_rows(view: View) -> Rows:
    """For one weight: rows that go on in two steps become groups."""
    unit(view.dims[-1])
    factors = view.flat(0, -1)
    if len(factors) > 2:
        raise CannotView
    groups, group = factors[0] if len(factors) == 2 else (1, 0)
    m, row = factors[-1] if factors else (1, view.shape[-1])
    return Rows(view, groups, m, group, row)


def _grouped_rows(view: View) -> Rows:
    """For a weight a group: (groups, m, k)."""
    group, rows, channels = view.dims
    unit(channels)
    return Rows(view, view.shape[0], view.shape[1], stride(group), stride(rows) or view.shape[2])


def _pixels(context: Context, node: gs.Node, groups: int, dtype: str) -> Rows:
    """A node's first input, (B, groups * C, H, W), as rows of a pixel's channels; a copy where it does not lie so."""
    view = context.operand(node.inputs[0], node, dtype)
    try:
        return _pixel_rows(view, groups)
    except CannotView:
        return _pixel_rows(channels_last_copy(context, node, view, groups), groups)


def _pixel_rows(view: View, groups: int) -> Rows:
    batch, channels, height, width = view.dims
    group, channel = View(view.buffer, 0, (channels,)).reshape((groups, view.shape[1] // groups)).dims
    unit(channel)
    pixels = View(view.buffer, 0, (batch, height, width))
    return Rows(view, groups, pixels.size, stride(group), stride(pixels.flat()) or view.shape[1])
