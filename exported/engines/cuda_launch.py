"""Loading cubins and launching their kernels, through the CUDA driver alone.

The primary context of the thread's device must be current: `cuda_memory.use_device` sees to it.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from cuda.bindings import driver

from smc.exported.engines.cuda_memory import WHOLE_GPU, Event, Graph, Stream
from smc.exported.engines.cuda_program import Argument, Float32, Int32, KernelCode, Pointer, Program, Space, TensorMap
from smc.exported.errors import BackendFailed, OutOfMemory

_STATIC_LIMIT = 48 << 10
"""Bytes of shared memory a block above which a kernel must be told so."""


class Kernels:
    """A plan's kernels, each loaded into the GPU when it is first launched, by whichever thread."""

    def __init__(self, code: memoryview | bytes, kernels: Sequence[KernelCode]) -> None:
        """`code` is `kernels.bin`."""
        self._code, self._kernels = code, kernels
        self._loaded: dict[int, Any] = {}
        self._libraries: list[Any] = []
        self._lock = threading.Lock()
        weakref.finalize(self, WHOLE_GPU.clean_up, _unload, self._libraries).atexit = False

    def __getitem__(self, index: int) -> Any:
        with self._lock:
            if index not in self._loaded:
                self._loaded[index] = self._load(self._kernels[index])
            return self._loaded[index]

    def threads(self, index: int) -> int:
        return self._kernels[index].threads

    def shared_memory(self, index: int) -> int:
        return self._kernels[index].shared_memory

    def _load(self, kernel: KernelCode) -> Any:
        cubin = bytes(self._code[kernel.offset : kernel.offset + kernel.size])
        library = check(driver.cuLibraryLoadData(cubin, None, None, 0, None, None, 0), f"loading {kernel.name}")
        self._libraries.append(library)
        function = check(driver.cuLibraryGetKernel(library, kernel.name.encode()), f"finding {kernel.name}")
        function = check(driver.cuKernelGetFunction(function), f"finding {kernel.name}")
        if kernel.shared_memory > _STATIC_LIMIT:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(function, attribute, kernel.shared_memory), f"giving {kernel.name} shared memory")
        return function


def capture(program: Program, kernels: Kernels, bases: Mapping[Space, int], stream: Stream) -> Graph:
    """A program's launches as one graph. Arguments and errors as for `enqueue`; nothing runs."""
    for step in program.steps:
        kernels[step.kernel]  # loaded now, and streams and events made: a capture is no place for it
    lanes = _Lanes(program, stream)
    return Graph(stream, lambda: _enqueue(program, kernels, bases, lanes), code=kernels)


def enqueue(program: Program, kernels: Kernels, bases: Mapping[Space, int], stream: Stream) -> None:
    """Queue a program's launches on a stream.

    Args:
        program: what to launch.
        kernels: of its plan.
        bases: where each space starts in the GPU's memory.
        stream: takes them.

    Raises:
        BackendFailed, OutOfMemory: CUDA refused.
    """
    _enqueue(program, kernels, bases, _Lanes(program, stream))


class _Lanes:
    """A stream for each of a program's lanes, and events for the steps that others wait for."""

    def __init__(self, program: Program, stream: Stream) -> None:
        self.main = stream
        self.side = {lane: Stream(urgent=False) for lane in sorted({step.lane for step in program.steps} - {0})}
        awaited = sorted({number for step in program.steps for number in step.waits})
        self.ended = {number: Event() for number in awaited}
        self.begun, self.joined = Event(), {lane: Event() for lane in self.side}


def _enqueue(program: Program, kernels: Kernels, bases: Mapping[Space, int], lanes: _Lanes) -> None:
    lanes.begun.record(lanes.main)
    for stream in lanes.side.values():
        stream.wait(lanes.begun)
    fresh = set(lanes.side)  # lanes in which nothing was launched yet
    for number, step in enumerate(program.steps):
        stream = lanes.side.get(step.lane, lanes.main)
        for other in step.waits:
            stream.wait(lanes.ended[other])
        # Only what follows another kernel in its stream, and waits for nothing else, can begin before that one ends.
        overlaps = step.overlaps and not step.waits and step.lane not in fresh
        launch(kernels, step.kernel, step.grid, _c_values(step.arguments, bases), stream, step.label or str(step.kernel), overlaps)
        fresh.discard(step.lane)
        if number in lanes.ended:
            lanes.ended[number].record(stream)
    for lane, stream in lanes.side.items():
        lanes.joined[lane].record(stream)
        lanes.main.wait(lanes.joined[lane])


def launch(
    kernels: Kernels,
    number: int,
    grid: tuple[int, int, int],
    arguments: Sequence[Any],
    stream: Stream,
    label: str,
    overlaps: bool = False,
) -> None:
    """Queue one launch.

    Args:
        kernels: of a plan; number: which of them.
        grid: blocks along x, y and z.
        arguments: C values in the kernel's order, or tensor maps.
        stream: takes it.
        label: what it computes, for errors.
        overlaps: whether it may start while what is queued before it ends.

    Raises:
        BackendFailed, OutOfMemory: CUDA refused.
    """
    function = kernels[number]
    owners, pointers = _parameters(arguments)
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = kernels.threads(number), 1, 1
    config.sharedMemBytes = kernels.shared_memory(number)
    config.hStream = stream.handle
    if overlaps:
        attribute = driver.CUlaunchAttribute()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs = [attribute]
        config.numAttrs = 1
    check(driver.cuLaunchKernelEx(config, function, ctypes.addressof(pointers), 0), f"launching {label}")
    del owners  # the driver has copied the arguments


def _c_values(arguments: Sequence[Argument], bases: Mapping[Space, int]) -> list[Any]:
    """A step's arguments as `launch` takes them."""
    values: list[Any] = []
    for argument in arguments:
        match argument:
            case Pointer():
                values.append(ctypes.c_uint64(bases[argument.space] + argument.offset))
            case Int32():
                values.append(ctypes.c_int32(argument.value))
            case Float32():
                values.append(ctypes.c_float(argument.value))
            case TensorMap():
                values.append(_tensor_map(argument, bases))
                values += map(ctypes.c_int32, argument.shape)
                values += map(ctypes.c_int64, argument.strides)
    return values


def _parameters(arguments: Sequence[Any]) -> tuple[list[Any], Any]:
    """All that a kernel takes, and the array of pointers to it that a launch takes."""
    # Behind the arguments is Triton's scratch memory, of which no kernel of a plan needs any.
    values = [*arguments, ctypes.c_uint64(0), ctypes.c_uint64(0)]
    addresses = [int(value.getPtr()) if isinstance(value, driver.CUtensorMap) else ctypes.addressof(value) for value in values]
    return values, (ctypes.c_void_p * len(addresses))(*addresses)


def _tensor_map(argument: TensorMap, bases: Mapping[Space, int]) -> Any:
    rank = len(argument.shape)
    encoded = driver.cuTensorMapEncodeTiled(
        driver.CUtensorMapDataType(argument.element),
        rank,
        bases[argument.space] + argument.offset,
        [driver.cuuint64_t(size) for size in reversed(argument.shape)],
        [driver.cuuint64_t(stride * argument.itemsize) for stride in reversed(argument.strides[:-1])],
        [driver.cuuint32_t(size) for size in reversed(argument.box)],
        [driver.cuuint32_t(1)] * rank,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle(argument.swizzle),
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    return check(encoded, f"describing a tensor of {argument.shape}, strides {argument.strides}, blocks {argument.box}")


def _unload(libraries: list[Any]) -> None:
    for library in libraries:
        driver.cuLibraryUnload(library)


def check(result: tuple[Any, ...], doing: str) -> Any:
    """The value of a driver call. Raises BackendFailed or OutOfMemory."""
    status, *values = result
    if status == driver.CUresult.CUDA_SUCCESS:
        return values[0] if len(values) == 1 else tuple(values) or None
    text = f"{doing}: {driver.cuGetErrorString(status)[1].decode()} ({status.name})"
    if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(text, fix="free GPU memory, or use smaller images or batches")
    raise BackendFailed(text)
