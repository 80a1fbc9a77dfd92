"""Lowering small graphs and checking what they compute: simulated calls against ONNX Runtime."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from smc.compiler.graph_runner import GraphRunner
from smc.compiler.launch_program import itemsize
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lower import Lowered, lower
from smc.compiler.operations import default_tile, launches, workspace
from smc.passes.prepare import prepare
from smc.plugins.launch import Address, Descriptor
from tests.compiler.lowering.simulation import run
from tests.passes.graphs import Builder

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16

TOLERANCES = {FLOAT: 2e-6, HALF: 2e-3}
"""On ||a - b|| / ||b||. Calls round once where the graph rounds after every operation."""


def check(model: onnx.ModelProto, tolerance: float = TOLERANCES[FLOAT]) -> Sequence[Call]:
    """The calls of a model without dynamic dimensions, which must compute what it does."""
    return check_graph(prepare(model), tolerance)


def check_graph(graph: gs.Graph, tolerance: float) -> Sequence[Call]:
    feeds = {tensor.name: random_values(tensor, seed) for seed, tensor in enumerate(graph.inputs)}
    expected = GraphRunner(graph).run(feeds)
    made = lower(graph)
    compare(made, feeds, expected, tolerance)
    return made.calls


def compare(made: Lowered, feeds: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], tolerance: float) -> None:
    """That the calls compute these outputs, and that their launches read what is there."""
    found = run(made, feeds)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].shape == values.shape
        assert found[name].dtype == values.dtype
        assert made.outputs[name].is_contiguous()
        theirs, ours = values.astype(np.float64), found[name].astype(np.float64)
        assert np.linalg.norm(theirs) > 0
        assert np.linalg.norm(ours - theirs) <= tolerance * np.linalg.norm(theirs), name
    for call in made.calls:
        for sm in (80, 90):
            check_launches(call, sm)


def check_launches(call: Call, sm: int) -> None:
    """That a call's launches take its operands in their types, inside their memory and from where they may start."""
    tile = default_tile(call.operation, sm)
    sizes = {name: (buffer.dtype, buffer.size) for name, buffer in call.operands.items()}
    sizes |= {name: (dtype, math.prod(shape)) for name, (dtype, shape) in workspace(call.operation, tile).items()}
    for launch in launches(call.operation, tile, sm):
        for value in launch.values:
            if not isinstance(value, Address | Descriptor):
                continue
            dtype, size = sizes[value.operand]
            assert value.dtype == dtype, f"{call.label}: {value.operand} is {dtype}, and its kernel takes {value.dtype}"
            assert 0 <= value.offset < size
            assert value.offset * itemsize(dtype) % 16 == 0, f"{call.label}: {value.operand} starts at element {value.offset}"
            if isinstance(value, Descriptor):
                last = sum((extent - 1) * stride for extent, stride in zip(value.shape, value.strides, strict=True))
                assert value.offset + last < size
                assert all(stride * itemsize(dtype) % 16 == 0 for stride in value.strides[:-1])


def random_values(tensor: gs.Tensor, seed: int = 0) -> NDArray[Any]:
    random = np.random.default_rng([seed, 1])
    dtype = np.dtype(tensor.dtype)
    if dtype.kind in "ui":
        return random.integers(0, 256, tensor.shape).astype(dtype)
    return random.standard_normal(tensor.shape).astype(dtype)


def kinds(calls: Sequence[Call]) -> list[str]:
    """What the calls do, in order: the operation's kind, and an Elementwise's function."""
    names = [type(call.operation).__name__ for call in calls]
    return [call.operation.function if name == "Elementwise" else name for call, name in zip(calls, names, strict=True)]


def half(b: Builder, tensor: str) -> str:
    return b.op("Cast", tensor, to=HALF)


def single(b: Builder, tensor: str) -> str:
    return b.op("Cast", tensor, to=FLOAT)
