"""Arguments as the driver gets them, and its errors; the driver is a stand-in. Real launches are in tests/plugins."""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

from cuda.bindings import driver

from smc.exported.engines import cuda_launch, cuda_memory
from smc.exported.engines.cuda_launch import Kernels, capture, check, enqueue
from smc.exported.engines.cuda_program import Argument, Float32, Int32, KernelCode, Pointer, Program, Step, TensorMap
from smc.exported.errors import BackendFailed, OutOfMemory
from tests.exported.test_cuda_memory import fake_captures

SUCCESS = driver.CUresult.CUDA_SUCCESS
BASES: dict[Any, int] = {"arena": 1 << 40, "weights": 1 << 41}
KERNELS = (KernelCode("small", 0, 4, 128, 1000), KernelCode("large", 4, 6, 256, 100_000))
CODE = b"abcdefghij"
MAP = TensorMap("weights", 64, 6, 3, (32, 64), 2, (100, 200), (256, 1))


class Driver:
    """Loads anything, and remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loaded: list[bytes] = []
        self.unloaded: list[bytes] = []
        self.limits: list[tuple[Any, int]] = []
        self.launches: list[tuple[Any, list[int], list[str]]] = []
        self.queued: list[tuple[str, int, int]] = []
        self.maps: list[tuple[Any, ...]] = []
        self.status = SUCCESS
        for name in (
            "cuLibraryLoadData",
            "cuLibraryUnload",
            "cuLibraryGetKernel",
            "cuKernelGetFunction",
            "cuFuncSetAttribute",
            "cuLaunchKernelEx",
            "cuTensorMapEncodeTiled",
        ):
            monkeypatch.setattr(driver, name, getattr(self, name))
        self.events = 0
        gpu = self

        class Stream:
            def __init__(self, urgent: bool) -> None:
                assert not urgent  # lanes beside the main one
                self.handle = 8

            def wait(self, event: Any) -> None:
                gpu.queued.append(("wait", self.handle, event.number))

        class Event:
            def __init__(self) -> None:
                self.number = gpu.events
                gpu.events += 1

            def record(self, stream: Any) -> None:
                gpu.queued.append(("record", stream.handle, self.number))

        monkeypatch.setattr(cuda_launch, "Stream", Stream)
        monkeypatch.setattr(cuda_launch, "Event", Event)
        self.main = Stream(urgent=False)
        self.main.handle = 7

    def cuLibraryLoadData(self, code: bytes, *rest: object) -> tuple[Any, Any]:  # noqa: N802
        time.sleep(0.01)
        self.loaded.append(code)
        return self.status, code

    def cuLibraryUnload(self, library: bytes) -> None:  # noqa: N802
        self.unloaded.append(library)

    def cuLibraryGetKernel(self, library: bytes, name: bytes) -> tuple[Any, Any]:  # noqa: N802
        return SUCCESS, (library, name)

    def cuKernelGetFunction(self, kernel: Any) -> tuple[Any, Any]:  # noqa: N802
        return SUCCESS, kernel

    def cuFuncSetAttribute(self, function: Any, attribute: Any, value: int) -> tuple[Any]:  # noqa: N802
        assert attribute == driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self.limits.append((function, value))
        return (SUCCESS,)

    def cuTensorMapEncodeTiled(self, *given: Any) -> tuple[Any, Any]:  # noqa: N802
        self.maps.append(given)
        return SUCCESS, driver.CUtensorMap()

    def cuLaunchKernelEx(self, config: Any, function: Any, parameters: int, extra: int) -> tuple[Any]:  # noqa: N802
        grid = [config.gridDimX, config.gridDimY, config.gridDimZ, config.blockDimX, config.sharedMemBytes]
        self.launches.append((function, grid, [attribute.id.name for attribute in config.attrs[: config.numAttrs]]))
        self.queued.append(("launch", int(config.hStream), len(self.launches) - 1))
        return (self.status,)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Driver:
    return Driver(monkeypatch)


@pytest.fixture(autouse=True)
def texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver says of its errors."""
    monkeypatch.setattr(driver, "cuGetErrorString", lambda status: (SUCCESS, f"text of {status.value}".encode()))


def program(*steps: Step) -> Program:
    return Program("encoder", {}, {}, 0, steps)


def parameters(*arguments: Argument) -> tuple[list[Any], list[int]]:
    """The values of a launch, which must stay, and their addresses."""
    owners, pointers = cuda_launch._parameters(cuda_launch._c_values(arguments, BASES))
    return owners, [pointer or 0 for pointer in pointers]


# --- arguments ---------------------------------------------------------------------------------------------------------------


def read(kind: Any, address: int) -> Any:
    return kind.from_address(address).value


def test_numbers_and_pointers_are_c_values_in_order() -> None:
    owners, at = parameters(Pointer("arena", 256), Int32(-3), Float32(0.5), Pointer("weights", 0), Int32(2**31 - 1))
    kinds = (ctypes.c_uint64, ctypes.c_int32, ctypes.c_float, ctypes.c_uint64, ctypes.c_int32)
    assert [read(kind, address) for kind, address in zip(kinds, at, strict=False)] == [(1 << 40) + 256, -3, 0.5, 1 << 41, 2**31 - 1]
    assert [ctypes.sizeof(owner) for owner in owners] == [8, 4, 4, 8, 4, 8, 8]


def test_two_null_pointers_come_last() -> None:
    owners, at = parameters()
    assert [read(ctypes.c_uint64, address) for address in at] == [0, 0]
    assert len(owners) == 2


def test_a_descriptor_is_a_tensor_map_and_the_shape_and_the_strides(gpu: Driver) -> None:
    owners, at = parameters(Int32(5), MAP, Int32(6))
    assert len(at) == 1 + 1 + 2 + 2 + 1 + 2
    assert at[1] == int(owners[1].getPtr())
    assert [read(ctypes.c_int32, address) for address in at[2:4]] == [100, 200]
    assert [read(ctypes.c_int64, address) for address in at[4:6]] == [256, 1]
    assert read(ctypes.c_int32, at[6]) == 6


def test_a_tensor_map_is_described_innermost_first(gpu: Driver) -> None:
    _ = parameters(MAP)
    ((element, rank, address, shape, strides, box, steps, interleave, swizzle, _, fill),) = gpu.maps
    assert (element, rank, address) == (driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2, (1 << 41) + 64)
    assert [int(size) for size in shape] == [200, 100]
    assert [int(stride) for stride in strides] == [512]  # bytes; the innermost is 1 element
    assert [int(size) for size in box] == [64, 32]
    assert [int(step) for step in steps] == [1, 1]
    assert swizzle == driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B
    assert interleave == driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE
    assert fill == driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE


def test_a_tensor_map_that_cuda_refuses_is_described(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "cuTensorMapEncodeTiled", lambda *given: (driver.CUresult.CUDA_ERROR_INVALID_VALUE, None))
    with pytest.raises(BackendFailed, match=r"describing a tensor of \(100, 200\), strides \(256, 1\), blocks \(32, 64\): .*INVALID_VALUE"):
        parameters(MAP)


# --- launches ----------------------------------------------------------------------------------------------------------------


def test_a_step_is_launched_as_the_plan_says(gpu: Driver) -> None:
    steps = Step(0, (3, 2, 1), (Int32(1),)), Step(1, (70_000, 1, 5), (), overlaps=True), Step(0, (1, 1, 1), ())
    enqueue(program(*steps), Kernels(CODE, KERNELS), BASES, gpu.main)
    small, large = (b"abcd", b"small"), (b"efghij", b"large")
    overlap = "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"
    assert gpu.launches == [
        (small, [3, 2, 1, 128, 1000], []),
        (large, [70_000, 1, 5, 256, 100_000], [overlap]),
        (small, [1, 1, 1, 128, 1000], []),
    ]
    assert [(what, stream) for what, stream, _ in gpu.queued if what != "record"] == [("launch", 7)] * 3


def test_lanes_begin_and_end_with_the_stream_and_wait_for_what_they_need(gpu: Driver) -> None:
    """Step 1 starts the side lane, step 2 waits for it, step 3 goes on there behind step 1 and for step 2, and step 4 waits for nothing."""
    steps = (
        Step(0, (1, 1, 1), (), overlaps=True),
        Step(0, (1, 1, 1), (), overlaps=True, lane=1),
        Step(0, (1, 1, 1), (), overlaps=True, waits=(1,)),
        Step(0, (1, 1, 1), (), overlaps=True, lane=1, waits=(2,)),
        Step(0, (1, 1, 1), (), overlaps=True),
        Step(0, (1, 1, 1), (), overlaps=True, lane=1),
    )
    enqueue(program(*steps), Kernels(CODE, KERNELS), BASES, gpu.main)

    records = {event: (stream, index) for index, (what, stream, event) in enumerate(gpu.queued) if what == "record"}

    def before(launch: int) -> set[int]:
        """The launches that have ended when this one begins, by the order in each stream and by events."""
        ended: set[int] = set()
        front = [(stream, index) for index, (what, stream, number) in enumerate(gpu.queued) if (what, number) == ("launch", launch)]
        while front:
            stream, end = front.pop()
            for what, where, number in gpu.queued[:end]:
                if where == stream and what == "launch":
                    ended.add(number)
                elif where == stream and what == "wait":
                    front.append(records[number])
        return ended

    assert [before(launch) for launch in range(6)] == [set(), set(), {0, 1}, {0, 1, 2}, {0, 1, 2}, {0, 1, 2, 3}]
    # A kernel begins early only behind one of its own stream: not at the start of a lane, nor where it waits for another lane.
    assert [bool(attributes) for _, _, attributes in gpu.launches] == [True, False, False, False, True, True]
    last = [(what, stream) for what, stream, _ in gpu.queued[-2:]]
    assert last == [("record", 8), ("wait", 7)]  # who waits for the stream waits for all


def test_a_capture_loads_kernels_and_makes_events_before_it_begins(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    captures: list[tuple[int, int]] = []
    fake_captures(monkeypatch, lambda moment: captures.append((len(gpu.loaded), gpu.events)))
    steps = Step(0, (1, 1, 1), ()), Step(1, (1, 1, 1), (), lane=1), Step(0, (1, 1, 1), (), waits=(1,))
    capture(program(*steps), Kernels(CODE, KERNELS), BASES, gpu.main)
    assert captures[0] == captures[1]
    assert len(gpu.launches) == 3


def test_a_graph_keeps_its_kernels_loaded(gpu: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_captures(monkeypatch)
    kernels = Kernels(CODE, KERNELS)
    graph = capture(program(Step(0, (1, 1, 1), ())), kernels, BASES, gpu.main)
    del kernels
    assert gpu.unloaded == []
    del graph
    assert gpu.unloaded == [b"abcd"]


def test_kernels_are_not_unloaded_while_work_is_captured(gpu: Driver) -> None:
    kernels = Kernels(CODE, KERNELS)
    kernels[0]
    with cuda_memory.WHOLE_GPU.held():
        del kernels
        assert gpu.unloaded == []
    assert gpu.unloaded == [b"abcd"]


def test_kernels_are_loaded_once_and_told_of_much_shared_memory(gpu: Driver) -> None:
    kernels = Kernels(CODE, KERNELS)
    assert gpu.loaded == []
    for _ in range(2):
        assert [kernels[index] for index in (1, 0)] == [(b"efghij", b"large"), (b"abcd", b"small")]
    assert gpu.loaded == [b"efghij", b"abcd"]
    assert gpu.limits == [((b"efghij", b"large"), 100_000)]
    assert gpu.unloaded == []
    del kernels
    assert gpu.unloaded == [b"efghij", b"abcd"]


def test_threads_at_once_load_a_kernel_once(gpu: Driver) -> None:
    kernels = Kernels(CODE, KERNELS)
    threads = [threading.Thread(target=kernels.__getitem__, args=(1,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gpu.loaded == [b"efghij"]


# --- errors ------------------------------------------------------------------------------------------------------------------


def test_a_call_gives_its_values() -> None:
    assert check((SUCCESS,), "") is None
    assert check((SUCCESS, 5), "") == 5
    assert check((SUCCESS, 5, 6), "") == (5, 6)


def test_memory_that_is_not_there() -> None:
    with pytest.raises(OutOfMemory, match=r"launching x: text of 2 \(CUDA_ERROR_OUT_OF_MEMORY\)") as caught:
        check((driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None), "launching x")
    assert (caught.value.exit_status, "smaller" in caught.value.fix) == (75, True)


@pytest.mark.parametrize("name", ["NO_BINARY_FOR_GPU", "ILLEGAL_ADDRESS", "INVALID_IMAGE", "UNKNOWN"])
def test_other_failures_are_the_backends(name: str) -> None:
    with pytest.raises(BackendFailed, match=rf"loading x: .*\(CUDA_ERROR_{name}\)"):
        check((getattr(driver.CUresult, f"CUDA_ERROR_{name}"), None), "loading x")


def test_a_kernel_that_cannot_be_loaded_or_launched_is_named(gpu: Driver) -> None:
    kernels = Kernels(CODE, KERNELS)
    kernels[0]
    gpu.status = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(BackendFailed, match="loading large: "):
        kernels[1]
    for label, named in (("Gemm blocks.3/fc1", "launching Gemm blocks.3/fc1: "), ("", "launching 0: ")):
        with pytest.raises(BackendFailed, match=named):
            enqueue(program(Step(0, (1, 1, 1), (), label=label)), kernels, BASES, gpu.main)
    gpu.status = SUCCESS
    assert kernels[1] == (b"efghij", b"large")  # another try loads it
