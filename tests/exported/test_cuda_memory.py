"""Pools are tested with memory of the host; those marked `gpu` run on hardware."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smc.exported.errors import BackendFailed, NoTarget, OutOfMemory

driver = pytest.importorskip("cuda.bindings.driver", reason="needs cuda-bindings")
cudart = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from smc.exported.engines import cuda_memory as cuda  # noqa: E402  # it needs cuda-bindings

SUCCESS, NO_MEMORY = cudart.cudaError_t.cudaSuccess, cudart.cudaError_t.cudaErrorMemoryAllocation


class HostMemory:
    """Allocates on the host, up to a limit, and remembers."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self.blocks: dict[int, ctypes.Array[ctypes.c_char]] = {}

    def allocate(self, nbytes: int) -> tuple[object, int]:
        if nbytes + sum(map(len, self.blocks.values())) > self.limit:
            return NO_MEMORY, 0
        block = ctypes.create_string_buffer(nbytes)
        self.blocks[ctypes.addressof(block)] = block
        return SUCCESS, ctypes.addressof(block)

    def free(self, address: int) -> None:
        del self.blocks[address]

    def pool(self, settle: Callable[[], object] = lambda: None) -> cuda.MemoryPool:
        return cuda.MemoryPool("host memory", self.allocate, self.free, settle)


def test_a_block_returns_to_its_pool() -> None:
    memory = HostMemory()
    pool = memory.pool()
    first, second = pool.take(64), pool.take(64)
    assert first.address != second.address
    address = first.address
    del first
    assert pool.take(32).address != address  # another size
    assert pool.take(64).address == address
    assert len(memory.blocks) == 3


def test_release_frees_what_is_not_in_use() -> None:
    memory = HostMemory()
    pool = memory.pool()
    kept = pool.take(64)
    pool.take(32)
    pool.release()
    assert list(memory.blocks) == [kept.address]


def test_a_pool_frees_its_memory_but_not_before_its_blocks() -> None:
    memory = HostMemory()
    pool = memory.pool()
    block = pool.take(64)
    del pool
    gc.collect()
    assert block.address in memory.blocks
    del block
    gc.collect()
    assert not memory.blocks


def test_idle_blocks_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "free_memory", lambda: 36)
    pool = HostMemory(limit=100).pool()
    pool.take(64)  # idle at once
    held = pool.take(80)
    with pytest.raises(OutOfMemory, match=r"allocating host memory: .*; 64 bytes are needed, 36 are free"):
        pool.take(64)
    assert held.nbytes == 80


def test_page_locked_memory_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaHostAlloc", lambda nbytes, flags: (NO_MEMORY, 0))
    with pytest.raises(OutOfMemory, match=r"allocating page-locked memory: .*; 1,073,741,824 bytes are needed$") as caught:
        cuda.pinned_array(cuda.pinned_pool(), (1 << 30,), np.uint8)
    assert "GPU" not in caught.value.fix
    assert "host" in caught.value.fix


def test_empty_arrays_have_an_address_too() -> None:
    """Which CUDA gives to no memory of 0 bytes."""
    memory = HostMemory()
    pool = cuda.MemoryPool("host memory", lambda nbytes: memory.allocate(nbytes) if nbytes else (SUCCESS, 0), memory.free)
    assert cuda.pinned_array(pool, (0, 2), np.int64).shape == (0, 2)
    assert cuda.DeviceArray(pool, (0, 3), np.float32).address


def test_lent_memory_is_used_again_only_when_others_are_done_with_it() -> None:
    memory = HostMemory()
    waited = []
    pool = memory.pool(lambda: waited.append(len(memory.blocks)))
    for lend in (lambda array: array.__cuda_array_interface__, lambda array: array._block.lend()):
        array = cuda.DeviceArray(pool, (16,), np.float32)
        lend(array)
        address = array.address
        del array
        other = cuda.DeviceArray(pool, (8,), np.float32)  # another size: nobody waits
        assert not waited
        assert cuda.DeviceArray(pool, (16,), np.float32).address == address
        assert len(waited) == 1
        assert cuda.DeviceArray(pool, (16,), np.float32).address == address  # it was not lent since
        assert len(waited) == 1
        waited.clear()
        del other
    assert len(memory.blocks) == 2


def test_lent_memory_is_freed_with_its_pool_and_to_make_room() -> None:
    memory = HostMemory(limit=100)
    pool = memory.pool()
    cuda.DeviceArray(pool, (64,), np.uint8)._block.lend()
    held = pool.take(80)
    assert list(memory.blocks) == [held.address]
    held.lend()
    del held, pool
    gc.collect()
    assert not memory.blocks


@pytest.mark.parametrize("thread", ["its own", "another"])
def test_what_goes_during_a_capture_is_freed_after_it(monkeypatch: pytest.MonkeyPatch, thread: str) -> None:
    """In whichever thread it goes, which does not wait: the capture may need what that thread holds."""

    def free(address: int) -> None:
        order.append("freed")
        memory.free(address)

    def enqueue() -> None:
        if thread == "its own":
            pools.clear()
            return
        other = threading.Thread(target=pools.clear, daemon=True)
        other.start()
        other.join(timeout=20)
        assert not other.is_alive()

    order: list[str] = []
    fake_captures(monkeypatch, order.append)
    memory = HostMemory()
    pools = [cuda.MemoryPool("host memory", memory.allocate, free)]
    pools[0].take(64)
    cuda.Graph(SimpleNamespace(handle=7), enqueue)  # type: ignore[arg-type]
    assert order == ["begun", "ended", "freed"]
    assert not memory.blocks


def fake_captures(monkeypatch: pytest.MonkeyPatch, tell: Callable[[str], object] = lambda moment: None) -> None:
    """CUDA's calls for graphs, which tell when a capture has "begun" and "ended"."""
    for name, call in {
        "cudaStreamBeginCapture": lambda stream, mode: (tell("begun"), (SUCCESS,))[1],
        "cudaStreamEndCapture": lambda stream: (tell("ended"), (SUCCESS, "captured"))[1],
        "cudaGraphInstantiate": lambda captured, flags: (SUCCESS, "graph"),
        "cudaGraphDestroy": lambda graph: (SUCCESS,),
        "cudaGraphExecDestroy": lambda graph: (SUCCESS,),
    }.items():
        monkeypatch.setattr(cudart, name, call)


def test_cleaning_up_waits_for_the_outermost() -> None:
    whole_gpu, done = cuda._WholeGpu(), list[int]()
    with whole_gpu.held():
        with suppress(KeyError), whole_gpu.held():
            whole_gpu.clean_up(done.append, 1)
            raise KeyError
        assert not done
    assert done == [1]
    whole_gpu.clean_up(whole_gpu.clean_up, done.append, 2)  # something is collected while something else is freed
    assert done == [1, 2]


def test_pools_serve_threads() -> None:
    pool = HostMemory().pool()
    clashes = []

    def work() -> None:
        for _ in range(300):
            array = cuda.pinned_array(pool, (16,), np.int64)
            array[:] = threading.get_ident()
            if (array != threading.get_ident()).any():
                clashes.append(array)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes


def test_a_pinned_array_keeps_its_memory_as_long_as_any_view() -> None:
    memory = HostMemory()
    pool = memory.pool()
    array = cuda.pinned_array(pool, (2, 3), np.float32)
    assert (array.shape, array.dtype) == ((2, 3), np.float32)
    address, view = array.ctypes.data, array[1]
    view[:] = 7
    del array
    assert pool.take(24).address != address
    del view
    assert address in [pool.take(24).address, pool.take(24).address]


def test_a_device_array_describes_itself() -> None:
    array = cuda.DeviceArray(HostMemory().pool(), (2, 3, 4), np.float16)
    described = array.__cuda_array_interface__
    assert described["shape"] == (2, 3, 4)
    assert described["typestr"] == "<f2"
    assert described["data"] == (array.address, False)
    assert array.nbytes == 48
    with pytest.raises(ValueError, match="without a copy"):
        np.asarray(array, copy=False)


def test_rows_of_a_device_array_are_in_its_memory() -> None:
    memory = HostMemory()
    array = cuda.DeviceArray(memory.pool(), (3, 2, 4), np.float16)
    assert len(array) == 3
    assert [(part.address - array.address, part.shape) for part in (array[1:], array[1:][1], array[-1], array[:0], array[3:])] == [
        (16, (2, 2, 4)),
        (32, (2, 4)),
        (32, (2, 4)),
        (0, (0, 2, 4)),
        (48, (0, 2, 4)),
    ]
    assert array[1].nbytes == 16
    assert array[:0].nbytes == 0
    with pytest.raises(IndexError, match="row 3 of 3"):
        array[3]
    with pytest.raises(ValueError, match="neighbouring"):
        array[::2]
    part = array[2]
    del array
    gc.collect()
    assert memory.blocks  # as long as any part
    del part
    gc.collect()
    assert not memory.blocks


class Gpus:
    """A thread's GPU, and those that have a context, as CUDA keeps them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, current: int, used: set[int]) -> None:
        self._first, self._chosen, self.used = current, threading.local(), used
        monkeypatch.setattr(cudart, "cudaGetDevice", lambda: (SUCCESS, self.current))
        monkeypatch.setattr(cudart, "cudaSetDevice", self.choose)
        monkeypatch.setattr(driver, "cuDevicePrimaryCtxGetState", lambda index: (driver.CUresult.CUDA_SUCCESS, 0, int(index in self.used)))

    @property
    def current(self) -> int:
        return int(getattr(self._chosen, "index", self._first))

    def choose(self, index: int) -> tuple[object]:
        self._chosen.index = index
        self.used.add(index)
        return (SUCCESS,)


@pytest.mark.parametrize(("used", "afterwards"), [({0}, 0), (set(), 1)])
def test_the_threads_gpu_is_its_own_again(monkeypatch: pytest.MonkeyPatch, used: set[int], afterwards: int) -> None:
    """Unless nothing of this process uses that one: going back would take memory there."""
    gpus = Gpus(monkeypatch, 0, set(used))
    with suppress(KeyError), cuda.on_device(1):
        assert gpus.current == 1
        raise KeyError
    assert gpus.current == afterwards
    assert gpus.used == used | {1}


def test_a_driver_older_than_the_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (SUCCESS, 12040))
    monkeypatch.setattr(cudart, "cudaRuntimeGetVersion", lambda: (SUCCESS, 13020))
    with pytest.raises(NoTarget, match=r"cuda-bindings is for CUDA 13, and this machine's driver for CUDA 12\.4") as caught:
        cuda.devices()
    assert "580" in str(caught.value.fix)


def test_without_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (SUCCESS, 0))
    with pytest.raises(NoTarget, match="no NVIDIA driver"):
        cuda.devices()


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (SUCCESS, 13020))
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (cudart.cudaError_t.cudaErrorNoDevice, 0))
    assert cuda.driver_version() == (13, 2)
    with pytest.raises(NoTarget, match=r"looking for GPUs: .*cudaErrorNoDevice"):
        cuda.devices()


@pytest.mark.parametrize("name", ["StubLibrary", "CompatNotSupportedOnDevice", "OperatingSystem", "Unknown", "MemoryAllocation"])
@pytest.mark.parametrize("question", ["cudaDriverGetVersion", "cudaGetDeviceCount", "cudaGetDeviceProperties"])
def test_a_machine_whose_cuda_does_not_work_has_no_gpu(monkeypatch: pytest.MonkeyPatch, question: str, name: str) -> None:
    status = getattr(cudart.cudaError_t, f"cudaError{name}")
    answers = {"cudaDriverGetVersion": (SUCCESS, 13020), "cudaGetDeviceCount": (SUCCESS, 1)} | {question: (status, 0)}
    for call, answer in answers.items():
        monkeypatch.setattr(cudart, call, lambda *given, answer=answer: answer)
    with pytest.raises(NoTarget, match=f"cudaError{name}") as caught:
        cuda.devices()
    assert "smc doctor" in caught.value.fix


def test_a_process_that_was_forked_too_late_has_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its driver is as good as ever, and says so."""
    refused = cudart.cudaError_t.cudaErrorInitializationError
    answers: dict[str, Any] = {"cudaDriverGetVersion": (SUCCESS, 13020), "cudaGetDeviceCount": (refused, 0), "cudaSetDevice": (refused,)}
    for name in answers:
        monkeypatch.setattr(cudart, name, lambda *given, name=name: answers[name])
    monkeypatch.setattr(cuda, "_initialised_in", None)

    def refusals(why: str = "cudaErrorInitializationError") -> list[NoTarget]:
        found = []
        for ask in (cuda.devices, lambda: cuda.use_device(0)):
            with pytest.raises(NoTarget, match=why) as caught:
                ask()
            found.append(caught.value)
        return found

    assert all("doctor" in refusal.fix for refusal in refusals())  # a driver that does not work, forked or not
    answers["cudaGetDeviceCount"] = SUCCESS, 0
    cuda.devices()
    answers["cudaGetDeviceCount"] = refused, 0
    assert all("doctor" in refusal.fix for refusal in refusals())
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    assert all("'spawn'" in refusal.fix for refusal in refusals("forked"))
    answers |= {"cudaGetDeviceCount": (SUCCESS, 1), "cudaSetDevice": (SUCCESS,)}  # as some calls do
    assert all("'spawn'" in refusal.fix for refusal in refusals("forked"))
    for wait_or_allocate in (cuda.WHOLE_GPU.held().__enter__, lambda: cuda.device_pool().take(8)):
        with pytest.raises(NoTarget, match="forked"):
            wait_or_allocate()


def test_other_failures_are_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "cudaSetDevice", lambda index: (cudart.cudaError_t.cudaErrorIllegalAddress,))
    with pytest.raises(BackendFailed, match=r"choosing GPU 3: .*cudaErrorIllegalAddress"):
        cuda.use_device(3)


@pytest.fixture
def gpu() -> cuda.Device:
    device = cuda.devices()[0]
    cuda.use_device(device.index)
    return device


@pytest.mark.gpu
def test_devices(gpu: cuda.Device) -> None:
    major, minor = map(int, gpu.sm.split("."))
    assert (major, minor) >= (7, 5)
    assert gpu.name.isprintable()
    assert 0 < cuda.free_memory() <= gpu.total_bytes
    assert cuda.driver_version() >= (12, 0)


@pytest.mark.gpu
def test_copies_both_ways(gpu: cuda.Device) -> None:
    stream, device, pinned = cuda.Stream(), cuda.device_pool(), cuda.pinned_pool()
    values = np.random.default_rng(0).standard_normal((3, 384, 512)).astype(np.float32)
    first, second = (cuda.DeviceArray(device, values.shape, values.dtype) for _ in range(2))
    host = cuda.pinned_array(pinned, values.shape, values.dtype)
    stream.copy(first.address, values.ctypes.data, first.nbytes)
    stream.copy(second.address, first.address, first.nbytes)
    stream.copy(host.ctypes.data, second.address, first.nbytes)
    stream.synchronize()
    np.testing.assert_array_equal(host, values)
    np.testing.assert_array_equal(np.asarray(second), values)
    assert np.asarray(second, dtype=np.float64).dtype == np.float64


@pytest.mark.gpu
def test_others_read_device_arrays_in_place(gpu: cuda.Device) -> None:
    cupy = pytest.importorskip("cupy")
    values = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    array = cuda.DeviceArray(cuda.device_pool(), values.shape, values.dtype)
    stream = cuda.Stream()
    stream.copy(array.address, values.ctypes.data, array.nbytes)
    stream.synchronize()
    seen = cupy.asarray(array)
    assert seen.data.ptr == array.address
    seen += 1
    np.testing.assert_array_equal(np.asarray(array), values + 1)


@pytest.mark.gpu
def test_a_captured_graph_runs_when_launched(gpu: cuda.Device) -> None:
    stream, pool = cuda.Stream(), cuda.device_pool()
    source, target = (cuda.DeviceArray(pool, (1024,), np.int32) for _ in range(2))
    zeros = np.zeros(1024, np.int32)
    stream.copy(target.address, zeros.ctypes.data, zeros.nbytes)
    stream.synchronize()
    graph = cuda.Graph(stream, lambda: stream.copy(target.address, source.address, source.nbytes))
    stream.synchronize()
    np.testing.assert_array_equal(np.asarray(target), zeros)  # capturing ran nothing
    for seed in range(3):
        values = np.random.default_rng(seed).integers(0, 1 << 30, 1024, dtype=np.int32)
        stream.copy(source.address, values.ctypes.data, values.nbytes)
        graph.launch(stream)
        stream.synchronize()
        np.testing.assert_array_equal(np.asarray(target), values)


@pytest.mark.gpu
def test_other_threads_may_allocate_during_a_capture(gpu: cuda.Device) -> None:
    stream, pool = cuda.Stream(), cuda.device_pool()
    source, target = (cuda.DeviceArray(pool, (16,), np.int32) for _ in range(2))
    failures = []

    def allocate() -> None:
        try:
            cuda.use_device(gpu.index)
            cuda.DeviceArray(cuda.device_pool(), (1 << 20,), np.int32)
        except Exception as error:
            failures.append(error)

    def enqueue() -> None:
        stream.copy(target.address, source.address, source.nbytes)
        thread = threading.Thread(target=allocate)
        thread.start()
        thread.join()

    cuda.Graph(stream, enqueue).launch(stream)
    stream.synchronize()
    assert not failures


@pytest.mark.gpu
@pytest.mark.parametrize("thread", ["its own", "another"])
def test_pools_may_go_during_a_capture(gpu: cuda.Device, thread: str) -> None:
    stream, pool = cuda.Stream(), cuda.device_pool()
    source, target = (cuda.DeviceArray(pool, (16,), np.int32) for _ in range(2))
    others = [cuda.device_pool(), cuda.pinned_pool()]
    for other in others:
        other.take(1 << 20)
    del other

    def enqueue() -> None:
        stream.copy(target.address, source.address, source.nbytes)
        if thread == "its own":
            others.clear()
        else:
            clearing = threading.Thread(target=others.clear)
            clearing.start()
            clearing.join()

    values = np.arange(16, dtype=np.int32)
    stream.copy(source.address, values.ctypes.data, values.nbytes)
    stream.synchronize()
    cuda.Graph(stream, enqueue).launch(stream)
    stream.synchronize()
    np.testing.assert_array_equal(np.asarray(target), values)


FORKING = """
import os
from smc.exported.engines import cuda_memory as cuda
from smc.exported.errors import NoTarget

def use():
    with cuda.on_device(index):
        cuda.Stream()

index = cuda.devices()[0].index
use()
child = os.fork()
if not child:
    for ask in (cuda.devices, use):
        try:
            ask()
        except NoTarget as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
use()
"""


@pytest.mark.gpu
def test_a_forked_process_says_that_it_is_one(gpu: cuda.Device) -> None:
    said = subprocess.run([sys.executable, "-c", FORKING], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.startswith("a GPU cannot be used in a process that was forked") for line in said] == [True, True]


@pytest.mark.gpu
def test_empty_arrays(gpu: cuda.Device) -> None:
    assert np.asarray(cuda.DeviceArray(cuda.device_pool(), (0, 3), np.float32)).shape == (0, 3)
    assert cuda.pinned_array(cuda.pinned_pool(), (0, 3), np.float32).shape == (0, 3)


@pytest.mark.gpu
def test_a_stream_is_usable_after_a_capture_that_failed(gpu: cuda.Device) -> None:
    stream, pool = cuda.Stream(), cuda.device_pool()

    def refuse() -> None:
        raise BackendFailed("refused")

    with pytest.raises(BackendFailed, match="refused"):
        cuda.Graph(stream, refuse)
    with pytest.raises(BackendFailed):
        cuda.Graph(stream, stream.synchronize)  # not allowed in a capture
    values = np.arange(16, dtype=np.int32)
    array = cuda.DeviceArray(pool, values.shape, values.dtype)
    stream.copy(array.address, values.ctypes.data, values.nbytes)
    stream.synchronize()
    np.testing.assert_array_equal(np.asarray(array), values)


@pytest.mark.gpu
def test_out_of_memory_says_how_much(gpu: cuda.Device) -> None:
    needed = 2 * gpu.total_bytes
    with pytest.raises(OutOfMemory, match=f"{needed:,} bytes are needed"):
        cuda.device_pool().take(needed)
    assert cuda.device_pool().take(256).address % 256 == 0  # and the GPU goes on working
