"""CUDA without torch: devices, streams, device memory, page-locked host memory and captured graphs.

A thin layer over the runtime API of cuda-bindings, one object a handle. The current device belongs to the thread: every thread
calls `use_device` before anything else here. Memory comes from pools that keep blocks, since allocating and freeing stop the GPU.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from smc.exported.engines import dlpack
from smc.exported.errors import BackendFailed, NoTarget, OutOfMemory, SmcError

try:
    from cuda.bindings import driver
    from cuda.bindings import runtime as cudart
except ImportError as error:
    raise NoTarget(f"NVIDIA GPUs need cuda-bindings, which cannot be imported ({error})", fix="pip install cuda-bindings") from error

_Status = cudart.cudaError_t

_NO_DEVICE = {
    _Status.cudaErrorNoDevice,
    _Status.cudaErrorInsufficientDriver,
    _Status.cudaErrorInitializationError,
    _Status.cudaErrorSystemDriverMismatch,
    _Status.cudaErrorSystemNotReady,
    _Status.cudaErrorDevicesUnavailable,
}
_FIX = "smc doctor shows what this machine has"

_initialised_in: int | None = None
"""The process that CUDA was initialised in: this one, or one that it was forked from."""


class _WholeGpu:
    """The right to do what waits for everything on the GPU, which CUDA forbids while any thread captures: a capture takes it as well.

    Taken before a pool's own lock: a block may be collected, and put back, inside a capture.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._holds = 0
        self._put_off: deque[Callable[[], object]] = deque()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Wait for the right, and have it for a while."""
        _check_process()  # where a thread that is gone may have it for ever
        try:
            with self._lock, self._counted():
                yield
        finally:
            self._catch_up()

    def clean_up(self, work: Callable[..., object], *arguments: object) -> None:
        """Do a finalizer's work that needs the right: at once, or else when whoever has it gives it back.

        Finalizers must not wait for it. They run in whichever thread lets go of something last: one that may hold what another's capture
        needs to come to its end, or one in the midst of its own capture, which the work would spoil.
        """
        self._put_off.append(partial(work, *arguments))
        self._catch_up()

    def _catch_up(self) -> None:
        while self._put_off and self._lock.acquire(blocking=False):  # another thread that has the right comes by here when it is done
            try:
                if self._holds:  # and so does this one
                    return
                with self._counted():
                    while self._put_off:
                        self._put_off.popleft()()
            finally:
                self._lock.release()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1


WHOLE_GPU = _WholeGpu()


@dataclass(frozen=True)
class Device:
    """A GPU of this machine: its number, the vendor's name, compute capability such as "8.6", and memory."""

    index: int
    name: str
    sm: str
    total_bytes: int


def driver_version() -> tuple[int, int]:
    """The newest CUDA (major, minor) that this machine's driver supports. Raises NoTarget without a driver that works."""
    version = _check_machine(cudart.cudaDriverGetVersion(), "asking for the driver's version")
    if version == 0:
        raise NoTarget("this machine has no NVIDIA driver", fix="install NVIDIA's driver, or use a bundle for CPUs")
    return version // 1000, version % 1000 // 10


def runtime_version() -> tuple[int, int]:
    """The CUDA (major, minor) that cuda-bindings was built for."""
    version = _check(cudart.cudaRuntimeGetVersion(), "asking for CUDA's version")
    return version // 1000, version % 1000 // 10


def devices() -> list[Device]:
    """The GPUs that this process may use, at least one. Raises NoTarget where there is none, or CUDA does not work."""
    global _initialised_in
    driver, library = driver_version(), runtime_version()
    if driver[0] < library[0]:
        raise NoTarget(
            f"cuda-bindings is for CUDA {library[0]}, and this machine's driver for CUDA {driver[0]}.{driver[1]}",
            fix=f"install a driver for CUDA {library[0]} (580 or newer for CUDA 13)",
        )
    count = _check_machine(cudart.cudaGetDeviceCount(), "looking for GPUs")
    _initialised_in = _initialised_in or os.getpid()
    found = []
    for index in range(count):
        properties = _check_machine(cudart.cudaGetDeviceProperties(index), f"asking for the properties of GPU {index}")
        name = properties.name.split(b"\0")[0].decode(errors="replace")
        found.append(Device(index, name, f"{properties.major}.{properties.minor}", properties.totalGlobalMem))
    return found


def use_device(index: int) -> None:
    """Make a GPU the one that this thread's calls are for."""
    _check(cudart.cudaSetDevice(index), f"choosing GPU {index}")


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """Make a GPU the thread's for a while: the caller's own calls, or torch's, may be for another one."""
    before = int(_check(cudart.cudaGetDevice(), "asking for the thread's GPU"))
    use_device(index)
    try:
        yield
    finally:
        if before != index and _is_used(before):
            with suppress(SmcError):
                use_device(before)


def _is_used(index: int) -> bool:
    """Whether this process has a context on a GPU: going back to one without would make it, and take hundreds of megabytes there."""
    status, _, active = driver.cuDevicePrimaryCtxGetState(index)
    return status == driver.CUresult.CUDA_SUCCESS and bool(active)


def free_memory() -> int:
    """Bytes that are free on the thread's GPU."""
    free, _ = _check(cudart.cudaMemGetInfo(), "asking for free memory")
    return int(free)


class Stream:
    """A queue of work on the GPU, independent of the default one."""

    def __init__(self, urgent: bool = True) -> None:
        """Of the blocks that wait for a multiprocessor, those of urgent streams go first."""
        least, most = _check(cudart.cudaDeviceGetStreamPriorityRange(), "asking for priorities")
        priority = most if urgent else least
        stream = _check(cudart.cudaStreamCreateWithPriority(cudart.cudaStreamNonBlocking, priority), "making a stream")
        self.handle = int(stream)
        weakref.finalize(self, cudart.cudaStreamDestroy, stream).atexit = False

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """Queue a copy between any two of host and device addresses."""
        _check(cudart.cudaMemcpyAsync(to, source, nbytes, cudart.cudaMemcpyKind.cudaMemcpyDefault, self.handle), "copying")

    def wait(self, event: Event) -> None:
        """Let what is queued from now on wait for an event. In a capture, this takes another stream into it."""
        _check(cudart.cudaStreamWaitEvent(self.handle, event.handle, 0), "waiting for an event")

    def synchronize(self) -> None:
        """Wait until everything queued is done. Raises BackendFailed if some of it failed."""
        _check(cudart.cudaStreamSynchronize(self.handle), "running on the GPU")


def upload(stream: Stream, to: int, data: memoryview | bytes) -> None:
    """Copy a file's contents to the GPU, and wait for it."""
    source = np.frombuffer(data, np.uint8)
    if source.nbytes:
        stream.copy(to, source.ctypes.data, source.nbytes)
    stream.synchronize()


def elapsed(stream: Stream, enqueue: Callable[[], object]) -> float:
    """Seconds between the beginning and the end of what `enqueue` queues on a stream, by the GPU's clock."""
    begin, end = (_check(cudart.cudaEventCreate(), "making an event") for _ in range(2))
    try:
        _check(cudart.cudaEventRecord(begin, stream.handle), "recording an event")
        enqueue()
        _check(cudart.cudaEventRecord(end, stream.handle), "recording an event")
        stream.synchronize()
        return float(_check(cudart.cudaEventElapsedTime(begin, end), "reading a time")) / 1000
    finally:
        for event in (begin, end):
            cudart.cudaEventDestroy(event)


class Event:
    """A moment on a stream, that others can wait for."""

    def __init__(self) -> None:
        event = _check(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming), "making an event")
        self.handle = int(event)
        weakref.finalize(self, cudart.cudaEventDestroy, event).atexit = False

    def record(self, stream: Stream) -> None:
        """Make it the moment when everything that is queued on a stream now is done."""
        _check(cudart.cudaEventRecord(self.handle, stream.handle), "recording an event")


class Graph:
    """Work captured from a stream, launched as a whole with one call."""

    def __init__(self, stream: Stream, enqueue: Callable[[], None], code: object = None) -> None:
        """Capture what `enqueue` queues on `stream`; nothing of it runs.

        `code` owns the machine code of the kernels in it, and lives as long as the graph: launching one whose code is unloaded ends the
        process.

        Raises:
            BackendFailed: it queued what cannot be captured.
        """
        # Other threads go on allocating meanwhile: only this one's calls may spoil the capture, and whatever waits for the whole GPU.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with WHOLE_GPU.held():
            _check(cudart.cudaStreamBeginCapture(stream.handle, mode), "beginning a capture")
            try:
                enqueue()
            finally:
                ended = cudart.cudaStreamEndCapture(stream.handle)  # also after a failure: the stream would stay in capture
        captured = _check(ended, "ending a capture")
        try:
            self._graph = _check(cudart.cudaGraphInstantiate(captured, 0), "making a captured graph runnable")
        finally:
            cudart.cudaGraphDestroy(captured)
        self._code = code
        weakref.finalize(self, cudart.cudaGraphExecDestroy, self._graph).atexit = False

    def launch(self, stream: Stream) -> None:
        _check(cudart.cudaGraphLaunch(self._graph, stream.handle), "launching a captured graph")


class Block:
    """A piece of a pool's memory, which goes back to the pool with this object."""

    def __init__(self, pool: MemoryPool, address: int, nbytes: int) -> None:
        self.address, self.nbytes = address, nbytes
        self._lent: list[bool] = []
        weakref.finalize(self, pool._put_back, address, nbytes, self._lent).atexit = False

    def lend(self) -> None:
        """Note that other libraries have the address: work of theirs may still be pending when the block is let go."""
        self._lent[:] = [True]


class MemoryPool:
    """Memory in blocks that are kept for the next request of the same size: a plan asks for a few sizes, over and over.

    A block must have no work pending when it is let go, since the next user may be on another stream; unless it was lent.
    """

    def __init__(
        self,
        name: str,
        allocate: Callable[[int], tuple[Any, ...]],
        free: Callable[[int], object],
        settle: Callable[[], object] = lambda: None,
        on_host: bool = False,
    ) -> None:
        """`free` and `settle` wait for everything that runs on the GPU. `on_host` says whose memory it is, for errors."""
        self._name, self._allocate, self._free, self._settle, self._on_host = name, allocate, free, settle, on_host
        self._idle: dict[int, list[int]] = {}  # size -> addresses
        self._lent: dict[int, list[int]] = {}  # those that others may still be at work on
        self._lock = threading.RLock()  # a block may be collected, and put back, inside `take`
        for blocks in (self._idle, self._lent):
            weakref.finalize(self, WHOLE_GPU.clean_up, _free_all, blocks, free).atexit = False

    def take(self, nbytes: int) -> Block:
        """A block of at least 256-byte alignment.

        Raises:
            OutOfMemory: so much is not there.
        """
        nbytes = max(nbytes, 1)  # nothing would have no address, and an empty array needs one
        address = self._pop(nbytes)
        if address is None and self._lent.get(nbytes):
            self._reclaim()
            address = self._pop(nbytes)
        return Block(self, self._new(nbytes) if address is None else address, nbytes)

    def _pop(self, nbytes: int) -> int | None:
        with self._lock:
            addresses = self._idle.get(nbytes)
            return addresses.pop() if addresses else None

    def release(self) -> None:
        """Free what is kept and not in use."""
        with WHOLE_GPU.held(), self._lock:
            _free_all(self._idle, self._free)
            _free_all(self._lent, self._free)

    def _reclaim(self) -> None:
        """Make the blocks that were lent, and have come back, idle ones."""
        with WHOLE_GPU.held(), self._lock:
            returned = {size: list(addresses) for size, addresses in self._lent.items()}  # what comes back meanwhile is not waited for
            self._settle()
            for size, addresses in returned.items():
                del self._lent[size][: len(addresses)]
                self._idle.setdefault(size, []).extend(addresses)

    def _new(self, nbytes: int) -> int:
        _check_process()
        status, address = self._allocate(nbytes)
        if status == _Status.cudaErrorMemoryAllocation:
            self.release()
            status, address = self._allocate(nbytes)
        try:
            _check((status,), f"allocating {self._name}")
        except OutOfMemory as error:
            sizes, fix = f"{error}; {nbytes:,} bytes are needed", error.fix
            if self._on_host:
                fix = "free memory of the host or raise its container's limit, or use smaller images or batches"
            else:
                sizes += f", {free_memory():,} are free on the GPU"
            raise OutOfMemory(sizes, fix=fix) from None
        return int(address)

    def _put_back(self, address: int, nbytes: int, lent: list[bool]) -> None:
        with self._lock:
            (self._lent if lent else self._idle).setdefault(nbytes, []).append(address)


def device_pool() -> MemoryPool:
    """A pool of memory on the GPU."""
    return MemoryPool(
        "GPU memory", cudart.cudaMalloc, cudart.cudaFree, lambda: _check(cudart.cudaDeviceSynchronize(), "waiting for the GPU")
    )


def pinned_pool() -> MemoryPool:
    """A pool of page-locked host memory, which the GPU copies to and from at full speed."""
    return MemoryPool(
        "page-locked memory", lambda nbytes: cudart.cudaHostAlloc(nbytes, cudart.cudaHostAllocDefault), cudart.cudaFreeHost, on_host=True
    )


class DeviceArray:
    """An array on the GPU, contiguous, whose memory is freed with it.

    CuPy, torch and others read it in place (`__cuda_array_interface__`, DLPack), on any of their streams: an array is handed out once
    its values are there. Its memory is used again only when their work is done. `numpy.asarray` copies it to the host.
    """

    def __init__(self, pool: MemoryPool, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._lie(pool.take(math.prod(shape) * np.dtype(dtype).itemsize), 0, shape, np.dtype(dtype))

    def _lie(self, block: Block, offset: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = math.prod(shape) * dtype.itemsize
        self.address = block.address + offset
        self._block = block

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: int | slice) -> DeviceArray:
        """A row, or neighbouring rows, in the same memory."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step != 1:
                raise ValueError("only neighbouring rows are a part of an array")
            shape = (max(0, stop - start), *self.shape[1:])
        else:
            if not -len(self) <= rows < len(self):
                raise IndexError(f"row {rows} of {len(self)}")
            start, shape = rows % len(self), self.shape[1:]
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        part = DeviceArray.__new__(DeviceArray)
        part._lie(self._block, self.address - self._block.address + start * row, shape, self.dtype)
        return part

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        self._block.lend()
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CUDA, int(_check(cudart.cudaPointerGetAttributes(self.address), "asking where an array is").device)

    def __dlpack__(
        self,
        *,
        stream: object = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A DLPack capsule, as the Python array API asks for it. No `stream` has anything to wait for.

        Raises BufferError where a copy is asked for, or another device.
        """
        device = self.__dlpack_device__()
        if copy or dl_device not in (None, device):
            raise BufferError("an array on the GPU is lent as it is; numpy.asarray copies it to the host")
        self._block.lend()
        return dlpack.make_capsule(_array_over(self._block, self.address, self.shape, self.dtype), device, max_version)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> NDArray[Any]:
        if copy is False:
            raise ValueError("an array on the GPU cannot be read from the host without a copy")
        host = np.empty(self.shape, self.dtype)
        with WHOLE_GPU.held():
            _check(cudart.cudaMemcpy(host.ctypes.data, self.address, self.nbytes, cudart.cudaMemcpyKind.cudaMemcpyDefault), "copying")
        return host.astype(self.dtype if dtype is None else dtype, copy=False)


def pinned_array(pool: MemoryPool, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
    """An array in page-locked memory, not initialised. The memory returns to `pool` with the last view of it."""
    block = pool.take(math.prod(shape) * np.dtype(dtype).itemsize)
    return _array_over(block, block.address, shape, np.dtype(dtype))


def _array_over(block: Block, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """A contiguous array in a block's memory, perhaps the GPU's: making it reads nothing. The block lives as long as any view of it."""
    return np.asarray(_Base(block, address, shape, dtype))


class _Base:
    """What numpy keeps as the base of an array in a block."""

    def __init__(self, block: Block, address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.__array_interface__ = {"shape": shape, "typestr": dtype.str, "data": (address, False), "version": 3}


def _free_all(idle: dict[int, list[int]], free: Callable[[int], object]) -> None:
    for addresses in idle.values():
        while addresses:
            free(addresses.pop())


def _check(result: tuple[Any, ...], doing: str) -> Any:
    """The values of a call: None, the one, or a tuple. Raises what its status means."""
    _check_process()
    status, *values = result
    if status != _Status.cudaSuccess:
        raise _translated(status, doing)
    return values[0] if len(values) == 1 else tuple(values) or None


def _check_machine(result: tuple[Any, ...], doing: str) -> Any:
    """As `_check`, for questions about the machine: one that CUDA fails to answer, for whatever reason, has no GPU to use."""
    try:
        return _check(result, doing)
    except NoTarget:
        raise
    except SmcError as error:
        raise NoTarget(str(error), fix=_FIX) from error


def _check_process() -> None:
    """Raise NoTarget in a process that was forked from one that used CUDA, where some calls fail, and others answer as in the parent."""
    if _initialised_in not in (None, os.getpid()):
        raise NoTarget(
            "a GPU cannot be used in a process that was forked after its parent used CUDA",
            fix="load the bundle in the process that uses it, started before CUDA is in use or by multiprocessing's method 'spawn'",
        )


def _translated(status: Any, doing: str) -> SmcError:
    text = f"{doing}: {cudart.cudaGetErrorString(status)[1].decode()} ({status.name})"
    if status == _Status.cudaErrorMemoryAllocation:
        return OutOfMemory(text, fix="free GPU memory, or use smaller images or batches")
    if status in _NO_DEVICE:
        return NoTarget(text, fix=_FIX)
    return BackendFailed(text)
