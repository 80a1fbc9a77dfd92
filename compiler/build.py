"""From a checkpoint, or from ONNX files, to a bundle."""

from __future__ import annotations

import datetime
import functools
import gc
import hashlib
import importlib
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from smc.compiler import verify
from smc.compiler.backends import Backend, choose_backend
from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.bundle_writer import Staging, prepare_target, sweep_stale, target_lock
from smc.compiler.packages import cache_directory, require_packages
from smc.compiler.reports import PASSES, StageReport
from smc.compiler.source import STAGES, CheckpointSource, OnnxSource, Source
from smc.compiler.targets import Target, find_target
from smc.compiler.verify import Outputs, SamplePair
from smc.exported.bundle import open_bundle, read_files
from smc.exported.engines import Engine, engine_for
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS
from smc.exported.engines.onnxruntime import WEIGHTS_SUFFIX
from smc.exported.errors import InputMissing, SmcError, UsageError
from smc.exported.manifest import FORMAT_VERSION, BackendInfo, Manifest, Shape, TargetInfo, Tolerance, Verification
from smc.version import VERSION

if TYPE_CHECKING:
    import onnx_ir as ir

    from smc.compiler.graph_files import GraphDumper

TRAINED_SHAPES = tuple(
    shape for long, short in ((512, 384), (512, 336), (512, 288), (512, 256), (512, 160)) for shape in ((short, long), (long, short))
)
"""The (H, W) input shapes that the public checkpoint was trained with, landscape and portrait."""

RECORDED = "reference.npz"

Report = Callable[[str, float], None]
"""Told what the build is doing and which fraction of it is done."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Attributes:
        gpu: a name of `targets.TARGETS`.
        out: the bundle's directory; an older bundle there is replaced.
        checkpoint: the weights to compile; or
        random_seed: the seed of random weights, with `model` as their configuration; or
        onnx: an encoder and a decoder that somebody exported, see `source.OnnxSource`.
        model: a preset's name or the path of a `config.json`, None for "large"; only with `random_seed`.
        shapes: (H, W) input shapes, each a multiple of 16 and at least 48; pairs may mix them. None for the trained ones, or
            for the one shape that ONNX files are fixed to.
        backend: a backend's name, None for the best that can build here.
        precision: "fp32", "hybrid", "fp16" or "bf16", None for the backend's default.
        include, exclude: patterns of names of nodes that HybridCast puts into low precision, and leaves in float32.
        max_batch: pairs at once that a GPU's plan takes.
        tuning: a file of `smc tune`, for the cuda backend; None for what the project knows of the GPU.
        kernels: a directory of compiled kernels, of this or of another machine, that the cuda backend takes them from. The bundle counts
            as another one if other kernels lie there.
        dump_graphs: a directory to write the graph to after every pass.
        verbose: print the backend's own log to stderr.
        force: build even if the bundle is there already.
        wait: wait for another build of the same target to end, rather than give up.
    """

    gpu: str
    out: Path
    checkpoint: Path | None = None
    random_seed: int | None = None
    onnx: tuple[Path, Path] | None = None
    model: str | None = None
    shapes: Sequence[tuple[int, int]] | None = None
    backend: str | None = None
    precision: Precision | None = None
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    max_batch: int = 1
    tuning: Path | None = None
    kernels: Path | None = None
    dump_graphs: Path | None = None
    verbose: bool = False
    force: bool = False
    wait: bool = True


@dataclass(frozen=True)
class BuildResult:
    """`reused`: an up-to-date bundle was found, nothing was built. `seconds`: time by phase. `passes`: what each stage's passes did."""

    path: Path
    manifest: Manifest
    reused: bool
    seconds: dict[str, float] = field(default_factory=dict)
    passes: Sequence[StageReport] = ()


def build(request: BuildRequest, report: Report = lambda description, fraction: None) -> BuildResult:
    """Build a bundle, or find that it is there already.

    Raises:
        UsageError: the request makes no sense.
        NoTarget: nothing here can build for that machine.
        InputMissing, BadCheckpoint, BadInput: the weights or graphs cannot be used.
        CannotWrite, DiskError, Busy: the bundle cannot be written.
        BackendFailed: the exporter or the backend failed.
        AccuracyFailed: the plan's outputs are too far from float32; nothing is kept.
    """
    _check_request(request)
    target = find_target(request.gpu)
    backend = choose_backend(target, request.backend)
    precision = _choose_precision(request, backend, target)
    if target.sm is None and request.max_batch > 1:
        raise UsageError("a plan for CPUs takes any number of pairs at once", fix="leave out --max-batch")
    if (request.tuning or request.kernels) and backend.NAME != "cuda":
        raise UsageError(
            f"{backend.NAME} plans take no tuning file and no kernels",
            fix="leave them out" if target.sm is None else "add --backend cuda",
        )
    require_packages("building", ("torch", "onnx", "onnxscript", "onnx_graphsurgeon", "safetensors", "platformdirs"))
    _check_inputs(request)
    out = prepare_target(request.out)
    dumper = _make_dumper(request.dump_graphs, out, target)
    clock = _Clock(report)
    with target_lock(out, request.wait, on_wait=lambda: clock.phase("waiting", f"waiting for another build of {out.name}", 0)):
        sweep_stale(out)
        clock.phase("weights", "reading weights", 0.01)
        source = _open_source(request)
        job = _Build(request, source, target, backend, precision, clock)
        key = job.key()
        if not request.force and dumper is None and (manifest := _up_to_date(out, key)):
            return BuildResult(out, manifest, reused=True)
        return job.run(out, key, source, dumper)


class _Build:
    """One build that has to be done."""

    def __init__(
        self, request: BuildRequest, source: Source, target: Target, backend: Backend, precision: Precision, clock: _Clock
    ) -> None:
        self.request, self.target, self.backend, self.precision, self.clock = request, target, backend, precision, clock
        self.info, self.reference, self.shapes = source.info, source.reference, _choose_shapes(request, source)

    def key(self) -> str:
        """A hash of everything that the bundle depends on."""
        import torch

        parts: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "tool": [VERSION, _sources()],
            "torch": str(torch.__version__),
            "libraries": [metadata.version(name) for name in ("onnxscript", "onnx-ir", "onnx", "onnx-graphsurgeon", "onnxruntime")],
            "backend": [self.backend.NAME, self.backend.version()],
            "target": self.target.name,
            "config": self.info.config,
            "weights": self.info.checkpoint_sha256 or self.info.source,
            "shapes": [list(shape) for shape in self.shapes],
            "precision": [self.precision, list(self.request.include), list(self.request.exclude)],
            "max_batch": self.request.max_batch,
            "ingredients": list(self.backend.ingredients(self.target, self.request.tuning)),
            "kernels": _kernel_names(self.request.kernels),
        }
        return hashlib.sha256(msgspec.json.encode(parts, order="deterministic")).hexdigest()

    def run(self, out: Path, key: str, source: Source, dumper: GraphDumper | None) -> BuildResult:
        graphs = {stage: f"{stage}.onnx" for stage in STAGES}
        pairs = list(verify.sample_pairs(self.shapes))
        with Staging(out) as staging:
            exported = source.export(self.clock.within("export", 0.03, 0.3))
            references = source.run(pairs, self.clock.within("reference", 0.3, 0.4))
            reports = self._write_graphs(exported, pairs, references, staging, dumper)
            # The plan is loaded next: the two are never in memory together. Graphs are full of cycles, which only a collection frees.
            source.close()
            gc.collect()

            verification = None
            if self._on_gpu:
                with staging.writing() as directory:
                    verify.save_outputs(directory / RECORDED, references)
                verification = self._verify(_graph_engine(staging, graphs), "graph", pairs, references, 0.55)
            stages = self._write_plan(graphs, staging)
            files = staging.seal()

            unverified = Verification(subject="plan", reference=self.reference, tolerance=self._tolerance, pairs=[])
            manifest = Manifest(
                format=FORMAT_VERSION,
                tool_version=VERSION,
                created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                build_key=key,
                model=self.info,
                target=TargetInfo(gpu=self.target.name, sm=self.target.sm),
                backend=BackendInfo(name=self.backend.NAME, version=self.backend.version()),
                precision=self.precision,
                shapes=[Shape(height=height, width=width) for height, width in self.shapes],
                max_batch=self.request.max_batch if self._on_gpu else None,
                stages=stages,
                graphs=graphs,
                recorded=RECORDED if self._on_gpu else None,
                files=files,
                verify_only=_verify_only(stages, files),
                verification=verification or unverified,
            )
            if self.backend.runs_here(self.target):
                self.clock.phase("verify", "loading the plan", 0.9)
                engine = engine_for(manifest, read_files(staging.path, manifest.plan_files))
                verification = self._verify(engine, "plan", pairs, references, 0.92)
                manifest = msgspec.structs.replace(manifest, verification=verification)
            staging.commit(manifest)
        return BuildResult(out, manifest, reused=False, seconds=self.clock.stop(), passes=reports)

    @property
    def _on_gpu(self) -> bool:
        return self.target.sm is not None

    @property
    def _tolerance(self) -> Tolerance:
        return verify.TOLERANCES[self.precision]

    def _write_graphs(
        self,
        exported: dict[str, ir.Model],
        pairs: Sequence[SamplePair],
        references: Sequence[Outputs],
        staging: Staging,
        dumper: GraphDumper | None,
    ) -> list[StageReport]:
        """Run the passes on both stages and write the typed graphs, with the report of what was done.

        Empties `exported`: whatever holds a model keeps its weights in memory.
        """
        from smc.compiler.optimize import StageGraph
        from smc.compiler.pipeline import FLOAT32_STREAMS, PIPELINES, PipelineTask
        from smc.passes.hybrid_cast import UnmatchedPattern, check_patterns

        request = self.request
        # The first pair calibrates: every other shape has the same images, and the same network.
        features = [references[0][name][None] for name in ("features1", "features2")]
        feeds = {"encoder": [[pairs[0].view1], [pairs[0].view2]], "decoder": [features]}
        graphs = {}
        for stage, start in zip(STAGES, (0.4, 0.45), strict=True):
            streams = (self.backend.NAME, stage) in FLOAT32_STREAMS
            task = PipelineTask(stage, self.shapes, request.max_batch, self.precision, request.include, request.exclude, streams)
            graphs[stage] = StageGraph(exported.pop(stage), task, dumper, self.clock.within("optimize", start, start + 0.05))
            graphs[stage].run(PIPELINES[self.backend.NAME])
        try:
            check_patterns([*request.include, *request.exclude], *(stage.graph for stage in graphs.values()))
        except UnmatchedPattern as error:
            raise UsageError(str(error), fix="--dump-graphs DIR writes the graphs with the names of their nodes") from error
        reports = []
        for stage in STAGES:
            graph = graphs.pop(stage)
            graph.cast(feeds[stage])
            with staging.writing() as directory:
                reports.append(graph.write(directory))
        with staging.writing() as directory:
            (directory / PASSES).write_bytes(msgspec.json.format(msgspec.json.encode(reports)))
        return reports

    def _write_plan(self, graphs: dict[str, str], staging: Staging) -> dict[str, str]:
        with staging.writing() as directory:
            job = PlanJob(
                graphs={stage: directory / name for stage, name in graphs.items()},
                target=self.target,
                shapes=self.shapes,
                max_batch=self.request.max_batch,
                output=directory,
                cache=cache_directory(),
                report=self.clock.within("plan", 0.65, 0.9),
                verbose=self.request.verbose,
                tuning=self.request.tuning,
                kernels=self.request.kernels,
            )
            return self.backend.write_plan(job)

    def _verify(
        self, engine: Engine, subject: Literal["plan", "graph"], pairs: Sequence[SamplePair], references: Sequence[Outputs], start: float
    ) -> Verification:
        done = iter(range(len(pairs)))
        verification = verify.compare_engine(
            engine,
            subject,
            self.reference,
            pairs,
            references,
            self._tolerance,
            lambda what: self.clock.phase("verify", what, start + 0.08 * next(done) / len(pairs)),
        )
        verify.check(verification)
        return verification


def _graph_engine(staging: Staging, graphs: dict[str, str]) -> Engine:
    """The typed graphs as they were written."""
    from smc.compiler.graph_engine import GraphEngine

    with staging.writing() as directory:
        contents = {path.name: memoryview(path.read_bytes()) for path in directory.iterdir() if path.stem in graphs}
    return GraphEngine.from_files(contents)


def _verify_only(stages: dict[str, str], files: Iterable[str]) -> list[str]:
    """The files that matching does not need: not a stage's plan, nor the weights and kernels beside it."""
    needed = {stem for name in stages.values() for stem in (name, name.removesuffix(".onnx") + WEIGHTS_SUFFIX)}
    if PLAN in needed:
        needed |= {KERNELS, WEIGHTS}
    return sorted(set(files) - needed)


def _check_request(request: BuildRequest) -> None:
    if [request.checkpoint, request.random_seed, request.onnx].count(None) != 2:
        raise UsageError(
            "one of a checkpoint, random weights and ONNX files is needed",
            fix="give --checkpoint FILE, --random-weights SEED or --onnx ENCODER DECODER",
        )
    if request.random_seed is None and request.model is not None:
        raise UsageError("a checkpoint says itself which model it is", fix="leave out --model")
    if request.random_seed is not None and request.random_seed < 0:
        raise UsageError(f"the seed {request.random_seed} is negative")
    if not 1 <= request.max_batch <= 64:
        raise UsageError(f"a plan for {request.max_batch} pairs at once: 1 to 64 was expected")
    if request.shapes is None:
        return
    if not request.shapes or len(set(request.shapes)) != len(request.shapes):
        raise UsageError("at least one input shape is needed, and none twice")
    for height, width in request.shapes:
        if height % 16 or width % 16 or min(height, width) < 48 or max(height, width) > 8192:
            raise UsageError(f"input shape {width}x{height}: both sides must be multiples of 16, from 48 to 8192")


def _check_inputs(request: BuildRequest) -> None:
    """Refuse what is absent before anything is made on disk."""
    from smc.compiler.config import resolve_config

    _kernel_names(request.kernels)
    if request.random_seed is not None:
        resolve_config(request.model or "large")
    elif request.onnx is not None:
        for path in request.onnx:
            if not path.exists():
                raise InputMissing(f"{path}: no such file", fix="give the encoder's and the decoder's .onnx files, in this order")
    elif request.checkpoint is not None and not os.path.exists(request.checkpoint):
        raise InputMissing(
            f"{request.checkpoint}: no such checkpoint", fix="give a .pth file, or the folder of model.safetensors and config.json"
        )


def _kernel_names(kernels: Path | None) -> list[str]:
    """What lies in a directory of compiled kernels: their names tell them apart. Raises InputMissing."""
    try:
        return [] if kernels is None else sorted(os.listdir(kernels))
    except OSError as error:
        raise InputMissing(
            f"--kernels {kernels}: {error.strerror}", fix="give the directory of compiled kernels of a build's cache, or leave it out"
        ) from error


@functools.cache
def _sources() -> str:
    """A digest of what of this package takes part in builds: its code, and the photographs that they calibrate with."""
    digest = hashlib.sha256()
    for name in ("compiler", "examples", "exported", "passes", "plugins"):
        (folder,) = importlib.import_module(f"smc.{name}").__path__
        for path in sorted(Path(folder).rglob("*.png" if name == "examples" else "*.py")):
            content = path.read_bytes()
            digest.update(f"{name}/{path.relative_to(folder).as_posix()} {len(content)}\0".encode() + content)
    return digest.hexdigest()


def _choose_precision(request: BuildRequest, backend: Backend, target: Target) -> Precision:
    possible = backend.precisions(target)
    precision = request.precision or possible[0]
    if precision not in possible:
        raise UsageError(f"{backend.NAME} plans are {' or '.join(possible)} for {target.title}, not {precision!r}")
    if precision not in ("hybrid", "bf16") and (request.include or request.exclude):
        raise UsageError(
            f"a plan in {precision} has one type for everything, so patterns of nodes mean nothing",
            fix="leave out --include and --exclude",
        )
    return precision


def _choose_shapes(request: BuildRequest, source: Source) -> Sequence[tuple[int, int]]:
    if source.fixed_shape is None:
        return request.shapes or TRAINED_SHAPES
    if request.shapes is not None and list(request.shapes) != [source.fixed_shape]:
        shape = "{1}x{0}".format(*source.fixed_shape)
        raise UsageError(f"{source.info.source} takes the input shape {shape} alone", fix=f"give --shape {shape}, or none")
    return [source.fixed_shape]


def _open_source(request: BuildRequest) -> Source:
    from smc.compiler.checkpoint import load_checkpoint, random_weights
    from smc.compiler.config import resolve_config

    if request.onnx is not None:
        return OnnxSource(*request.onnx)
    if request.checkpoint is not None:
        return CheckpointSource(load_checkpoint(request.checkpoint))
    assert request.random_seed is not None
    return CheckpointSource(random_weights(resolve_config(request.model or "large"), request.random_seed))


def _make_dumper(directory: Path | None, out: Path, target: Target) -> GraphDumper | None:
    """What writes the graphs of all passes. Raises UsageError, CannotWrite."""
    from smc.compiler.graph_files import GraphDumper

    if directory is None:
        return None
    if target.sm is None:
        raise UsageError("plans for CPUs are built without passes, so there is nothing to dump", fix="leave out --dump-graphs")
    if directory.absolute() == out or out in directory.absolute().parents:
        raise UsageError(f"{directory} lies in the bundle, which is replaced as a whole", fix="choose another --dump-graphs")
    return GraphDumper(directory)


def _up_to_date(out: Path, key: str) -> Manifest | None:
    """The manifest of a whole bundle with this key at `out`, if there is one."""
    try:
        bundle = open_bundle(out)
    except SmcError:
        return None
    whole = bundle.files.keys() == bundle.manifest.files.keys()
    return bundle.manifest if whole and bundle.manifest.build_key == key else None


class _Clock:
    """Passes progress on and adds up the time of each phase."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._seconds: dict[str, float] = {}
        self._phase, self._since = "", time.perf_counter()

    def phase(self, name: str, description: str, fraction: float) -> None:
        self.stop()
        self._phase = name
        self._report(description, fraction)

    def within(self, name: str, start: float, end: float) -> Report:
        """A report for a part of the build that counts its own progress from 0 to 1."""
        return lambda description, fraction: self.phase(name, description, start + (end - start) * fraction)

    def stop(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        return dict(self._seconds)
