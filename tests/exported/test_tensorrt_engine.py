"""The engine's own logic, on a made-up TensorRT whose GPU memory is the host's. NVIDIA's library needs hardware."""

from __future__ import annotations

import ctypes
import json
import math
import threading
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from smc.exported.engines.tensorrt_library import LIBRARIES, TENSORRT, TENSORRT_RTX, Library, is_out_of_memory, make_log
from smc.exported.errors import BackendFailed, BadInput, BundleMismatch, NoTarget, OutOfMemory
from smc.exported.manifest import BackendInfo, Manifest, TargetInfo
from tests.bundles import sample_manifest

cudart = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")

from smc.exported.engines import cuda_memory as cuda  # noqa: E402  # it needs cuda-bindings
from smc.exported.engines.gpus import choose_device  # noqa: E402
from smc.exported.engines.tensorrt import MAX_CONTEXTS, TensorRtEngine, check_driver, check_version, engine_layers  # noqa: E402
from tests.exported.test_cuda_memory import Gpus  # noqa: E402

VERSION = "11.2.0.33"
H200 = cuda.Device(0, "NVIDIA H200", "9.0", 141 << 30)
A40 = cuda.Device(1, "NVIDIA A40", "8.6", 48 << 30)
SUCCESS = cudart.cudaError_t.cudaSuccess


def manifest(backend: str = "tensorrt") -> Manifest:
    return msgspec.structs.replace(
        sample_manifest({}),
        target=TargetInfo(gpu="a40", sm="8.6"),
        backend=BackendInfo(name=backend, version=VERSION),
        stages={"encoder": "encoder.engine", "decoder": "decoder.engine"},
    )


class FakeStream:
    handle = 7

    def copy(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def synchronize(self) -> None:
        pass


class FakeGraph:
    """Runs what was captured when it is launched, and counts."""

    def __init__(self, gpu: FakeGpu, enqueue: Any) -> None:
        gpu.captures += 1
        self.gpu, self.enqueue = gpu, enqueue

    def launch(self, stream: FakeStream) -> None:
        self.gpu.launches += 1
        self.enqueue()


class FakeContext:
    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.shapes, self.addresses, self.profile = engine, dict[str, tuple[int, ...]](), dict[str, int](), 0

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return stream == FakeStream.handle

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return True

    def infer_shapes(self) -> list[str]:
        return [name for name in self.engine.inputs if name not in self.shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        batch, height, width, _ = next(iter(self.shapes.values()))
        made = (batch, 2) if self.engine.title == "decoder" else (batch, height // 16, width // 16, 4)
        return self.shapes.get(name, made)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.engine.gpu.capturable

    def array(self, name: str) -> np.ndarray:
        dtype, shape = np.dtype(self.engine.dtypes[name]), self.get_tensor_shape(name)
        raw = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(self.addresses[name])
        return np.frombuffer(raw, dtype).reshape(shape)

    def execute_async_v3(self, stream: int) -> bool:
        gpu = self.engine.gpu
        gpu.check_device()
        gpu.executions.append((self.engine.title, self.profile))
        if gpu.broken:
            self.engine.log.log(gpu.trt.ILogger.Severity.ERROR, gpu.broken)
            gpu.meanwhile()
            return False
        means = [self.array(name).astype(np.float64).mean(axis=(1, 2, 3)) for name in self.engine.inputs]
        for output in self.engine.outputs:
            values = self.array(output)
            values[:] = sum((i + 1) * mean for i, mean in enumerate(means)).reshape(-1, *[1] * (values.ndim - 1))
        gpu.barrier()
        return True


class FakeEngine:
    """Outputs are the inputs' weighted means over each image."""

    device_memory_size_v2 = 1000

    def __init__(self, gpu: FakeGpu, title: str, log: Any) -> None:
        self.gpu, self.title, self.log, self.runtime_config = gpu, title, log, None
        encoder = title == "encoder"
        self.inputs = ["image"] if encoder else ["features1", "features2"]
        self.outputs = ["features"] if encoder else ["conf1", "conf2"]
        self.dtypes = dict.fromkeys(self.inputs + self.outputs, np.float16) | ({"image": np.uint8} if encoder else {"conf2": np.float32})
        # One profile for the first shape alone, one for all.
        low, high = ((1, 32, 48, 3), (2, 64, 64, 3)) if encoder else ((1, 2, 3, 4), (1, 4, 4, 4))
        self.profiles = [(low, low, low), (low, low, high)]
        self.num_optimization_profiles = len(self.profiles)
        self.num_io_tensors = len(self.dtypes)

    def get_tensor_name(self, index: int) -> str:
        return (self.inputs + self.outputs)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name in self.inputs else "out"

    def get_tensor_dtype(self, name: str) -> Any:
        return self.dtypes[name]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return [list(shape) for shape in self.profiles[profile]]

    def create_runtime_config(self) -> Any:
        self.runtime_config = SimpleNamespace(create_runtime_cache=lambda: "cache", set_runtime_cache=lambda cache: None)
        return self.runtime_config

    def create_execution_context(self, runtime_config: Any = None) -> FakeContext | None:
        assert runtime_config is self.runtime_config
        self.gpu.check_device()
        self.gpu.runtime_config = runtime_config
        self.gpu.contexts.append(self.title)
        if self.gpu.no_room:
            self.gpu.no_room -= 1
            self.log.log(self.gpu.trt.ILogger.Severity.ERROR, "Error Code 2: OutOfMemory (Requested size was 1000 bytes.)")
            return None
        return FakeContext(self)

    def create_engine_inspector(self) -> Any:
        return SimpleNamespace(get_engine_information=lambda form: json.dumps({"Layers": [self.title, form]}))


class FakeGpu:
    """An A40, the second of two GPUs, with a TensorRT that knows the plans b"encoder" and b"decoder"."""

    def __init__(self, devices: Gpus) -> None:
        self.devices = devices
        self.captures = self.launches = self.no_room = 0
        self.capturable, self.broken, self.runtime_config = True, "", None
        self.contexts: list[str] = []
        self.executions: list[tuple[str, int]] = []
        self.barrier: Any = lambda: None
        self.meanwhile: Any = lambda: None
        severity = SimpleNamespace(ERROR=1)

        class Logger:
            Severity = severity

        self.trt = SimpleNamespace(
            __version__=VERSION,
            ILogger=Logger,
            Runtime=self.make_runtime,
            nptype=lambda dtype: dtype,
            TensorIOMode=SimpleNamespace(INPUT="in"),
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
        )

    def check_device(self) -> None:
        assert self.devices.current == A40.index

    def make_runtime(self, log: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self.deserialize(plan, log))

    def deserialize(self, plan: memoryview, log: Any) -> FakeEngine | None:
        self.check_device()
        if bytes(plan) in (b"encoder", b"decoder"):
            return FakeEngine(self, bytes(plan).decode(), log)
        log.log(1, "Error Code 1: Serialization (magicTag mismatch)")
        return None

    @property
    def files(self) -> dict[str, memoryview]:
        return {"encoder.engine": memoryview(b"encoder"), "decoder.engine": memoryview(b"decoder")}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu(Gpus(monkeypatch, H200.index, {H200.index}))
    blocks: dict[int, Any] = {}

    def allocate(nbytes: int) -> tuple[Any, int]:
        block = ctypes.create_string_buffer(nbytes)
        blocks[ctypes.addressof(block)] = block
        return SUCCESS, ctypes.addressof(block)

    def pool() -> cuda.MemoryPool:
        return cuda.MemoryPool("memory", allocate, blocks.pop)

    monkeypatch.setattr(Library, "load", lambda self: fake.trt)
    for name, value in {
        "driver_version": lambda: (13, 2),
        "runtime_version": lambda: (13, 0),
        "devices": lambda: [H200, A40],
        "free_memory": lambda: 10,
        "device_pool": pool,
        "pinned_pool": pool,
        "Stream": FakeStream,
        "Graph": lambda stream, enqueue: FakeGraph(fake, enqueue),
    }.items():
        monkeypatch.setattr(cuda, name, value)
    # DeviceArray.__array__ copies with this.
    monkeypatch.setattr(cudart, "cudaMemcpy", lambda to, source, nbytes, kind: (ctypes.memmove(to, source, nbytes), (SUCCESS,))[1])
    return fake


def images(value: int, batch: int = 1, height: int = 32, width: int = 48) -> np.ndarray:
    return np.full((batch, height, width, 3), value, np.uint8)


def test_encodes_and_decodes(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    for value in (10, 20, 30):  # the first run, the captured one, a launch
        features1, features2 = engine.encode(images(value)), engine.encode(images(100))
        assert (features1.shape, features1.dtype) == ((1, 2, 3, 4), np.float16)
        np.testing.assert_array_equal(np.asarray(features1), np.float16(value))
        maps = engine.decode(features1, features2)
        assert {name: array.dtype for name, array in maps.items()} == {"conf1": np.float32, "conf2": np.float32}
        for array in maps.values():
            np.testing.assert_array_equal(array, np.full((1, 2), value + 2 * 100, np.float32))


def test_results_are_the_callers_own(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    first, second = engine.encode(images(1)), engine.encode(images(2))
    np.testing.assert_array_equal(np.asarray(first), np.float16(1))
    maps = engine.decode(first, second)
    kept = {name: array.copy() for name, array in maps.items()}
    engine.decode(second, second)
    for name, array in maps.items():
        np.testing.assert_array_equal(array, kept[name])


def test_images_are_converted_to_what_the_plan_takes(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    pixels = np.full((1, 3, 32, 48), 51 / 127.5 - 1, np.float32)
    np.testing.assert_array_equal(np.asarray(engine.encode(pixels)), np.float16(51))
    every_other = np.repeat(images(9), 2, axis=2)[:, :, ::2]
    np.testing.assert_array_equal(np.asarray(engine.encode(every_other)), np.float16(9))


def test_captures_after_the_first_run_and_launches_from_then_on(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    engine.encode(images(1))
    assert (gpu.captures, gpu.launches) == (1, 0)
    engine.encode(images(2))
    engine.encode(images(3))
    assert (gpu.captures, gpu.launches) == (1, 2)
    assert gpu.contexts == ["encoder"]


def test_runs_without_a_capture_where_the_context_says_so(gpu: FakeGpu) -> None:
    gpu.capturable = False
    engine = TensorRtEngine(gpu.files, manifest())
    for value in (1, 2):
        np.testing.assert_array_equal(np.asarray(engine.encode(images(value))), np.float16(value))
    assert (gpu.captures, gpu.launches) == (0, 0)


def test_tensorrt_rtx_captures_by_itself(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest("tensorrt-rtx"))
    engine.encode(images(1))
    assert gpu.captures == 0
    assert gpu.runtime_config.cuda_graph_strategy == "whole"
    assert gpu.runtime_config.dynamic_shapes_kernel_specialization_strategy == "eager"


def test_the_profile_for_the_shape_comes_before_the_one_for_all(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    engine.encode(images(1))
    engine.encode(images(1, batch=2, height=64))
    assert gpu.executions == [("encoder", 0), ("encoder", 1)]


def test_shapes_that_no_profile_takes(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    with pytest.raises(BadInput, match="encoder: the plan takes image 1x32x48x3 to 2x64x64x3, found image 3x32x48x3"):
        engine.encode(images(1, batch=3))
    assert gpu.contexts == []


def test_pairs_need_equal_batches(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    with pytest.raises(BadInput, match="1 and of 2 images"):
        engine.decode(engine.encode(images(1)), engine.encode(images(1, batch=2)))


def test_contexts_are_one_a_shape_and_the_least_used_goes(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    heights = [32 + 2 * i for i in range(MAX_CONTEXTS)]
    for height in heights + heights:
        engine.encode(images(1, height=height))
    assert len(gpu.contexts) == MAX_CONTEXTS
    engine.encode(images(1, height=64))  # in the place of the first height
    engine.encode(images(1, height=heights[1]))
    assert len(gpu.contexts) == MAX_CONTEXTS + 1
    engine.encode(images(1, height=heights[0]))
    assert len(gpu.contexts) == MAX_CONTEXTS + 2


def test_threads_get_contexts_of_their_own(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    together = threading.Barrier(MAX_CONTEXTS, timeout=10)
    gpu.capturable, gpu.barrier = False, together.wait
    found: dict[int, np.ndarray] = {}

    def work(value: int) -> None:
        found[value] = np.asarray(engine.encode(images(value)))

    threads = [threading.Thread(target=work, args=(value,)) for value in range(2 * MAX_CONTEXTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for value in range(2 * MAX_CONTEXTS):
        np.testing.assert_array_equal(found[value], np.float16(value))
    assert len(gpu.contexts) == MAX_CONTEXTS


def test_a_context_that_failed_is_not_used_again(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    engine.encode(images(1))
    gpu.broken = "Error Code 1: Cuda Runtime (unspecified launch failure)"
    with pytest.raises(BackendFailed, match=r"encoder: the engine did not run: TensorRT says: .*unspecified launch failure"):
        engine.encode(images(2))
    gpu.broken = ""
    np.testing.assert_array_equal(np.asarray(engine.encode(images(3))), np.float16(3))
    assert len(gpu.contexts) == 2


def test_a_stage_tells_its_own_reasons(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    features = engine.encode(images(1))

    def decode() -> None:
        gpu.broken = ""
        engine.decode(features, features)

    gpu.broken, gpu.meanwhile = "unspecified launch failure", decode
    with pytest.raises(BackendFailed, match="encoder: the engine did not run: TensorRT says: unspecified launch failure"):
        engine.encode(images(2))


def test_contexts_at_work_beside_one_that_fails_leave_it_its_reason(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    engine.encode(images(1))
    gpu.broken = "unspecified launch failure"
    with pytest.raises(BackendFailed, match="unspecified launch failure"):
        engine.encode(images(2))

    def encode() -> None:
        gpu.broken = ""
        engine.encode(images(1))

    gpu.broken, gpu.meanwhile = "Error Code 2: OutOfMemory", encode
    with pytest.raises(OutOfMemory, match=r"the engine did not run: 1,000 bytes .* \(Error Code 2: OutOfMemory\)"):  # not the old one's
        engine.encode(images(2))


def test_the_threads_gpu_is_its_own_again(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    assert gpu.devices.current == H200.index
    features = engine.encode(images(1))
    assert gpu.devices.current == H200.index
    engine.decode(features, features)
    assert gpu.devices.current == H200.index
    with pytest.raises(BadInput, match="the plan takes"):
        engine.encode(images(1, batch=3))
    assert gpu.devices.current == H200.index


def test_idle_contexts_make_room_for_a_new_one(gpu: FakeGpu) -> None:
    engine = TensorRtEngine(gpu.files, manifest())
    engine.encode(images(1))
    gpu.no_room = 1
    engine.encode(images(1, height=64))
    gpu.no_room = 2
    with pytest.raises(OutOfMemory, match="encoder: no execution context: 1,000 bytes are needed, 10 are free"):
        engine.encode(images(1, height=34))
    engine.encode(images(1))  # and the place is free again


def test_a_plan_that_is_none(gpu: FakeGpu) -> None:
    files = gpu.files | {"decoder.engine": memoryview(b"something else")}
    with pytest.raises(BackendFailed, match=r"decoder: the engine cannot be loaded: TensorRT says: .*magicTag"):
        TensorRtEngine(files, manifest())


def test_stages_that_do_not_fit_together(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeEngine.__init__

    def other_features(self: FakeEngine, gpu: FakeGpu, title: str, log: Any) -> None:
        made(self, gpu, title, log)
        if title == "encoder":
            self.dtypes["features"] = np.float32

    monkeypatch.setattr(FakeEngine, "__init__", other_features)
    with pytest.raises(BackendFailed, match=r"the encoder gives .*float32.* and the decoder takes .*float16"):
        TensorRtEngine(gpu.files, manifest())


def test_layers_are_the_inspectors(gpu: FakeGpu) -> None:
    assert engine_layers(gpu.files, manifest()) == {name: {"Layers": [name, "json"]} for name in ("encoder", "decoder")}


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=str)
def test_a_missing_library_names_its_package(library: Library) -> None:
    absent = Library(library.name, library.title, "no_such_module", library.package)
    with pytest.raises(NoTarget, match=f"{library.title} cannot be imported") as caught:
        absent.load()
    assert caught.value.fix == f"pip install {library.package}"


def test_a_missing_library_comes_before_all_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "tensorrt", Library("tensorrt", "TensorRT", "no_such_module", "tensorrt"))
    with pytest.raises(NoTarget, match="no_such_module"):
        TensorRtEngine({}, manifest())


def test_no_driver(gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(Library, "load", lambda self: gpu.trt)
    monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (SUCCESS, 0))
    with pytest.raises(NoTarget, match="no NVIDIA driver"):
        TensorRtEngine(gpu.files, manifest())


def test_another_version_of_the_library() -> None:
    check_version(TENSORRT, VERSION, manifest())
    with pytest.raises(BundleMismatch, match=r"the plan is for TensorRT-RTX 11\.2\.0\.33, and 1\.6 is installed") as caught:
        check_version(TENSORRT_RTX, "1.6", manifest("tensorrt-rtx"))
    assert caught.value.fix == f"pip install tensorrt-rtx-cu13=={VERSION}, or build it again: smc build --gpu a40"
    assert caught.value.exit_status == 77


def test_a_driver_that_is_too_old() -> None:
    check_driver((13, 0), (13, 2))  # within a generation, older drivers do
    check_driver((14, 0), (13, 2))
    with pytest.raises(BundleMismatch, match=r"need a driver for CUDA 13, and this one is for CUDA 12\.8") as caught:
        check_driver((12, 8), (13, 2))
    assert "driver" in caught.value.fix


def test_the_gpu_is_the_first_of_the_plans_compute_capability() -> None:
    assert choose_device([H200, A40, cuda.Device(2, "NVIDIA RTX A6000", "8.6", 48 << 30)], manifest()) is A40
    with pytest.raises(BundleMismatch, match=r"the plan is for a40 \(sm 8\.6\), and this machine has NVIDIA H200 \(sm 9\.0\)") as caught:
        choose_device([H200], manifest())
    assert "smc build --gpu" in caught.value.fix
    assert caught.value.exit_status == 77


def test_what_speaks_of_memory() -> None:
    assert is_out_of_memory("Error Code 2: OutOfMemory (Requested size was 100 bytes.)")
    assert is_out_of_memory("Error Code 1: Cuda Runtime (out of memory)")
    assert not is_out_of_memory("Error Code 4: API Usage Error")


def test_the_log_keeps_errors_and_prints_all_when_verbose(gpu: FakeGpu, capfd: pytest.CaptureFixture[str]) -> None:
    class Severity(int):
        name = "WARNING"

    quiet, verbose = make_log(gpu.trt), make_log(gpu.trt, verbose=True)
    for log in (quiet, verbose):
        log.log(Severity(1), "bad")
        log.log(Severity(2), "doubtful")
        assert log.errors == ["bad"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "WARNING: bad\nWARNING: doubtful\n"
