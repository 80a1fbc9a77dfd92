"""What follows a product and its kernel does as well: bias, activation, residual, a cast, and a ReLU beside the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.lowering.context import Context, aligned, constant, dtype_name
from smc.compiler.lowering.movement import MOVES
from smc.compiler.lowering.views import Buffer, CannotView, Factor, View, strides_along
from smc.passes.tensors import constant_value
from smc.plugins.launch import ITEMSIZES

Steps = Sequence[str]
"""What a kernel does after its product, in its order: "bias", "activation", "residual"."""


@dataclass(frozen=True)
class Residual:
    """An operand to add: where it lies, and its strides along the output's axes."""

    view: View
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Epilogue:
    """What is to be done with a product.

    Attributes:
        out: the last tensor, in memory of its type that is laid out as the product's axes.
        bias: (groups, channels), or None.
        activation: "none", "gelu" or "relu".
        residual: or None.
        relu: where max(out, 0) goes, if something reads that beside.
    """

    out: View
    bias: NDArray[np.generic] | None = None
    activation: str = "none"
    residual: Residual | None = None
    relu: View | None = None


def absorb(context: Context, node: gs.Node, product: View, axes: Sequence[Factor], steps: Steps, activations: Sequence[str]) -> Epilogue:
    """Follow a product through the nodes that its kernel can do, and bind what comes out.

    Args:
        context: in which the product's node is the next to be lowered.
        node: makes the product.
        product: its output over new memory, whose layout is `axes`.
        axes: (size, stride) of groups, of what lies between, and of channels.
        steps: what the kernel does after the product, in its order.
        activations: the ONNX operations that it knows.
    """
    follower = _Follower(context, axes, steps, activations)
    return follower.run(node.outputs[0], product)


class _Follower:
    def __init__(self, context: Context, axes: Sequence[Factor], steps: Steps, activations: Sequence[str]) -> None:
        self._context, self._axes, self._activations = context, axes, activations
        self._left = list(steps)

    def run(self, tensor: gs.Tensor, view: View) -> Epilogue:
        done = Epilogue(view)
        passed: list[gs.Node] = []  # moved through, and worth it only if something is absorbed behind them
        last = tensor
        while (node := self._context.sole_reader(tensor)) is not None and not self._context.is_done(node):
            if node.op in MOVES and node.inputs[0] is tensor and len(node.outputs) == 1:
                try:
                    (view,) = MOVES[node.op](node, view)
                except CannotView:
                    break
                passed.append(node)
                tensor = node.outputs[0]
                continue
            further = self._absorb(node, tensor, replace(done, out=view))
            if further is None:
                break
            done = further
            for finished in (*passed, node):
                self._context.finish(finished)
            passed = []
            tensor = last = node.outputs[0]
            view = done.out
        dtype = dtype_name(last)
        buffer = Buffer(last.name, dtype, done.out.buffer.size)
        out = replace(done.out, buffer=buffer)
        self._context.bind(last, out)
        relus = [reader for reader in self._context.readers(last) if reader.op == "Relu"]
        relu = None
        if relus:
            relu = replace(out, buffer=Buffer(relus[0].outputs[0].name, dtype, buffer.size))
            for reader in relus:
                self._context.bind(reader.outputs[0], relu)
                self._context.finish(reader)
        return replace(done, out=out, relu=relu)

    def _absorb(self, node: gs.Node, tensor: gs.Tensor, done: Epilogue) -> Epilogue | None:
        """With `node` done as well, or None where the kernel cannot."""
        if list(node.outputs[0].shape) != list(tensor.shape):
            return None
        if node.op == "Cast":
            return done if dtype_name(node.outputs[0]) in ITEMSIZES else None
        if node.op in self._activations and (node.op != "Gelu" or node.attrs.get("approximate", "none") == "none"):
            return replace(done, activation=node.op.lower()) if self._take("activation") else None
        if node.op != "Add":
            return None
        other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
        if other is tensor:
            return None
        values = constant_value(other)
        try:
            if values is not None:
                bias = self._bias(values, done.out)
                return replace(done, bias=bias) if self._take("bias") else None
            if not self._context.is_ready(other) or list(other.shape) != list(tensor.shape):
                return None
            residual = self._residual(self._context.view(other), done.out)
            return replace(done, residual=residual) if self._take("residual") else None
        except CannotView:
            return None

    def _take(self, step: str) -> bool:
        """Whether the step can come next; what comes before it cannot any more."""
        if step not in self._left:
            return False
        del self._left[: self._left.index(step) + 1]
        return True

    def _bias(self, values: NDArray[np.generic], out: View) -> NDArray[np.generic]:
        """(groups, channels). Raises CannotView where it is anything else."""
        spread = constant("bias", values).expand(out.shape)
        group, *between, channel = strides_along(self._axes, out, spread)
        if any(between):
            raise CannotView
        (groups, _), *_, (channels, _) = self._axes
        flat = values.reshape(-1)
        return flat[spread.offset + group * np.arange(groups)[:, None] + channel * np.arange(channels)]

    def _residual(self, view: View, out: View) -> Residual:
        strides = strides_along(self._axes, out, view)
        if view.dtype not in ITEMSIZES:
            raise CannotView
        aligned(view, *strides[:-1])
        if strides[-1] != 1:
            raise CannotView
        return Residual(view, tuple(strides))
