"""A benchmark from top to bottom: the bundle, its peers, the ablation, the report."""

from __future__ import annotations

import datetime
import hashlib
import re
import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from smc.compiler.bench.ablation import ladder, steps
from smc.compiler.bench.inputs import image_size
from smc.compiler.bench.machine import describe_machine, describe_versions
from smc.compiler.bench.processes import cold_starts, run_task
from smc.compiler.bench.records import SCHEMA, Contestant, Report, Result, Rung, Shape
from smc.compiler.bench.sampling import FEWEST, PATIENCE, RUNS, WARM_UP
from smc.compiler.bench.tasks import Device, OnnxRuntimeTask, PlanTask, Task, TorchTask, WeightsTask, Work
from smc.compiler.bench.variants import ABLATION_ONLY, REFERENCE, VARIANTS
from smc.compiler.output_files import check_output, replacing
from smc.compiler.packages import cache_directory, missing_packages, require_packages
from smc.exported.bundle import read_manifest
from smc.exported.errors import SmcError, UsageError
from smc.exported.manifest import Manifest

if TYPE_CHECKING:
    from smc.compiler.backends.plan_job import Precision

ONNXRUNTIME = "onnxruntime"
PEERS = (*(name for name in VARIANTS if name not in ABLATION_ONLY), ONNXRUNTIME)

SUBJECT = "plan"

PLOT_ENDINGS = (".png", ".svg", ".pdf")

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """What to measure.

    Attributes:
        bundle: the bundle under test.
        others: more bundles of the same weights: one for CPUs for the peer ONNX Runtime, float32 and hybrid ones for the ablation.
        shapes: (H, W) input shapes of the bundle; None for its first.
        batches: pairs at once; None for 1, 2, 4 and 8 on a GPU, as far as the plan takes them, and 1 on a CPU.
        peers: measure the peers.
        only: names of `PEERS` to measure, all if empty.
        ablation: measure the paper's ablation, in the first shape; plans that it lacks are built.
        checkpoint, random_seed: the torch model's weights; neither for the seed of a bundle with random weights.
        repeat: samples a figure, at most.
        timeout: seconds that one contestant may take.
        seed: of the images; None for a new one.
        json, plot: files to write, or None.
        command: the command line, for the report.
    """

    bundle: Path
    others: Sequence[Path] = ()
    shapes: Sequence[Shape] | None = None
    batches: Sequence[int] | None = None
    peers: bool = True
    only: Sequence[str] = ()
    ablation: bool = False
    checkpoint: Path | None = None
    random_seed: int | None = None
    repeat: int = 20
    timeout: float = 900
    seed: int | None = None
    json: Path | None = None
    plot: Path | None = None
    command: Sequence[str] = ()


def bench(request: BenchRequest, report: Progress = lambda description, fraction: None) -> Report:
    """Measure, and write the files that were asked for. A contestant that fails says so in the report, the subject among them.

    Raises:
        UsageError: the request makes no sense.
        NoTarget: a plot was asked for, and matplotlib is not installed.
        CannotWrite, DiskError: a file cannot be written.
        And what reading a manifest raises.
    """
    if request.plot is not None:
        require_packages("a plot", ("matplotlib",))
    check_output(request.json, "--json", (".json",))
    check_output(request.plot, "--plot", PLOT_ENDINGS)
    manifest = read_manifest(request.bundle)
    with tempfile.TemporaryDirectory(prefix="smc-bench-") as folder:
        found = _Bench(request, manifest, Path(folder), report).run()
    if request.json is not None:
        text = msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n"
        with replacing(request.json) as file:
            file.write_bytes(text)
    if request.plot is not None:
        from smc.compiler.bench.plot import draw

        with replacing(request.plot) as file:
            draw(found, file)
    return found


@dataclass
class _Weights:
    """The torch model's weights. `same`: they are the bundle's own, so that its outputs can be compared with torch's."""

    checkpoint: Path | None = None
    seed: int | None = None
    same: bool = True
    why_not: str = ""


@dataclass
class _Bench:
    request: BenchRequest
    manifest: Manifest
    folder: Path
    report: Progress
    contestants: dict[str, Contestant] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.others = {path: read_manifest(path) for path in self.request.others}
        self._check_others()
        self.device: Device = "cpu" if self.manifest.target.sm is None else "cuda"
        self.weights = _find_weights(self.request, self.manifest)
        self.weights_file = self.folder / "weights.pt"
        self.references = self.folder / "references"
        self.references.mkdir()
        torch_needed = self.request.peers or self.request.ablation
        if torch_needed and not self.weights.why_not and (missing := missing_packages(("torch", "safetensors"))):
            self.weights.why_not = f"{', '.join(missing)} is not installed"
        self.compared = torch_needed and not self.weights.why_not
        self.work = Work(
            shapes=self._shapes(),
            batches=self._batches(),
            seed=secrets.randbelow(1 << 31) if self.request.seed is None else self.request.seed,
            repeat=self.request.repeat,
            references=str(self.references) if self.compared else None,
        )
        self.names = [name for name in PEERS if not self.request.only or name in self.request.only] if self.request.peers else []
        if unknown := sorted(set(self.request.only) - set(PEERS)):
            raise UsageError(f"unknown peer {', '.join(unknown)}, known: {', '.join(PEERS)}")
        if self.request.repeat < FEWEST:
            raise UsageError(f"{self.request.repeat} samples are too few for a median: at least {FEWEST}")

    def run(self) -> Report:
        started = datetime.datetime.now().astimezone()
        if self.compared:
            self._write_weights()
            # First, since it records what the others are compared with.
            self._torch(REFERENCE, "peer" if REFERENCE in self.names else "ablation", record=True)
        self._subject()
        for name in self.names:
            if name in self.contestants:
                continue
            if name == ONNXRUNTIME:
                self._onnxruntime()
            else:
                self._torch(name, "peer")
        rungs = self._ablation() if self.request.ablation else []
        wanted = dict.fromkeys((SUBJECT, *self.names, *(rung.contestant for rung in rungs)))
        return Report(
            schema=SCHEMA,
            created=started.isoformat(timespec="seconds"),
            command=list(self.request.command),
            machine=describe_machine(),
            versions=describe_versions(),
            bundle=self._describe_bundle(),
            settings=self._settings(),
            contestants=[self.contestants[name] for name in wanted if name in self.contestants],
            ablation=rungs,
        )

    def _measure(self, name: str, title: str, role: str, task: Task) -> Contestant:
        planned = 1 + len(self.names) + (3 if self.request.ablation else 0)
        self.report(f"measuring {title}", min(1.0, len(self.contestants) / planned))
        return self._add(name, title, role, run_task(task, self.folder, self.request.timeout))

    def _add(self, name: str, title: str, role: str, result: Result) -> Contestant:
        self.contestants[name] = Contestant(name=name, title=title, role=role, result=result)  # type: ignore[arg-type]
        return self.contestants[name]

    def _subject(self) -> None:
        self.report(f"loading {self.request.bundle.name} in fresh processes", 0.0)
        load, failure = {}, ""
        try:
            load = cold_starts(self.request.bundle, self.folder, self.request.timeout)
        except SmcError as error:
            failure = str(error)
        contestant = self._plan(SUBJECT, self.request.bundle, self.manifest, "subject", self.work)
        contestant.load = load
        contestant.result.failure = contestant.result.failure or failure

    def _plan(self, name: str, path: Path, manifest: Manifest, role: str, work: Work) -> Contestant:
        block_matching = self.request.ablation and not missing_packages(("torch",))
        work = work if self.weights.same else msgspec.structs.replace(work, references=None)
        title = f"{manifest.backend.name} plan, {manifest.precision}"
        return self._measure(name, title, role, PlanTask(bundle=str(path), work=work, block_matching=block_matching))

    def _write_weights(self) -> None:
        self.report("writing the torch model's weights", 0.0)
        weights, model = self.weights, self.manifest.model
        checkpoint = None if weights.checkpoint is None else str(weights.checkpoint)
        task = WeightsTask(model.config, checkpoint, model.checkpoint_sha256, weights.seed, str(self.weights_file))
        if failure := run_task(task, self.folder, self.request.timeout).failure:
            self.weights.why_not = failure

    def _torch(self, name: str, role: str, record: bool = False, work: Work | None = None) -> None:
        variant = VARIANTS[name]
        why_not = self.weights.why_not
        if variant.precision == "tf32" and self.device == "cpu":
            why_not = "CPUs have no TF32"
        if why_not:
            self.why_not[name] = why_not
            self._add(name, variant.title, role, Result(failure=f"not run: {why_not}"))
            return
        work = msgspec.structs.replace(work or self.work, record=record)
        task = TorchTask(self.manifest.model.config, str(self.weights_file), name, work, self.device)
        self._measure(name, variant.title, role, task)

    def _onnxruntime(self) -> None:
        title = f"ONNX Runtime, float32, {self.device}"
        candidates = {self.request.bundle: self.manifest, **self.others}
        bundle = next((path for path, manifest in candidates.items() if manifest.backend.name == "onnxruntime"), None)
        why_not = ""
        if bundle is None:
            why_not = "give a bundle of these weights for CPUs, --with BUNDLE"
        elif missing_packages(("onnxruntime",)):
            why_not = "onnxruntime is not installed"
        elif self.device == "cuda":
            import onnxruntime

            if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
                why_not = "this onnxruntime has no CUDA provider"
        if why_not or bundle is None:
            self._add(ONNXRUNTIME, title, "peer", Result(failure=f"not run: {why_not}"))
            return
        work = self.work if self.weights.same else msgspec.structs.replace(self.work, references=None)
        self._measure(ONNXRUNTIME, title, "peer", OnnxRuntimeTask(str(bundle), work, self.device))

    def _ablation(self) -> list[Rung]:
        work = msgspec.structs.replace(self.work, shapes=self.work.shapes[:1], batches=[1])
        plans = {precision: self._ablation_plan(precision, work) for precision in ("fp32", "hybrid")}
        ladder_steps = steps(plans["fp32"], plans["hybrid"])
        for step in ladder_steps:
            if step.contestant in VARIANTS and step.contestant not in self.contestants:
                self._torch(step.contestant, "ablation", work=work)
        return ladder(ladder_steps, self.contestants, work.shapes[0], self.why_not)

    def _ablation_plan(self, precision: Precision, work: Work) -> str:
        """The name of the contestant with the plan of this precision: the subject, one of the others, or one built now."""
        if self.manifest.precision == precision:
            return SUBJECT
        name = f"plan-{precision}"
        for path, manifest in self.others.items():
            if manifest.precision == precision and manifest.target == self.manifest.target:
                self._plan(name, path, manifest, "ablation", work)
                return name
        try:
            path = self._build(precision, work.shapes[0])
        except Exception as error:  # a build that fails, in whatever way, must not lose what was measured before it
            self.why_not[name] = str(error)
            return name
        self._plan(name, path, read_manifest(path), "ablation", work)
        return name

    def _build(self, precision: Precision, shape: Shape) -> Path:
        """A plan like the subject in another precision, in the user's cache. Raises SmcError."""
        if self.weights.why_not or not self.weights.same:
            raise UsageError(self.weights.why_not or "the weights that were given are not the bundle's")
        from smc.compiler.build import BuildRequest, build

        config = self.folder / "config.json"
        config.write_bytes(msgspec.json.encode(self.manifest.model.config))
        key = hashlib.sha256(f"{self.manifest.build_key} {precision} {shape}".encode()).hexdigest()[:16]
        return build(
            BuildRequest(
                gpu=self.manifest.target.gpu,
                out=cache_directory() / "bench" / key,
                checkpoint=self.weights.checkpoint,
                random_seed=self.weights.seed,
                model=str(config) if self.weights.checkpoint is None else None,
                shapes=[shape],
                backend=self.manifest.backend.name,
                precision=precision,
            ),
            self.report,
        ).path

    def _shapes(self) -> list[Shape]:
        known = self.manifest.input_shapes
        wanted = list(self.request.shapes or known[:1])
        for height, width in wanted:
            if (height, width) not in known:
                listed = ", ".join(f"{w}x{h}" for h, w in known)
                raise UsageError(f"the bundle was not built for {width}x{height}; it takes {listed}")
        return wanted

    def _batches(self) -> list[int]:
        if self.request.batches is not None:
            batches = sorted(set(self.request.batches))
            if not batches or batches[0] < 1 or batches[-1] > 64:
                raise UsageError("batches are 1 to 64 pairs")
            return batches
        if self.device == "cpu":
            return [1]
        return [batch for batch in (1, 2, 4, 8) if batch <= (self.manifest.max_batch or batch)]

    def _check_others(self) -> None:
        for path, manifest in self.others.items():
            own, other = self.manifest.model, manifest.model
            if (own.config, own.checkpoint_sha256, own.source) != (other.config, other.checkpoint_sha256, other.source):
                raise UsageError(f"{path} is of another model than {self.request.bundle}: {other.source}, not {own.source}")
            if missing := [shape for shape in self._shapes() if shape not in manifest.input_shapes]:
                raise UsageError(f"{path} was not built for {', '.join(f'{w}x{h}' for h, w in missing)}")

    def _describe_bundle(self) -> dict[str, object]:
        manifest = self.manifest
        return {
            "name": self.request.bundle.name,
            "build_key": manifest.build_key,
            "model": manifest.model.source,
            "parameters": manifest.model.parameters,
            "random_weights": manifest.random_weights,
            "target": manifest.target.gpu,
            "backend": f"{manifest.backend.name} {manifest.backend.version}",
            "precision": manifest.precision,
            "bytes": sum(info.size for info in manifest.plan_files.values()),
            "tolerance": manifest.verification.tolerance.relative,
        }

    def _settings(self) -> dict[str, object]:
        work = self.work
        return {
            "shapes": work.shapes,
            "batches": work.batches,
            "image_sizes": [image_size(shape) for shape in work.shapes],
            "seed": work.seed,
            "warm_up": WARM_UP,
            "repeat": work.repeat,
            "seconds_per_figure": PATIENCE,
            "fewest_samples": FEWEST,
            "runs_between_events": RUNS,
            "timeout": self.request.timeout,
            "reference": VARIANTS[REFERENCE].title if self.compared and not self.weights.why_not else None,
            "same_weights": self.weights.same,
        }


def _find_weights(request: BenchRequest, manifest: Manifest) -> _Weights:
    """The weights to give to the torch model. Raises UsageError where those asked for cannot be the bundle's."""
    seed_of_bundle = re.fullmatch(r"random weights, seed (\d+)", manifest.model.source)
    if not manifest.model.config:
        return _Weights(same=False, why_not="the bundle was built from ONNX files, of which there is no torch model")
    if request.checkpoint is not None and request.random_seed is not None:
        raise UsageError("a checkpoint and random weights at once")
    if request.checkpoint is not None:
        if manifest.random_weights:
            raise UsageError(f"the bundle has {manifest.model.source}, not a checkpoint's", fix="leave out --checkpoint")
        return _Weights(checkpoint=request.checkpoint)
    seed = request.random_seed if request.random_seed is not None else int(seed_of_bundle[1]) if seed_of_bundle else None
    if seed is None:
        return _Weights(same=False, why_not="give --checkpoint FILE, or --random-weights SEED for times without errors")
    return _Weights(seed=seed, same=seed_of_bundle is not None and int(seed_of_bundle[1]) == seed)
