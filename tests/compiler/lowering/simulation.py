"""Running a lowered graph on the CPU, with each operation's plain reference in its kernel's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lower import Lowered
from smc.compiler.lowering.views import Buffer
from smc.plugins.conv import reference as conv_reference
from smc.plugins.conv.specification import Conv, Map
from smc.plugins.descriptor_head import reference as descriptor_reference
from smc.plugins.descriptor_head.specification import DescriptorHead
from smc.plugins.elementwise import reference as elementwise_reference
from smc.plugins.elementwise.specification import Elementwise
from smc.plugins.flash_attention import reference as attention_reference
from smc.plugins.flash_attention.launches import Attention, Heads
from smc.plugins.flash_attention.specification import FlashAttention
from smc.plugins.gemm import reference as gemm_reference
from smc.plugins.gemm.specification import Gemm
from smc.plugins.layer_norm import reference as norm_reference
from smc.plugins.layer_norm.specification import LayerNorm
from smc.plugins.patches import reference as patches_reference
from smc.plugins.patches.specification import Patches
from smc.plugins.point_head import reference as point_reference
from smc.plugins.point_head.specification import PointHead
from smc.plugins.reduction import reference as reduction_reference
from smc.plugins.reduction.specification import Reduction
from smc.plugins.upsample import reference as upsample_reference
from smc.plugins.upsample.specification import Upsample

Flat = NDArray[Any]
Operands = Mapping[str, Flat]


def run(lowered: Lowered, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs for the inputs, both by name. What no call has written is NaN, so that reading it shows."""
    memory: dict[Buffer, Flat] = {}

    def flat(buffer: Buffer) -> Flat:
        if buffer not in memory:
            if buffer.values is not None:
                memory[buffer] = buffer.values.reshape(-1)
            else:
                memory[buffer] = (
                    np.full(buffer.size, np.nan, buffer.dtype) if "float" in buffer.dtype else np.zeros(buffer.size, buffer.dtype)
                )
        return memory[buffer]

    for name, view in lowered.inputs.items():
        assert inputs[name].dtype.name == view.dtype
        flat(view.buffer)[view.offset : view.offset + view.size] = inputs[name].reshape(-1)
    for call in lowered.calls:
        _run_call(call, {name: flat(buffer) for name, buffer in call.operands.items()})
    return {name: view.as_array(flat(view.buffer)).copy() for name, view in lowered.outputs.items()}


def _run_call(call: Call, operands: Operands) -> None:
    _RUN[type(call.operation)](call.operation, operands)


def _strided(flat: Flat, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Flat:
    """A view that can be written to; strides and offset in elements."""
    return np.lib.stride_tricks.as_strided(flat[offset:], shape, [stride * flat.itemsize for stride in strides])


def _gemm(op: Gemm, operands: Operands) -> None:
    values = gemm_reference.gemm(op, operands)
    positions = gemm_reference.positions(op, op.out_offset, op.out_group, op.out_row)
    operands["out"][positions] = values
    if op.out_relu:
        operands["out_relu"][positions] = np.maximum(values, 0)


def _map(flat: Flat, where: Map, shape: tuple[int, ...]) -> Flat:
    return _strided(flat, where.offset, shape, (where.group, where.batch, where.row, where.column, 1))


def _conv(op: Conv, operands: Operands) -> None:
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.out_channels)
    x = _map(operands["x"], op.x, (op.groups, op.batch, op.height, op.width, op.in_channels))
    weight = operands["weight"].reshape(op.groups, op.size, op.size, op.in_channels, op.out_channels)
    bias = operands["bias"].reshape(op.groups, -1) if op.bias else None
    residual = _map(operands["residual"], op.residual, shape) if op.residual else None
    values = conv_reference.conv(x, weight, op.stride, op.padding, bias, residual)
    if op.activation == "relu":
        values = np.maximum(values, 0)
    _map(operands["out"], op.out, shape)[:] = values
    if op.out_relu:
        _map(operands["out_relu"], op.out_relu, shape)[:] = np.maximum(values, 0)


def _upsample(op: Upsample, operands: Operands) -> None:
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.channels)
    x = _map(operands["x"], op.x, (op.groups, op.batch, op.height, op.width, op.channels))
    residual = _map(operands["residual"], op.residual, shape) if op.residual else None
    values = upsample_reference.upsample(x, op.out_height, op.out_width, residual)
    _map(operands["out"], op.out, shape)[:] = values
    if op.out_relu:
        _map(operands["out_relu"], op.out_relu, shape)[:] = np.maximum(values, 0)


def _attention(op: Attention, operands: Operands) -> None:
    def heads(name: str, where: Heads, rows: int) -> Flat:
        shape = (op.batch, rows, op.heads, op.head_size)
        return _strided(operands[name], where.offset, shape, (where.batch, where.row, where.head, 1))

    q, k, v = (
        heads(name, where, rows).reshape(op.batch, rows, -1)
        for name, where, rows in (("q", op.q, op.n), ("k", op.k, op.m), ("v", op.v, op.m))
    )
    k, v = (np.roll(x, -op.kv_shift, axis=0) for x in (k, v))
    tables = [operands[name].reshape(-1, op.head_size // 2) for name in ("cos_q", "sin_q", "cos_k", "sin_k")] if op.tables else []
    out = attention_reference.flash_attention(FlashAttention(op.heads, op.head_size, op.scale), q, k, v, *tables)
    heads("out", op.out, op.n)[:] = out.reshape(op.batch, op.n, op.heads, op.head_size)


def _layer_norm(op: LayerNorm, operands: Operands) -> None:
    shape = (op.groups, op.rows, op.channels)
    x = _strided(operands["x"], op.x_offset, shape, (op.x_group, op.x_row, 1))
    scale, bias = (
        None if given is None else operands[name].reshape((-1,) if op.shared else (op.groups, -1))
        for name, given in (("scale", op.scale), ("bias", op.bias))
    )
    _strided(operands["out"], op.out_offset, shape, (op.out_group, op.out_row, 1))[:] = norm_reference.layer_norm(x, scale, bias, op.eps)


def _patches(op: Patches, operands: Operands) -> None:
    shape = (op.batch, op.height, op.width, op.channels) if op.layout == "nhwc" else (op.batch, op.channels, op.height, op.width)
    operands["out"][:] = patches_reference.patches(op, operands["image"].reshape(shape)).reshape(-1)


def _point_head(op: PointHead, operands: Operands) -> None:
    x = _map(operands["x"], op.x, (op.groups, op.batch, op.height, op.width, op.in_channels))
    shapes = {
        "weight": (op.groups, op.size, op.size, op.in_channels, op.channels), "bias": (op.groups, op.channels),
        "weight_out": (op.groups, op.channels, 4), "bias_out": (op.groups, 4),
    }  # fmt: skip
    points, confidence = point_reference.point_head(
        x, *(operands[name].reshape(shape) for name, shape in shapes.items()), op.norm_floor, op.conf_floor
    )
    pixels = op.batch * op.height * op.width
    _strided(operands["pts3d"], 0, (op.groups, 3 * pixels), (op.pts3d_group, 1))[:] = points.reshape(op.groups, -1)
    _strided(operands["conf"], 0, (op.groups, pixels), (op.conf_group, 1))[:] = confidence.reshape(op.groups, -1)


def _descriptor_head(op: DescriptorHead, operands: Operands) -> None:
    shape = (op.groups, op.batch * op.h * op.w, (op.channels + 1) * op.patch**2)
    descriptors, confidence = descriptor_reference.descriptor_head(
        op, _strided(operands["f"], op.f_offset, shape, (op.f_group, op.f_row, 1))
    )
    operands["desc"][:], operands["desc_conf"][:] = descriptors.reshape(-1), confidence.reshape(-1)


def _elementwise(op: Elementwise, operands: Operands) -> None:
    inputs = [operands[name] for name in "xy"[: len(op.inputs)]]
    elementwise_reference.view(operands["out"], op.out, op.shape)[:] = elementwise_reference.elementwise(op, *inputs)


def _reduction(op: Reduction, operands: Operands) -> None:
    x = _strided(operands["x"], op.x_offset, (op.rows, op.columns), (op.x_row, op.x_column))
    operands["out"][:] = reduction_reference.reduction(op, x)


_RUN: dict[type, Callable[[Any, Operands], None]] = {
    Gemm: _gemm,
    Conv: _conv,
    Upsample: _upsample,
    Attention: _attention,
    LayerNorm: _layer_norm,
    Patches: _patches,
    PointHead: _point_head,
    DescriptorHead: _descriptor_head,
    Elementwise: _elementwise,
    Reduction: _reduction,
}
