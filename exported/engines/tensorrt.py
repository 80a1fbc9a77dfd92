"""The TensorRT and TensorRT-RTX engine: NVIDIA GPUs.

Not run on hardware: no machine with both a GPU and these libraries was at hand. Written after NVIDIA's documentation of the
Python interface of TensorRT 11 and TensorRT-RTX 1.7, and tested with a made-up library in their place.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines import Files, Maps
from smc.exported.engines import cuda_memory as cuda
from smc.exported.engines.gpus import choose_device
from smc.exported.engines.tensorrt_library import LIBRARIES, TENSORRT_RTX, Library, is_out_of_memory, make_log
from smc.exported.errors import BackendFailed, BadInput, BundleMismatch, OutOfMemory, SmcError
from smc.exported.images import as_plan_input
from smc.exported.manifest import Manifest

MAX_CONTEXTS = 4
"""Execution contexts that a stage keeps, and threads that it serves at once. Each holds the memory of all its activations."""

Shapes = dict[str, tuple[int, ...]]


class TensorRtEngine:
    """Two TensorRT engines, encoder and decoder, on one GPU. Features stay in its memory."""

    def __init__(self, files: Files, manifest: Manifest) -> None:
        """Load both engines.

        Args:
            files: contents of the bundle's files; not needed after the constructor.
            manifest: the bundle's.

        Raises:
            NoTarget: the library, a driver or a GPU is missing.
            BundleMismatch: the plan is for another GPU or another version of the library, or the driver is too old.
            OutOfMemory, BackendFailed: the engines could not be loaded.
        """
        library = LIBRARIES[manifest.backend.name]
        trt = library.load()
        check_version(library, trt.__version__, manifest)
        check_driver(cuda.driver_version(), cuda.runtime_version())
        self._device = choose_device(cuda.devices(), manifest).index
        with cuda.on_device(self._device):
            self._encoder, self._decoder = (Stage(stage, library, trt, files[manifest.stages[stage]]) for stage in ("encoder", "decoder"))
        _check_features(self._encoder, self._decoder)

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> cuda.DeviceArray:
        """images -> features (B, rows, cols, C) on the GPU, in the plan's type."""
        stage = self._encoder
        (image,), (features,) = stage.inputs, stage.outputs
        pixels = np.ascontiguousarray(as_plan_input(images, stage.dtypes[image]))
        with cuda.on_device(self._device), stage.context({image: pixels.shape}) as context:
            context.run({image: pixels})
            return context.keep(features)

    def decode(self, features1: cuda.DeviceArray, features2: cuda.DeviceArray) -> Maps:
        stage = self._decoder
        if features1.shape[0] != features2.shape[0]:
            raise BadInput(f"features of {features1.shape[0]} and of {features2.shape[0]} images make no pairs")
        inputs = dict(zip(stage.inputs, (features1, features2), strict=True))
        with cuda.on_device(self._device), stage.context({name: features.shape for name, features in inputs.items()}) as context:
            context.run(inputs)
            return context.fetch()

    def layers(self) -> dict[str, Any]:
        """Stage -> what TensorRT's inspector says of its engine: layers, formats and tactics, as JSON values."""
        return {stage.name: stage.inspect() for stage in (self._encoder, self._decoder)}


def engine_layers(files: Files, manifest: Manifest) -> dict[str, Any]:
    """`TensorRtEngine.layers` of a plan; without its GPU, see `layers.json` in the bundle. Raises as `TensorRtEngine`."""
    return TensorRtEngine(files, manifest).layers()


def check_version(library: Library, found: str, manifest: Manifest) -> None:
    """Raise BundleMismatch unless the installed library is the one that built the plan: engines are not portable between versions."""
    wanted = manifest.backend.version
    if found != wanted:
        raise BundleMismatch(
            f"the plan is for {library.title} {wanted}, and {found} is installed",
            fix=f"pip install {library.package}=={wanted}, or build it again: smc build --gpu {manifest.target.gpu}",
        )


def check_driver(driver: tuple[int, int], runtime: tuple[int, int]) -> None:
    """Raise BundleMismatch where the driver is of an older CUDA generation than the libraries."""
    if driver[0] < runtime[0]:
        raise BundleMismatch(
            f"the plan's libraries need a driver for CUDA {runtime[0]}, and this one is for CUDA {driver[0]}.{driver[1]}",
            fix="install a newer NVIDIA driver",
        )


def _check_features(encoder: Stage, decoder: Stage) -> None:
    """Raise BackendFailed unless the decoder takes features of the type that the encoder gives: they are passed on as bytes."""
    made, taken = [encoder.dtypes[name] for name in encoder.outputs], [decoder.dtypes[name] for name in decoder.inputs]
    if taken != 2 * made:
        raise BackendFailed(f"the encoder gives {made} and the decoder takes {taken}", fix="build the bundle again")


class Stage:
    """One engine, and its execution contexts, each for one set of input shapes.

    NVIDIA's advice is one context a captured graph: other shapes, or another profile, would make the graph invalid.
    """

    def __init__(self, name: str, library: Library, trt: Any, plan: memoryview, verbose: bool = False) -> None:
        self.name, self.trt_library, self.trt = name, library, trt
        self.log = make_log(trt, verbose)  # its own: errors are told from other stages' by where they are kept
        runtime = trt.Runtime(self.log)
        # A plan may hold programs for the CPU, which run as the user; this is the default, and stays so.
        runtime.engine_host_code_allowed = False
        self.engine = runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise self.failure("the engine cannot be loaded", len(plan))
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [tensor for tensor in names if self.engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT]
        self.outputs = [tensor for tensor in names if tensor not in self.inputs]
        self.dtypes = {tensor: np.dtype(trt.nptype(self.engine.get_tensor_dtype(tensor))) for tensor in names}
        self.device_memory, self.pinned_memory = cuda.device_pool(), cuda.pinned_pool()
        self._runtime_config = self._make_runtime_config()
        self._idle: list[_Context] = []  # least recently used first
        self._busy = 0
        self._lock = threading.Lock()
        self._slots = threading.Semaphore(MAX_CONTEXTS)

    @contextmanager
    def context(self, shapes: Shapes) -> Iterator[_Context]:
        """A context for these input shapes, the calling thread's own meanwhile. One that failed is not used again.

        Raises:
            BadInput: the plan does not take these shapes.
            OutOfMemory, BackendFailed: there is no room for one, or TensorRT refused.
        """
        profile = self._find_profile(shapes)
        with self._slots:
            context = self._take(shapes)
            try:
                context = context or self._make(shapes, profile)
                try:
                    yield context
                except BaseException:
                    context.drain()
                    raise
                with self._lock:
                    self._idle.append(context)
            finally:
                with self._lock:
                    self._busy -= 1

    def _take(self, shapes: Shapes) -> _Context | None:
        """An idle context for these shapes; where there is none, room is made for a new one."""
        with self._lock:
            if not self._busy:
                self.log.errors.clear()  # nobody looks for a reason among them
            self._busy += 1
            for context in self._idle:
                if context.shapes == shapes:
                    self._idle.remove(context)
                    return context
            if len(self._idle) + self._busy > MAX_CONTEXTS:
                del self._idle[0]
            return None

    def _make(self, shapes: Shapes, profile: int) -> _Context:
        try:
            return _Context(self, shapes, profile)
        except OutOfMemory:
            with self._lock:
                self._idle.clear()
            self.device_memory.release()
            return _Context(self, shapes, profile)

    def _find_profile(self, shapes: Shapes) -> int:
        """The first optimization profile that takes these shapes: those for one input shape come before the one for any pair."""
        for profile in range(self.engine.num_optimization_profiles):
            if all(_fits(shape, *self._range(name, profile)) for name, shape in shapes.items()):
                return profile
        widest = self.engine.num_optimization_profiles - 1
        ranges = {name: self._range(name, widest) for name in shapes}
        taken = ", ".join(f"{name} {_sizes(low)} to {_sizes(high)}" for name, (low, high) in ranges.items())
        found = ", ".join(f"{name} {_sizes(shape)}" for name, shape in shapes.items())
        raise BadInput(f"{self.name}: the plan takes {taken}, found {found}", fix="build it with that --shape or --max-batch")

    def _range(self, name: str, profile: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        low, _, high = self.engine.get_tensor_profile_shape(name, profile)
        return tuple(low), tuple(high)

    def create_context(self) -> Any:
        """An execution context, or None; its activations' memory is TensorRT's own."""
        if self._runtime_config is None:
            return self.engine.create_execution_context()
        return self.engine.create_execution_context(runtime_config=self._runtime_config)

    def _make_runtime_config(self) -> Any:
        """How TensorRT-RTX, which compiles its kernels on the target, is to run; None for TensorRT."""
        if self.trt_library != TENSORRT_RTX:
            return None
        config = self.engine.create_runtime_config()
        # Compiling in the background would change kernels, and so the last bits of results, between two calls.
        config.dynamic_shapes_kernel_specialization_strategy = self.trt.DynamicShapesKernelSpecializationStrategy.EAGER
        # It captures by itself once a shape's kernels are compiled, which cannot be seen from outside.
        config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        config.set_runtime_cache(config.create_runtime_cache())  # what one context compiled, others use
        return config

    def inspect(self) -> Any:
        inspector = self.engine.create_engine_inspector()
        return json.loads(inspector.get_engine_information(self.trt.LayerInformationFormat.JSON))

    def failure(self, what: str, needed: int, since: int = 0) -> SmcError:
        """The error for something that TensorRT refused, with what its log says from entry `since` on, perhaps of other contexts too."""
        why = "; ".join(self.log.errors[since:]) or "no reason given"
        if is_out_of_memory(why):
            return OutOfMemory(
                f"{self.name}: {what}: {needed:,} bytes are needed, {cuda.free_memory():,} are free on the GPU ({why[:300]})",
                fix="free GPU memory, or use smaller images or batches",
            )
        return BackendFailed(f"{self.name}: {what}: {self.trt_library.title} says: {why[:500]}")


def _fits(shape: tuple[int, ...], low: tuple[int, ...], high: tuple[int, ...]) -> bool:
    return len(shape) == len(low) and all(a <= size <= b for size, a, b in zip(shape, low, high, strict=True))


def _sizes(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


class _Context:
    """An execution context for one set of input shapes, with a stream and buffers of its own. For one thread at a time."""

    def __init__(self, stage: Stage, shapes: Shapes, profile: int) -> None:
        self.shapes, self._stage = shapes, stage
        self._stream = cuda.Stream()
        self._graph: cuda.Graph | None = None
        self._warm = False
        since = len(stage.log.errors)
        self._context = stage.create_context()
        if self._context is None:
            raise stage.failure("no execution context", stage.engine.device_memory_size_v2, since)
        ready = self._context.set_optimization_profile_async(profile, self._stream.handle)
        self._stream.synchronize()
        ready = ready and all(self._context.set_input_shape(name, shape) for name, shape in shapes.items())
        if not ready or self._context.infer_shapes():
            raise stage.failure(f"inputs of {shapes} are not taken", 0, since)
        self._buffers = {name: self._bind(name) for name in (*stage.inputs, *stage.outputs)}

    def _bind(self, name: str) -> cuda.DeviceArray:
        shape = tuple(self._context.get_tensor_shape(name))
        buffer = cuda.DeviceArray(self._stage.device_memory, shape, self._stage.dtypes[name])
        self._context.set_tensor_address(name, buffer.address)
        return buffer

    def run(self, inputs: Mapping[str, NDArray[Any] | cuda.DeviceArray]) -> None:
        """Queue the copies of the inputs, contiguous and of the engine's types, and the engine.

        Inputs must live until `keep`, `fetch` or `drain` returns.
        """
        for name, values in inputs.items():
            address = values.address if isinstance(values, cuda.DeviceArray) else values.ctypes.data
            self._stream.copy(self._buffers[name].address, address, self._buffers[name].nbytes)
        if self._graph is not None:
            self._graph.launch(self._stream)
            return
        self._enqueue()
        if not self._warm:
            # TensorRT finishes what it put off in the first run, which therefore cannot be the captured one.
            self._warm = True
            self._stream.synchronize()
            self._graph = self._capture()

    def _capture(self) -> cuda.Graph | None:
        """The engine's work as one graph, or None where it cannot be captured."""
        if self._stage.trt_library == TENSORRT_RTX or not self._context.is_stream_capturable(self._stream.handle):
            return None
        return cuda.Graph(self._stream, self._enqueue)

    def _enqueue(self) -> None:
        since = len(self._stage.log.errors)
        if not self._context.execute_async_v3(self._stream.handle):
            raise self._stage.failure("the engine did not run", self._stage.engine.device_memory_size_v2, since)

    def keep(self, name: str) -> cuda.DeviceArray:
        """A copy of an output, on the GPU, once all is done."""
        buffer = self._buffers[name]
        result = cuda.DeviceArray(self._stage.device_memory, buffer.shape, buffer.dtype)
        self._stream.copy(result.address, buffer.address, buffer.nbytes)
        self._stream.synchronize()
        return result

    def fetch(self) -> Maps:
        """All outputs in the host's memory, float32, once all is done."""
        arrays = {}
        for name in self._stage.outputs:
            buffer = self._buffers[name]
            arrays[name] = cuda.pinned_array(self._stage.pinned_memory, buffer.shape, buffer.dtype)
            self._stream.copy(arrays[name].ctypes.data, buffer.address, buffer.nbytes)
        self._stream.synchronize()
        return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}

    def drain(self) -> None:
        """Wait for what is queued, after a failure: until then the buffers and the inputs are in use."""
        with suppress(SmcError):
            self._stream.synchronize()
