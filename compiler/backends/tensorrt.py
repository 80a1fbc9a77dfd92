"""Plans for TensorRT and TensorRT-RTX: one engine a stage, from typed graphs.

Both libraries have one Python interface. TensorRT builds on the target GPU alone, and tunes by timing, the FlashAttention plugin
against its own attention included; TensorRT-RTX builds anywhere, for a compute capability by name, and compiles its kernels for good
on the target.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import math
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.reports import LAYERS
from smc.compiler.targets import Target
from smc.exported.engines.tensorrt_library import TENSORRT, TENSORRT_RTX, Library, is_out_of_memory, make_log
from smc.exported.errors import BackendFailed, BundleMismatch, NoTarget, OutOfMemory
from smc.exported.images import PATCH

if TYPE_CHECKING:
    from smc.exported.engines.cuda_memory import Device

Shape = tuple[int, ...]
Range = tuple[Shape, Shape, Shape]
"""The smallest, usual and largest shape of an input."""

Profile = dict[str, Range]
"""Input -> its range."""

_SHARES = {"encoder": (0.0, 0.4), "decoder": (0.4, 1.0)}
"""The part of the progress bar for each stage: the decoder has a quarter more weights and twice the nodes."""

_BFLOAT16_SM = 80
"""The oldest compute capability, 8.0, that has bfloat16."""

_PLUGIN_SM = 80
"""The oldest compute capability, 8.0, that the FlashAttention plugin is compiled for."""

_RUNS = 50
"""How often an engine is run to time it."""


class _TensorRtBackend(ABC):
    """What the two libraries share: parsing, building, progress, errors and the list of layers."""

    def __init__(self, library: Library) -> None:
        self.NAME = library.name
        self._library = library

    def caveat(self, target: Target) -> str:
        return "not run on hardware yet"

    @abstractmethod
    def refusal(self, target: Target) -> str:
        """Why plans for `target` cannot be built on this machine, or ""."""

    @abstractmethod
    def _configure(self, trt: Any, config: Any, job: PlanJob, notes: list[str]) -> None:
        """Say what the engine is for, and how much memory it may use. `notes` takes what the user should know."""

    @abstractmethod
    def _profiles(self, inputs: Sequence[Any], stage: str, job: PlanJob) -> list[Profile]:
        """The ranges of shapes that the engine is tuned for."""

    def _keep_timings(self, trt: Any, config: Any, job: PlanJob, notes: list[str]) -> None:  # noqa: B027  # TensorRT-RTX takes none
        """Keep what the build measured for later ones. `notes` takes why that failed."""

    def precisions(self, target: Target) -> Sequence[Precision]:
        return ("hybrid", "fp16", "bf16", "fp32") if target.sm_number >= _BFLOAT16_SM else ("hybrid", "fp16", "fp32")

    def version(self) -> str:
        return str(self._library.load().__version__)

    def ingredients(self, target: Target, tuning: Path | None) -> Sequence[str]:
        return ()

    def runs_here(self, target: Target) -> bool:
        try:
            return _find_device(target) is not None
        except NoTarget:
            return False

    def write_plan(self, job: PlanJob) -> dict[str, str]:
        """Build `encoder.engine` and `decoder.engine`, and write LAYERS beside them.

        Raises:
            NoTarget: the library, or for TensorRT the GPU, is not there.
            BackendFailed: a graph cannot be parsed or built; the message names the node.
            OutOfMemory: the build needs more memory.
            OSError: the files cannot be written.
        """
        trt = self._library.load()
        plan, layers = {}, {}
        for stage in ("encoder", "decoder"):
            engine, layers[stage] = self._build_stage(trt, stage, job)
            plan[stage] = f"{stage}.engine"
            (job.output / plan[stage]).write_bytes(engine)
        (job.output / LAYERS).write_text(json.dumps(layers) + "\n")
        return plan

    def _build_stage(self, trt: Any, stage: str, job: PlanJob) -> tuple[Any, dict[str, Any]]:
        """The serialised engine, and what LAYERS says of it."""
        return self._build_graph(trt, stage, job.graphs[stage], job, _SHARES[stage])

    def _build_graph(self, trt: Any, stage: str, graph: Path, job: PlanJob, share: tuple[float, float]) -> tuple[Any, dict[str, Any]]:
        """`_build_engine`, while progress is reported from one end of `share` to the other."""
        progress = _Progress(trt)
        start, end = share
        description = f"building the {stage} with {self._library.title} {trt.__version__}"
        # In a thread of its own: the build does not return to Python for many seconds, and this thread must take signals.
        with _standard_output_apart(), ThreadPoolExecutor(1) as thread:
            build = thread.submit(self._build_engine, trt, stage, graph, job, progress)
            try:
                job.report(description, start)
                while build not in wait([build], timeout=0.2).done:
                    job.report(description, start + (end - start) * progress.fraction)
            except BaseException:
                progress.cancelled = True
                job.report("stopping; TensorRT finishes its step first", start + (end - start) * progress.fraction)
                raise
        for note in progress.notes:
            job.report(note, end)
        return build.result()

    def _build_engine(self, trt: Any, stage: str, graph: Path, job: PlanJob, progress: _Progress) -> tuple[Any, dict[str, Any]]:
        log = make_log(trt, job.verbose)
        builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self._parse(trt, graph, network, log)
        _check_outputs(network, graph)
        _allow_unfused_attention(trt, network)
        config = builder.create_builder_config()
        config.progress_monitor = progress.monitor
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the graph means float32
        self._configure(trt, config, job, progress.notes)
        inputs = [network.get_input(i) for i in range(network.num_inputs)]
        for profile in self._profiles(inputs, stage, job):
            _add_profile(builder, config, profile)
        log.errors.clear()
        engine = builder.build_serialized_network(network, config)
        if engine is None:
            raise self._failure(f"{graph.name}: {self._library.title} could not build the engine", log.errors)
        self._keep_timings(trt, config, job, progress.notes)
        workspace = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        return engine, _describe(trt, network) | {"engine_bytes": engine.nbytes, "workspace_limit_bytes": workspace}

    def _parse(self, trt: Any, graph: Path, network: Any, log: Any) -> None:
        parser = trt.OnnxParser(network, log)
        if parser.parse_from_file(str(graph)):
            return
        problems = [parser.get_error(i) for i in range(parser.num_errors)]
        if not problems:
            raise self._failure(f"{graph.name}: {self._library.title} could not read the graph", log.errors)
        places = [_place(problem) for problem in problems]
        more = f"; and {len(problems) - 1} more: {', '.join(places[1:4])}" if len(problems) > 1 else ""
        why = _without_noise([problems[0].desc()]) or log.errors[:1]
        raise self._failure(f"{graph.name}: {self._library.title} {trt.__version__} does not take {places[0]}", why, more)

    def _failure(self, what: str, errors: Sequence[str], more: str = "") -> BackendFailed | OutOfMemory:
        why = "; ".join(_without_noise(errors))[:800] or "no reason given"
        if any(map(is_out_of_memory, errors)):
            return OutOfMemory(f"{what}: {why}", fix="free memory, or build for fewer or smaller shapes, or a smaller --max-batch")
        return BackendFailed(
            f"{what}: {why}{more}", fix="--verbose prints its whole log, --dump-graphs DIR writes the graph after each pass"
        )


class _TensorRt(_TensorRtBackend):
    """The full library, on the target GPU."""

    def refusal(self, target: Target) -> str:
        if target.sm is None:
            return "runs on NVIDIA GPUs only"
        needed = f"builds only on a machine with a GPU of sm {target.sm}, such as {target.title}"
        try:
            self._library.load()
        except NoTarget as why:
            return f"{needed}, after {why.fix}"
        try:
            return "" if _find_device(target) is not None else f"{needed}, which this one has not"
        except NoTarget as why:
            return f"{needed}; here: {why}"

    def _build_stage(self, trt: Any, stage: str, job: PlanJob) -> tuple[Any, dict[str, Any]]:
        """The faster of two engines: one with TensorRT's own attention, one with the FlashAttention plugin where that can be had."""
        start, end = _SHARES[stage]
        middle = (start + end) / 2
        built = {"native": self._build_graph(trt, stage, job.graphs[stage], job, (start, middle))}
        milliseconds: dict[str, float] = {}
        why_not = ""
        try:
            with tempfile.TemporaryDirectory(dir=job.output) as directory:
                graph = _write_plugin_graph(stage, job, Path(directory))
                built["plugin"] = self._build_graph(trt, stage, graph, job, (middle, end))
            for name, (engine, _) in built.items():
                milliseconds[name] = self._time(trt, stage, engine, job)
                gc.collect()  # an engine and its contexts refer to one another, and the next needs their memory
        except Exception as error:  # Triton's and TensorRT's own included: there is a whole engine already, whatever befell the second
            why_not = str(error) or type(error).__name__
            job.report(f"the {stage} keeps TensorRT's own attention: {why_not}", end)
        taken = min(milliseconds, key=milliseconds.__getitem__, default="native")
        engine, layers = built[taken]
        return engine, layers | {"attention": {"taken": taken, "milliseconds": milliseconds, "why_not": why_not}}

    def _time(self, trt: Any, stage: str, engine: Any, job: PlanJob) -> float:
        """Milliseconds of a run as the runtime does it, at the usual shapes, copies of the inputs included: the median."""
        from smc.exported.engines import cuda_memory
        from smc.exported.engines.tensorrt import Stage

        cuda_memory.use_device(_require_device(job.target).index)
        loaded = Stage(stage, self._library, trt, memoryview(engine), job.verbose)
        random = np.random.default_rng(0)
        inputs = {}
        for name in loaded.inputs:
            _, usual, _ = loaded.engine.get_tensor_profile_shape(name, 0)
            pixels = loaded.dtypes[name] == np.uint8
            values = random.integers(0, 256, tuple(usual)) if pixels else random.standard_normal(tuple(usual))
            inputs[name] = values.astype(loaded.dtypes[name])
        seconds = []
        with loaded.context({name: values.shape for name, values in inputs.items()}) as context:
            for _ in range(_RUNS):  # the first few are slow, which a median does not mind
                start = time.perf_counter()
                context.run(inputs)
                context.keep(loaded.outputs[0])  # waits
                seconds.append(time.perf_counter() - start)
        return 1000 * statistics.median(seconds)

    def _configure(self, trt: Any, config: Any, job: PlanJob, notes: list[str]) -> None:
        from smc.exported.engines import cuda_memory

        cuda_memory.use_device(_require_device(job.target).index)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, cuda_memory.free_memory() * 3 // 4)  # the rest is for weights
        config.builder_optimization_level = 5  # times every tactic
        path, timings = _timing_cache(trt, job), b""
        try:
            timings = path.read_bytes()
        except FileNotFoundError:
            pass
        except OSError as error:
            notes.append(f"the timing cache is not used: {error}")
        # TensorRT leaves aside what is damaged or was measured on another device.
        if not config.set_timing_cache(config.create_timing_cache(timings), ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)

    def _keep_timings(self, trt: Any, config: Any, job: PlanJob, notes: list[str]) -> None:
        path = _timing_cache(trt, job)
        timings = config.get_timing_cache().serialize()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Elsewhere until it is whole: other builds for this GPU may be running.
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as directory:
                whole = Path(directory) / path.name
                whole.write_bytes(timings)
                os.replace(whole, path)
        except OSError as error:
            notes.append(f"the timing cache is not kept: {error}")

    def _profiles(self, inputs: Sequence[Any], stage: str, job: PlanJob) -> list[Profile]:
        profiles = [_profile(inputs, stage, [shape], job.max_batch) for shape in job.shapes]
        if stage == "decoder" and len(job.shapes) > 1:
            profiles.append(_profile(inputs, stage, job.shapes, job.max_batch))  # for pairs of two shapes
        return profiles


class _TensorRtRtx(_TensorRtBackend):
    """The library that builds without a GPU."""

    def refusal(self, target: Target) -> str:
        if target.sm is None:
            return "runs on NVIDIA GPUs only"
        try:
            trt = self._library.load()
        except NoTarget as why:
            return f"{why}; {why.fix}"
        if _compute_capability(trt, target) is None:
            return f"{self._library.title} does not run on sm {target.sm}"
        return ""

    def _configure(self, trt: Any, config: Any, job: PlanJob, notes: list[str]) -> None:
        assert job.target.memory_gib is not None
        config.num_compute_capabilities = 1
        config.set_compute_capability(_compute_capability(trt, job.target), 0)
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, job.target.memory_gib * 2**30 * 3 // 4)

    def _profiles(self, inputs: Sequence[Any], stage: str, job: PlanJob) -> list[Profile]:
        # One is enough: kernels are specialised for each shape when it is first met.
        return [_profile(inputs, stage, job.shapes, job.max_batch)]


def _write_plugin_graph(stage: str, job: PlanJob, directory: Path) -> Path:
    """The stage's graph with the FlashAttention plugin in place of attention, and the plugin made known to TensorRT.

    Raises:
        BackendFailed: the plugin is not for this GPU, or for none of the graph's attentions.
        ImportError: Triton, which compiles its kernel, is not installed.
        ValueError: TensorRT does not take it, such as after builds for another GPU in this process.
    """
    sm = job.target.sm_number
    if sm < _PLUGIN_SM:
        raise BackendFailed(f"the FlashAttention plugin is for sm 8.0 and newer, and {job.target.title} is of sm {job.target.sm}")
    from smc.compiler.graph_files import import_graph, read_onnx, write_graph
    from smc.passes.attention_plugin import AttentionPlugin
    from smc.passes.cancel_layout import CancelLayout
    from smc.plugins.flash_attention.tensorrt_plugin import register

    register(sm)
    graph = import_graph(read_onnx(job.graphs[stage]), stage)
    report = AttentionPlugin()(graph)
    if not report.rewrites:
        reasons = "; ".join(f"{declined.node}: {declined.why}" for declined in report.declined[:3])
        raise BackendFailed(f"the FlashAttention plugin takes none of the graph's attentions ({reasons or 'it has none'})")
    CancelLayout()(graph)
    write_graph(graph, directory, stage)
    return directory / f"{stage}.onnx"


full = _TensorRt(TENSORRT)
rtx = _TensorRtRtx(TENSORRT_RTX)


def _find_device(target: Target) -> Device | None:
    """The first GPU of this machine that plans for `target` run on.

    Raises NoTarget where there is no GPU at all, or one that fits and a driver that is too old to run them.
    """
    from smc.exported.engines import cuda_memory
    from smc.exported.engines.tensorrt import check_driver

    found = next((device for device in cuda_memory.devices() if device.sm == target.sm), None)
    if found is not None:
        try:
            check_driver(cuda_memory.driver_version(), cuda_memory.runtime_version())
        except BundleMismatch as why:
            raise NoTarget(str(why), fix=why.fix) from why
    return found


def _require_device(target: Target) -> Device:
    device = _find_device(target)
    if device is None:
        raise NoTarget(f"this machine has no GPU of sm {target.sm}", fix="smc targets shows what can be built here")
    return device


def _compute_capability(trt: Any, target: Target) -> Any:
    """The library's name for the target's compute capability, or None if it has none."""
    return trt.ComputeCapability.__members__.get(f"SM{target.sm}".replace(".", ""))


def _timing_cache(trt: Any, job: PlanJob) -> Path:
    """Where the measured times are kept: they hold for one kind of GPU, driver and library."""
    from smc.exported.engines import cuda_memory

    device = _require_device(job.target)
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", device.name)
    driver = ".".join(map(str, cuda_memory.driver_version()))
    return job.cache / f"{gpu}-sm{device.sm}-driver{driver}-tensorrt{trt.__version__}.timing"


def _profile(inputs: Sequence[Any], stage: str, shapes: Sequence[tuple[int, int]], max_batch: int) -> Profile:
    """The ranges that take every one of `shapes`, (H, W) of images, and up to `max_batch` pairs, with the first shape as the usual one.

    Raises BackendFailed where a size that is static in the graph differs from these.
    """
    profile = {}
    for tensor in inputs:
        fixed = tuple(tensor.shape)
        sizes = [_input_sizes(tensor, stage, *shape) for shape in shapes]
        extents = list(zip(*sizes, strict=True))
        ranges = tuple(map(min, extents)), sizes[0], tuple(map(max, extents))
        wanted = [(batch, *size) for batch, size in zip(_batches(stage, fixed[0], max_batch), ranges, strict=True)]
        if any(own not in (-1, size) for shape in wanted for own, size in zip(fixed, shape, strict=True)):
            raise BackendFailed(
                f"{stage}: the graph's input {tensor.name} is fixed at {_sizes(fixed)}, and the plan is to take {_sizes(wanted[0])} "
                f"to {_sizes(wanted[2])}",
                fix="export it with dynamic dimensions, or give its fixed sizes alone as --shape and --max-batch",
            )
        low, usual, high = wanted
        profile[tensor.name] = (low, usual, high)
    return profile


def _batches(stage: str, fixed: int, max_batch: int) -> tuple[int, int, int]:
    """The smallest, usual and largest batch of an input, whose batch in the graph is `fixed`, or -1."""
    if stage == "decoder":
        return 1, 1, max_batch
    # The matcher encodes one image at a time, so that an encoder of one image serves any number of pairs.
    return (1, 1, 1) if fixed == 1 else (1, 1, 2 * max_batch)


def _input_sizes(tensor: Any, stage: str, height: int, width: int) -> Shape:
    """The shape of an input, without its batch, for images of (height, width)."""
    if stage == "decoder":
        grid = height // PATCH, width // PATCH
        tokens_in_a_row = len(tensor.shape) == 3
        return (math.prod(grid), tensor.shape[-1]) if tokens_in_a_row else (*grid, tensor.shape[-1])
    return (height, width, 3) if tensor.dtype.name == "UINT8" else (3, height, width)


def _sizes(shape: Shape) -> str:
    return "x".join("?" if size == -1 else str(size) for size in shape)


def _add_profile(builder: Any, config: Any, profile: Profile) -> None:
    ranges = builder.create_optimization_profile()
    for name, (low, usual, high) in profile.items():
        ranges.set_shape(name, low, usual, high)
    config.add_optimization_profile(ranges)


def _allow_unfused_attention(trt: Any, network: Any) -> None:
    """Let TensorRT spell out an attention that it has no single kernel for, such as every one in float32: it would refuse to build."""
    for layer in _layers(network):
        if layer.type == trt.LayerType.ATTENTION_INPUT:
            layer.__class__ = trt.IAttentionInputLayer  # networks give out layers by their base class
            layer.attention.decomposable = True


def _check_outputs(network: Any, graph: Path) -> None:
    """Raise BackendFailed for an output that the runtime could not hand on: NumPy has no bfloat16."""
    for tensor in (network.get_output(i) for i in range(network.num_outputs)):
        if _type_name(tensor) not in ("float32", "float16"):
            raise BackendFailed(f"{graph.name}: its output {tensor.name} is {_type_name(tensor)}; float32 or float16 was expected")


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(i) for i in range(network.num_layers))


_TYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


def _describe(trt: Any, network: Any) -> dict[str, Any]:
    """The network's layers, how many there are of each type and precision, and the bytes of its weights."""
    layers, totals, weights = [], Counter[tuple[str, str]](), 0
    for layer in _layers(network):
        if layer.num_outputs == 0:  # the condition of an If or a Loop
            continue
        outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
        kind, precision = layer.type.name.lower(), _type_name(outputs[0])
        totals[kind, precision] += 1
        weights += _weight_bytes(trt, layer)
        layers.append(
            {
                "name": layer.name,
                "type": kind,
                "outputs": [
                    {"type": _type_name(tensor), "shape": [None if size == -1 else size for size in tensor.shape]} for tensor in outputs
                ],
            }
        )
    counts = [{"type": kind, "precision": precision, "layers": count} for (kind, precision), count in totals.most_common()]
    return {"layers": layers, "totals": counts, "weight_bytes": weights}


def _type_name(tensor: Any) -> str:
    return _TYPES.get(tensor.dtype.name, tensor.dtype.name.lower())


def _weight_bytes(trt: Any, layer: Any) -> int:
    if layer.type == trt.LayerType.CONSTANT:
        output = layer.get_output(0)
        return int(math.prod(output.shape) * output.dtype.itemsize)
    owners = {trt.LayerType.CONVOLUTION: trt.IConvolutionLayer, trt.LayerType.DECONVOLUTION: trt.IDeconvolutionLayer}
    if layer.type not in owners:
        return 0
    layer.__class__ = owners[layer.type]
    return sum(value.nbytes for value in (layer.kernel, layer.bias) if value is not None)


def _place(problem: Any) -> str:
    """The ONNX node that a parser's error is about, with the local functions that it is in."""
    inside = "".join(f", in {function}" for function in problem.local_function_stack())
    return f"node {problem.node_name() or problem.node()} ({problem.node_operator()}){inside}"


def _without_noise(messages: Sequence[str]) -> list[str]:
    """Error messages without places in TensorRT's own sources, and without its complaints that there is no driver."""
    lines = [line for message in messages for line in message.splitlines() if "catchCudaError" not in line]
    return [re.sub(r" In \w+(\(\))? at /[^)\s]*", "", line) for line in lines if not line.startswith("Invalid Node - ")]


class _Progress:
    """How far a build is, and the way to stop it."""

    def __init__(self, trt: Any) -> None:
        self.fraction = 0.0
        self.cancelled = False
        self.notes: list[str] = []  # what the user should know of the build, once it is done
        self._phases: dict[str, tuple[str | None, int, int]] = {}  # name -> phase around it, steps, steps done
        self._lock = threading.Lock()  # TensorRT calls from several threads
        self.monitor = _make_monitor(trt, self)

    def start(self, name: str, parent: str | None, steps: int) -> None:
        with self._lock:
            self._phases[name] = parent, steps, 0

    def step(self, name: str, step: int) -> None:
        with self._lock:
            around, steps, _ = self._phases[name]
            self._phases[name] = around, steps, step + 1
            done, within = 0.0, name
            while (phase := self._phases.get(within)) is not None:
                around, steps, finished = phase
                done, within = min((finished + done) / steps, 1.0), around or ""
            self.fraction = max(self.fraction, done)  # phases may end early, and come again

    def finish(self, name: str) -> None:
        with self._lock:
            self._phases.pop(name, None)


def _make_monitor(trt: Any, progress: _Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the base comes with the library
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.step(phase_name, step)
            return not progress.cancelled

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()


@contextlib.contextmanager
def _standard_output_apart() -> Iterator[None]:
    """Send what TensorRT's compiler prints to C's standard output to stderr: standard output is for results."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(saved, 1)
        os.close(saved)
