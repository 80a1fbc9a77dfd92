"""Weights of nodes as arrays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.context import CannotLower
from smc.compiler.lowering.epilogue import Epilogue
from smc.passes.base import label
from smc.passes.tensors import constant_value, has_input


def own_weights(node: gs.Node) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """Weight and bias of a convolution, which must be constants."""
    weight = constant_value(node.inputs[1])
    bias = constant_value(node.inputs[2]) if has_input(node, 2) else None
    if weight is None or (bias is None and has_input(node, 2)):
        raise CannotLower(f"{label(node)} ({node.op}): its weights are not constants")
    return weight, bias


def kernel_shape(node: gs.Node) -> list[int]:
    """(height, width) of a convolution's kernel. The attribute of that name is optional, and the weight's shape says the same."""
    return list(node.inputs[1].shape[2:])


def with_own_bias(epilogue: Epilogue, bias: NDArray[Any] | None, groups: int) -> Epilogue:
    """A convolution's own bias (groups * N,), as (groups, N)."""
    return epilogue if bias is None else replace(epilogue, bias=bias.reshape(groups, -1))
