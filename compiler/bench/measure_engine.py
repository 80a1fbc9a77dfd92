"""Times, errors and memory of whatever is an `Engine`: bundles, and ONNX Runtime as a peer."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import msgspec
import numpy as np
from numpy.typing import NDArray

from smc.compiler.bench import records
from smc.compiler.bench.inputs import ImagePair, grid_matches, image_pairs, view_pairs
from smc.compiler.bench.records import Memory, Result, Shape, Timing
from smc.compiler.bench.references import check_accuracy
from smc.compiler.bench.sampling import RUNS, sample, wall
from smc.compiler.bench.tasks import Device, OnnxRuntimeTask, PlanTask, Work
from smc.exported.bundle import open_bundle
from smc.exported.engines import Engine, Maps, MatchingEngine, load_engine
from smc.exported.errors import BackendFailed
from smc.exported.images import load_framed
from smc.exported.manifest import Manifest
from smc.exported.manifest import Shape as InputShape
from smc.exported.matcher import Matcher
from smc.exported.matching import fast_reciprocal_nn, match_confidence

DESCRIBER, MATCHER = "describer", "matcher"
"""The sections of an engine that matches on the GPU, which no other engine has: what is decoded for it, and the matching."""

STAGES = {
    "encoder": records.ENCODER,
    "decoder": records.DECODERS_AND_HEADS,
    "decoder/decoders": records.DECODERS,
    "decoder/heads": records.HEADS,
    DESCRIBER: records.DECODERS_AND_DESCRIPTORS,
    MATCHER: records.MATCHING,
}
"""Section -> stage; other sections keep their names."""

Found = list[tuple[NDArray[np.int64], NDArray[np.int64]]]
"""Of each pair, the pixels in either image that match."""


class Section(Protocol):
    """A part of an engine's work: `replay(n)` replays its captured graph n times and returns seconds a replay, by CUDA's events."""

    name: str
    replay: Callable[[int], float]


@runtime_checkable
class Sectioned(Protocol):
    """What an engine offers beside `Engine` for its parts to be timed on the GPU alone."""

    def sections(self, batch: int, shape: Shape) -> Sequence[Section]: ...

    def memory_bytes(self) -> int: ...


def measure_plan(task: PlanTask, result: Result, save: Callable[[], None]) -> None:
    """Measure a bundle. `save` keeps what `result` holds so far."""
    bundle = open_bundle(task.bundle, everything=False)
    manifest = bundle.manifest
    result.device = "cpu"
    free = _use_gpu(manifest.target.sm, result) if manifest.target.sm is not None else None
    result.versions = {manifest.backend.name: manifest.backend.version}
    engine = load_engine(bundle)
    del bundle
    batches = [batch for batch in task.work.batches if manifest.max_batch is None or batch <= manifest.max_batch]
    if skipped := sorted(set(task.work.batches) - set(batches)):
        result.notes.append(f"batches of {', '.join(map(str, skipped))}: the plan takes {manifest.max_batch} pairs at most")
    _measure(engine, manifest, msgspec.structs.replace(task.work, batches=batches), result, save, free)
    if task.block_matching:  # last, since torch takes memory of its own
        _measure_block_matching(engine, task, result, "cpu" if manifest.target.sm is None else "cuda")


def measure_onnxruntime(task: OnnxRuntimeTask, result: Result, save: Callable[[], None]) -> None:
    """Measure ONNX Runtime on the graphs of a bundle for CPUs. `save` keeps what `result` holds so far."""
    import onnxruntime

    manifest = open_bundle(task.bundle, everything=False).manifest
    result.versions, result.device = {"onnxruntime": onnxruntime.__version__}, "cpu"
    free = None
    if task.on == "cuda":
        from smc.exported.engines import cuda_memory

        cuda_memory.use_device(0)
        result.device, free = cuda_memory.devices()[0].name, cuda_memory.free_memory()
    _measure(OnnxRuntimePeer(task), manifest, task.work, result, save, free)


class OnnxRuntimePeer:
    """ONNX Runtime as its users run it: its own optimisations, features left on the device. Implements `Engine`."""

    def __init__(self, task: OnnxRuntimeTask) -> None:
        import onnxruntime

        providers = {"cuda": ["CUDAExecutionProvider", "CPUExecutionProvider"], "cpu": ["CPUExecutionProvider"]}[task.on]
        self._device = task.on
        self._encoder, self._decoder = (
            onnxruntime.InferenceSession(Path(task.bundle) / f"{stage}.onnx", providers=providers) for stage in ("encoder", "decoder")
        )
        if self._encoder.get_providers()[0] != providers[0]:
            raise RuntimeError(f"ONNX Runtime took {self._encoder.get_providers()[0]} in place of {providers[0]}")

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Any:
        from smc.exported.images import as_plan_input

        binding = self._encoder.io_binding()
        binding.bind_cpu_input(self._encoder.get_inputs()[0].name, as_plan_input(images, np.float32))
        binding.bind_output(self._encoder.get_outputs()[0].name, self._device)
        self._encoder.run_with_iobinding(binding)
        return binding.get_outputs()[0]

    def decode(self, features1: Any, features2: Any) -> Maps:
        binding = self._decoder.io_binding()
        for node, features in zip(self._decoder.get_inputs(), (features1, features2), strict=True):
            binding.bind_ortvalue_input(node.name, features)
        names = [node.name for node in self._decoder.get_outputs()]
        for name in names:
            binding.bind_output(name, "cpu")
        self._decoder.run_with_iobinding(binding)
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))


def _use_gpu(sm: str, result: Result) -> int:
    """Make the context of the GPU that the plan will choose, and return how much of its memory is free then."""
    from smc.exported.engines import cuda_memory

    for device in cuda_memory.devices():
        if device.sm == sm:
            cuda_memory.use_device(device.index)
            result.device = device.name
            return cuda_memory.free_memory()
    return 0  # loading the engine says what is wrong


def _measure(engine: Engine, manifest: Manifest, work: Work, result: Result, save: Callable[[], None], free: int | None) -> None:
    for shape in work.shapes:
        # Of the bundle's shapes, one: the matcher could find that images fit another one better.
        narrowed = msgspec.structs.replace(manifest, shapes=[InputShape(height=shape[0], width=shape[1])])
        pairs = image_pairs(work.seed, shape, max(work.batches))
        for batch in work.batches:
            _measure_batch(engine, Matcher(engine, narrowed), work, shape, pairs[:batch], result)
            own = engine.memory_bytes() if isinstance(engine, Sectioned) else None
            result.memory.append(Memory(shape, batch, _taken(free), own, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
            save()


def _synchronize() -> None:
    from cuda.bindings import runtime

    (status,) = runtime.cudaDeviceSynchronize()
    if status != runtime.cudaError_t.cudaSuccess:
        raise BackendFailed(f"running on the GPU: {status.name}")


def _taken(free: int | None) -> int | None:
    if free is None:
        return None
    from smc.exported.engines import cuda_memory

    return free - cuda_memory.free_memory()


def _measure_batch(engine: Engine, matcher: Matcher, work: Work, shape: Shape, pairs: list[ImagePair], result: Result) -> None:
    batch = len(pairs)
    views = view_pairs(pairs, shape)
    images = [np.stack([pair[i].rgb for pair in views]) for i in (0, 1)]

    def image_in() -> None:
        if isinstance(engine, MatchingEngine):  # which resizes them itself
            for image in itertools.chain(*pairs):
                load_framed(image, [shape])
        else:
            view_pairs(pairs, shape)

    def encode() -> list[Any]:
        if isinstance(engine, MatchingEngine):  # which matches images of one shape so
            both = engine.encode(np.concatenate(images))
            return [both[:batch], both[batch:]]
        return [engine.encode(side) for side in images]

    def decode() -> Maps:
        return engine.decode(*features)

    def match_each() -> None:
        for pair in pairs:
            matcher.match(*pair)

    def match_together() -> None:
        prepared = view_pairs(pairs, shape)
        encoded = [engine.encode(np.stack([pair[i].rgb for pair in prepared])) for i in (0, 1)]
        matches_out(match_on_host(engine.decode(*encoded)))

    def match_on_host(maps: Maps) -> Found:
        found = []
        for i in range(batch):
            xy1, xy2 = fast_reciprocal_nn(maps["desc1"][i], maps["desc2"][i])
            match_confidence(xy1, xy2, maps["desc_conf1"][i], maps["desc_conf2"][i])
            found.append((xy1, xy2))
        return found

    def matches_out(found: Found) -> None:
        for pair, sides in zip(views, found, strict=True):
            for view, xy in zip(pair, sides, strict=True):
                view.framing.to_image(xy)

    def finish() -> None:
        """Wait for the GPU, if there is one: an engine may return before it is done."""
        if result.device != "cpu":
            _synchronize()

    def add(clock: records.Clock, stage: str, run: Callable[[], float]) -> None:
        result.timings.append(Timing(shape, batch, clock, stage, sample(run, work.repeat)))

    features = encode()
    maps = decode()
    result.accuracy += check_accuracy(work, shape, batch, maps)

    add("wall", records.IMAGE_IN, wall(image_in))
    add("wall", records.ENCODER, wall(encode, finish))
    add("wall", records.DECODERS_AND_HEADS, wall(decode, finish))
    add("wall", records.MATCHES_OUT, wall(lambda: matches_out([(grid_matches(shape),) * 2] * batch)))
    whole = match_each if batch == 1 or isinstance(engine, MatchingEngine) else match_together
    add("wall", records.END_TO_END, wall(whole, finish))
    if not isinstance(engine, MatchingEngine):
        add("wall", records.MATCHING, wall(lambda: match_on_host(maps)))
    if isinstance(engine, Sectioned):
        real = {"encoder": encode, DESCRIBER: match_each, MATCHER: match_each}
        for section in engine.sections(batch, shape):
            add("device", STAGES.get(section.name, section.name), partial(_replay, section, real.get(section.name, decode)))


def _replay(section: Section, real: Callable[[], object]) -> float:
    """Seconds of a section's replay, after a real run has left there what it works on."""
    real()
    return section.replay(RUNS)


def _measure_block_matching(engine: Engine, task: PlanTask, result: Result, device: Device) -> None:
    """Time the original's matching, in torch, on the descriptors of one pair in the first shape, uploaded before."""
    import torch

    from smc.compiler.bench.torch_matching import pixel_confidence, reciprocal_matches

    torch.set_float32_matmul_precision("highest")
    shape = task.work.shapes[0]
    (views,) = view_pairs(image_pairs(task.work.seed, shape, 1), shape)
    maps = engine.decode(*(engine.encode(view.rgb[None]) for view in views))
    desc1, desc2, conf1, conf2 = (torch.from_numpy(maps[name][0]).to(device) for name in ("desc1", "desc2", "desc_conf1", "desc_conf2"))
    seconds = sample(wall(lambda: pixel_confidence(*reciprocal_matches(desc1, desc2), conf1, conf2)), task.work.repeat)
    result.timings.append(Timing(shape, 1, "wall", records.BLOCK_MATCHING, seconds))
