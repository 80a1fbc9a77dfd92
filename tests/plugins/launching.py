"""Running a `Launch`: under Triton's interpreter on the CPU, or on this machine's GPU by the path that plans take."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.launch import Address, Descriptor, Launch

Arrays = Mapping[str, NDArray[Any]]


def interpret(launch: Launch, operands: Arrays) -> None:
    """Run a launch on the CPU; outputs change in place. TRITON_INTERPRET=1 must have been set before triton was imported.

    Args:
        operands: name -> contiguous array, float16 (never bfloat16, which the interpreter multiplies wrongly), float32 or integers.
    """
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    module, _, name = launch.kernel.function.partition(":")
    function = getattr(importlib.import_module(module), name)
    flat = {operand: torch.from_numpy(array).view(-1) for operand, array in operands.items()}

    def value(given: Any) -> Any:
        match given:
            case Address():
                return flat[given.operand][given.offset :]
            case Descriptor():
                base = flat[given.operand][given.offset :]
                return TensorDescriptor(base, list(given.shape), list(given.strides), list(given.block))
        return given

    arguments = {argument: value(given) for (argument, _), given in zip(launch.kernel.types, launch.values, strict=True)}
    function[launch.grid](**arguments, **dict(launch.kernel.constants))


def without_overlap(launch: Launch) -> Launch:
    """The launch without programmatic dependent launch, which the interpreter does not know."""
    constants = tuple((name, False if name == "OVERLAPS" else value) for name, value in launch.kernel.constants)
    return replace(launch, kernel=replace(launch.kernel, constants=constants, overlaps=False))


def run_on_gpu(launch: Launch, operands: Arrays) -> dict[str, NDArray[Any]]:
    """Compile a launch for this machine's GPU and run it once. Returns every operand as it is afterwards."""
    from smc.compiler.launch_program import assemble
    from smc.exported.engines import cuda_launch, cuda_memory

    device = cuda_memory.devices()[0]
    cuda_memory.use_device(device.index)
    dtypes = {name: "bfloat16" if array.dtype == np.uint16 else array.dtype.name for name, array in operands.items()}  # its bits
    plan, code = assemble([launch], {name: (dtypes[name], array.shape) for name, array in operands.items()}, sm=sm_number(device.sm))
    program = plan.programs[0]
    pool, stream = cuda_memory.device_pool(), cuda_memory.Stream()
    arena = cuda_memory.DeviceArray(pool, (program.arena_bytes,), np.uint8)
    for name, array in operands.items():
        stream.copy(arena.address + program.inputs[name].offset, array.ctypes.data, array.nbytes)
    cuda_launch.enqueue(program, cuda_launch.Kernels(code, plan.kernels), {"arena": arena.address, "weights": 0}, stream)
    results = {name: np.empty_like(array) for name, array in operands.items()}
    for name, array in results.items():
        stream.copy(array.ctypes.data, arena.address + program.inputs[name].offset, array.nbytes)
    stream.synchronize()
    return results


def sm_number(sm: str) -> int:
    """ "9.0" -> 90"""
    return int(sm.replace(".", ""))
