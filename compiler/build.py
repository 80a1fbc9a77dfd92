"""From a checkpoint to a bundle."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smc.compiler import verify
from smc.compiler.backends import Backend, choose_backend
from smc.compiler.bundle_writer import Staging, prepare_target, sweep_stale, target_lock
from smc.compiler.targets import Target, find_target
from smc.exported.bundle import open_bundle, read_files
from smc.exported.engines import engine_for
from smc.exported.errors import InputMissing, NoTarget, SmcError, UsageError
from smc.exported.manifest import FORMAT_VERSION, BackendInfo, Manifest, ModelInfo, Shape, TargetInfo
from smc.version import VERSION

if TYPE_CHECKING:
    from smc.compiler.checkpoint import Weights
    from smc.compiler.model import Mast3r

TRAINED_SHAPES = tuple(
    shape for long, short in ((512, 384), (512, 336), (512, 288), (512, 256), (512, 160)) for shape in ((short, long), (long, short))
)
"""The (H, W) input shapes that the public checkpoint was trained with, landscape and portrait."""

Report = Callable[[str, float], None]
"""Told what the build is doing and which fraction of it is done."""


@dataclass(frozen=True, kw_only=True)
class BuildRequest:
    """What to build.

    Attributes:
        gpu: a name of `targets.TARGETS`.
        out: the bundle's directory; an older bundle there is replaced.
        checkpoint: the weights to compile; or
        random_seed: the seed of random weights, with `model` as their configuration.
        model: a preset's name or the path of a `config.json`, None for "large"; only with `random_seed`.
        shapes: (H, W) input shapes, each a multiple of 16 and at least 48; pairs may mix them.
        force: build even if the bundle is there already.
        wait: wait for another build of the same target to end, rather than give up.
    """

    gpu: str
    out: Path
    checkpoint: Path | None = None
    random_seed: int | None = None
    model: str | None = None
    shapes: Sequence[tuple[int, int]] = TRAINED_SHAPES
    force: bool = False
    wait: bool = True


@dataclass(frozen=True)
class BuildResult:
    """`reused`: an up-to-date bundle was found, nothing was built. `seconds`: time by phase."""

    path: Path
    manifest: Manifest
    reused: bool
    seconds: dict[str, float] = field(default_factory=dict)


def build(request: BuildRequest, report: Report = lambda description, fraction: None) -> BuildResult:
    """Build a bundle, or find that it is there already.

    Raises:
        UsageError: the request makes no sense.
        NoTarget: nothing here can build for that machine.
        InputMissing, BadCheckpoint: the weights cannot be used.
        CannotWrite, DiskError, Busy: the bundle cannot be written.
        BackendFailed: the exporter or the backend failed.
        AccuracyFailed: the plan's outputs are too far from float32; nothing is kept.
    """
    _check_request(request)
    backend = choose_backend(target := find_target(request.gpu))
    _require_compile_packages()
    _check_inputs(request)
    out = prepare_target(request.out)
    clock = _Clock(report)
    with target_lock(out, request.wait, on_wait=lambda: clock.phase("waiting", f"waiting for another build of {out.name}", 0)):
        sweep_stale(out)
        clock.phase("weights", "reading weights", 0.01)
        weights = _read_weights(request)
        key = _build_key(request, weights, target, backend)
        if not request.force and (manifest := _up_to_date(out, key)):
            return BuildResult(out, manifest, reused=True)
        return _build(request, weights, target, backend, key, out, clock)


def _build(request: BuildRequest, weights: Weights, target: Target, backend: Backend, key: str, out: Path, clock: _Clock) -> BuildResult:
    import torch

    from smc.compiler.export import Graphs, export_decoder, export_encoder

    with Staging(out) as staging:
        model = weights.build_model()
        parameters = sum(p.numel() for p in model.parameters())
        model_info = ModelInfo(
            source=weights.source.encode(errors="replace").decode(),  # a file's name need not be Unicode, a manifest is
            checkpoint_sha256=weights.sha256,
            parameters=parameters,
            config=weights.config.to_json(),
        )
        clock.phase("export", "exporting the encoder", 0.05)
        encoder = export_encoder(model)
        clock.phase("export", "exporting the decoder", 0.2)
        decoder = export_decoder(model)
        clock.phase("write", "writing the plan", 0.5)
        stages = backend.write_plan(Graphs(encoder, decoder), staging)
        files = staging.seal()
        del encoder, decoder

        pairs = list(verify.sample_pairs(request.shapes))
        references = []
        for i, pair in enumerate(pairs):
            clock.phase("verify", f"float32 reference, {pair.title}", 0.55 + 0.2 * i / len(pairs))
            references.append(_run_model(model, pair))
        del model, weights  # the plan is loaded next: the two are never in memory together

        clock.phase("verify", "loading the plan", 0.75)
        engine = engine_for(backend.NAME, read_files(staging.path, files), stages)
        done = iter(range(len(pairs)))
        verification = verify.compare_engine(
            engine,
            f"torch {torch.__version__} in float32",
            pairs,
            references,
            backend.TOLERANCE,
            lambda what: clock.phase("verify", what, 0.8 + 0.2 * next(done) / len(pairs)),
        )
        verify.check(verification)

        manifest = Manifest(
            format=FORMAT_VERSION,
            tool_version=VERSION,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            build_key=key,
            model=model_info,
            target=TargetInfo(gpu=target.name, sm=target.sm),
            backend=BackendInfo(name=backend.NAME, version=backend.version()),
            precision="fp32",
            shapes=[Shape(height=height, width=width) for height, width in request.shapes],
            stages=stages,
            files=files,
            verification=verification,
        )
        staging.commit(manifest)
    return BuildResult(out, manifest, reused=False, seconds=clock.stop())


def _check_request(request: BuildRequest) -> None:
    if (request.checkpoint is None) == (request.random_seed is None):
        raise UsageError("one of a checkpoint and random weights is needed", fix="give --checkpoint FILE or --random-weights SEED")
    if request.checkpoint is not None and request.model is not None:
        raise UsageError("a checkpoint says itself which model it is", fix="leave out --model")
    if request.random_seed is not None and request.random_seed < 0:
        raise UsageError(f"the seed {request.random_seed} is negative")
    if not request.shapes or len(set(request.shapes)) != len(request.shapes):
        raise UsageError("at least one input shape is needed, and none twice")
    for height, width in request.shapes:
        if height % 16 or width % 16 or min(height, width) < 48 or max(height, width) > 8192:
            raise UsageError(f"input shape {width}x{height}: both sides must be multiples of 16, from 48 to 8192")


def _check_inputs(request: BuildRequest) -> None:
    """Refuse what is absent before anything is made on disk."""
    from smc.compiler.config import resolve_config

    if request.checkpoint is None:
        resolve_config(request.model or "large")
    elif not os.path.exists(request.checkpoint):
        raise InputMissing(
            f"{request.checkpoint}: no such checkpoint", fix="give a .pth file, or the folder of model.safetensors and config.json"
        )


def _require_compile_packages() -> None:
    missing = []
    for name in ("torch", "onnx", "onnxscript", "safetensors"):
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise NoTarget(f"building needs {', '.join(missing)}, which is not installed", fix="pip install 'speedy-mast3r[compile]'")


def _read_weights(request: BuildRequest) -> Weights:
    from smc.compiler.checkpoint import load_checkpoint, random_weights
    from smc.compiler.config import resolve_config

    if request.checkpoint is not None:
        return load_checkpoint(request.checkpoint)
    assert request.random_seed is not None
    return random_weights(resolve_config(request.model or "large"), request.random_seed)


def _build_key(request: BuildRequest, weights: Weights, target: Target, backend: Backend) -> str:
    """A hash of everything that the bundle depends on."""
    import torch

    parts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "tool": VERSION,
        "torch": torch.__version__,
        "exporter": [metadata.version(name) for name in ("onnxscript", "onnx-ir", "onnx")],
        "backend": [backend.NAME, backend.version()],
        "target": target.name,
        "config": weights.config.to_json(),
        "weights": weights.sha256 or weights.source,
        "shapes": [list(shape) for shape in request.shapes],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _up_to_date(out: Path, key: str) -> Manifest | None:
    """The manifest of a whole bundle with this key at `out`, if there is one."""
    try:
        bundle = open_bundle(out)
    except SmcError:
        return None
    return bundle.manifest if bundle.manifest.build_key == key else None


def _run_model(model: Mast3r, pair: verify.SamplePair) -> verify.Outputs:
    import torch

    with torch.inference_mode():
        features1, features2 = model.encode(torch.from_numpy(pair.view1)), model.encode(torch.from_numpy(pair.view2))
        maps = model.decode(features1, features2)
    return {
        name: np.ascontiguousarray(value[0].numpy()) for name, value in {"features1": features1, "features2": features2, **maps}.items()
    }


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

    def stop(self) -> dict[str, float]:
        now = time.perf_counter()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        self._since = now
        return dict(self._seconds)
