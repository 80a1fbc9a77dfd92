"""Numerical parity: how far a plan's outputs lie from float32, on real images. Needs no torch."""

from __future__ import annotations

import contextlib
import importlib.resources
import io
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from smc.compiler.packages import require_packages
from smc.exported.bundle import Bundle
from smc.exported.engines import Engine, load_engine
from smc.exported.errors import AccuracyFailed, BackendFailed, BundleDamaged, BundleMismatch, InputMissing, NoTarget
from smc.exported.images import ImageSource, load_view
from smc.exported.manifest import OutputError, PairReport, Shape, Tolerance, Verification
from smc.exported.matching import fast_reciprocal_nn

Outputs = dict[str, NDArray[np.float32]]
"""Features and maps of one pair, without the batch axis."""

TOLERANCES = {
    # Two correct float32 implementations differ by about 2e-6 here; ten times that is a defect.
    "fp32": Tolerance(relative=2e-5, worst_pixel=1e-3, match_overlap=0.99),
    # float16 rounds by 2^-11, bfloat16 by 2^-8, and the network keeps that about as it is: measured were 4e-3 and 2.5e-2. Overlaps
    # are those of random weights, whose few matches hang on near ties: 0.88 and 0.6 of 50 to 200.
    "hybrid": Tolerance(relative=1e-2, worst_pixel=0.5, match_overlap=0.75),
    "fp16": Tolerance(relative=1e-2, worst_pixel=0.5, match_overlap=0.75),
    "bf16": Tolerance(relative=5e-2, worst_pixel=1.0, match_overlap=0.4),
}
"""What plans of each precision must reach."""

InputShape = tuple[int, int]
Report = Callable[[str], None]


@dataclass(frozen=True)
class SamplePair:
    """Two images as the network takes them: float32 (1, 3, H, W) in [-1, 1]."""

    view1: NDArray[np.float32]
    view2: NDArray[np.float32]

    @property
    def shapes(self) -> tuple[InputShape, InputShape]:
        (h1, w1), (h2, w2) = self.view1.shape[2:], self.view2.shape[2:]
        return (h1, w1), (h2, w2)

    @property
    def title(self) -> str:
        (h1, w1), (h2, w2) = self.shapes
        return f"{w1}x{h1} with {w2}x{h2}"


def sample_pairs(shapes: Sequence[InputShape], images: tuple[ImageSource, ImageSource] | None = None) -> Iterator[SamplePair]:
    """A real pair in the first shape, then pairs of two shapes that use every other one once.

    Args:
        shapes: (H, W) input shapes.
        images: two images to use instead of the shipped photographs.
    """
    pairs = [(shapes[0], shapes[0])]
    rest = list(shapes[1:])
    pairs += [(rest[i], rest[i + 1] if i + 1 < len(rest) else shapes[0]) for i in range(0, len(rest), 2)]
    with contextlib.ExitStack() as stack:
        if images is None:
            folder = importlib.resources.files("smc.examples")
            images = (
                stack.enter_context(importlib.resources.as_file(folder / "graf1.png")),
                stack.enter_context(importlib.resources.as_file(folder / "graf3.png")),
            )
        image1, image2 = images
        for shape1, shape2 in pairs:
            yield SamplePair(load_view(image1, [shape1]).pixels[None], load_view(image2, [shape2]).pixels[None])


def run_engine(engine: Engine, pair: SamplePair) -> Outputs:
    """Every stage's outputs for a pair."""
    features1, features2 = engine.encode(pair.view1), engine.encode(pair.view2)
    maps = engine.decode(features1, features2)
    return {name: np.asarray(value)[0] for name, value in {"features1": features1, "features2": features2, **maps}.items()}


def compare(reference: Outputs, plan: Outputs, shapes: tuple[InputShape, InputShape]) -> PairReport:
    """Errors of every output, and of the matches that come out of the descriptors. Raises BackendFailed where an output is missing."""
    if reference.keys() != plan.keys():
        raise BackendFailed(f"the outputs differ: {', '.join(sorted(reference.keys() ^ plan.keys()))} on one side only")
    wanted = match_set(reference)
    found = match_set(plan)
    union = len(wanted | found)
    return PairReport(
        shapes=(_shape(shapes[0]), _shape(shapes[1])),
        outputs={name: output_error(reference[name], plan[name]) for name in reference},
        matches_reference=len(wanted),
        matches_plan=len(found),
        match_overlap=len(wanted & found) / union if union else 1.0,
    )


def output_error(reference: NDArray[np.float32], plan: NDArray[np.float32]) -> OutputError:
    """Error of one (H, W) or (H, W, C) output; an output that is not finite has an infinite error, written as 1e30."""
    wanted, found = reference.astype(np.float64), plan.astype(np.float64)
    if wanted.ndim == 2:
        wanted, found = wanted[..., None], found[..., None]
    if wanted.shape != found.shape or not np.isfinite(found).all():
        return OutputError(relative=1e30, worst_pixel=1e30, worst_at=(0, 0))
    distance = np.linalg.norm(found - wanted, axis=-1)
    rms = max(float(np.sqrt(np.mean(np.sum(wanted**2, axis=-1)))), 1e-30)
    row, column = np.unravel_index(distance.argmax(), distance.shape)
    return OutputError(
        relative=float(np.sqrt(np.mean(distance**2)) / rms),
        worst_pixel=float(distance[row, column] / rms),
        worst_at=(int(row), int(column)),
    )


def match_set(outputs: Outputs) -> set[tuple[int, ...]]:
    xy1, xy2 = fast_reciprocal_nn(outputs["desc1"], outputs["desc2"])
    return set(map(tuple, np.concatenate([xy1, xy2], axis=1).tolist()))


def check(verification: Verification) -> None:
    """Raise AccuracyFailed, naming what failed where, unless every pair is within the tolerance."""
    tolerance = verification.tolerance
    failures = []
    for pair in verification.pairs:
        title = " with ".join(f"{shape.width}x{shape.height}" for shape in pair.shapes)
        for name, error in pair.outputs.items():
            if not error.relative <= tolerance.relative:
                failures.append(f"{name} at {title}: relative error {error.relative:.2g}, allowed {tolerance.relative:.2g}")
            elif not error.worst_pixel <= tolerance.worst_pixel:
                row, column = error.worst_at
                failures.append(
                    f"{name} at {title}: error {error.worst_pixel:.2g} at row {row}, column {column}, allowed {tolerance.worst_pixel:.2g}"
                )
        if not pair.match_overlap >= tolerance.match_overlap:
            failures.append(f"matches at {title}: overlap {pair.match_overlap:.3f}, at least {tolerance.match_overlap} wanted")
    if failures:
        raise AccuracyFailed("; ".join(failures[:5]) + (f"; and {len(failures) - 5} more" if len(failures) > 5 else ""))


def verify_bundle(bundle: Bundle, report: Report, images: tuple[ImageSource, ImageSource] | None = None) -> Verification:
    """Compare a bundle's plan with float32: with the outputs that the build recorded, or with its float32 graph.

    Where the plan cannot run on this machine, the graph that it was built from is run in its place; the report says so.

    Args:
        bundle: the opened bundle, with the files that are for verification only.
        report: told what is being done.
        images: two images to use instead of the shipped photographs.

    Returns:
        The report; pass it to `check` to gate on it.

    Raises:
        InputMissing: the bundle is a deployment, without the files for verification.
        NoTarget: other images were given, and there is neither a machine for the plan nor a float32 graph.
    """
    manifest = bundle.manifest
    if left_out := sorted(set(manifest.files) - set(bundle.files)):
        raise InputMissing(
            f"{bundle.path}: files for verification were left out of this copy ({', '.join(left_out)})",
            fix="verify the bundle where it was built, or copy all of it",
        )
    pairs = list(sample_pairs(manifest.input_shapes, images))
    engine: Engine | None = None
    subject: Literal["plan", "graph"] = "plan"
    if manifest.recorded is not None:
        report("loading the plan")
        try:
            engine = load_engine(bundle)
        except (NoTarget, BundleMismatch) as why:
            if images is not None:
                raise NoTarget(
                    f"the plan cannot run here ({why}), and float32 outputs are recorded for the shipped photographs only"
                ) from why
            report(f"the engine itself is not run: {why}")
            subject, engine = "graph", _graph_engine(bundle)

    if manifest.recorded is None:
        from smc.exported.engines.onnxruntime import OnnxRuntimeEngine

        reference = "float32 graph in ONNX Runtime, not optimised"
        report("loading the float32 graph")
        references = _run_all(OnnxRuntimeEngine(bundle.files, manifest.graphs, optimize=False), "float32 graph", pairs, report)
    elif images is None:
        reference = manifest.verification.reference
        references = load_outputs(bundle.files[manifest.recorded])
        if len(references) != len(pairs):
            raise BundleDamaged(
                f"outputs of {len(references)} pairs are recorded, {len(pairs)} were expected", fix="build the bundle again"
            )
    else:
        reference = f"the {manifest.precision} graph in ONNX Runtime, not optimised"
        references = _run_all(_graph_engine(bundle), f"{manifest.precision} graph", pairs, report)
    if engine is None:
        report("loading the plan")
        engine = load_engine(bundle)
    return compare_engine(engine, subject, reference, pairs, references, manifest.verification.tolerance, report)


def _run_all(engine: Engine, title: str, pairs: Sequence[SamplePair], report: Report) -> list[Outputs]:
    references = []
    for pair in pairs:
        report(f"{title}, {pair.title}")
        references.append(run_engine(engine, pair))
    return references


def _graph_engine(bundle: Bundle) -> Engine:
    """The typed graphs of a bundle, in ONNX Runtime. Needs the packages of the extra `compile`, though not torch."""
    require_packages("verifying a plan without its GPU", ("onnx", "onnx_graphsurgeon"))
    from smc.compiler.graph_engine import GraphEngine

    return GraphEngine.from_files(bundle.files)


def compare_engine(
    engine: Engine,
    subject: Literal["plan", "graph"],
    reference: str,
    pairs: Sequence[SamplePair],
    references: Sequence[Outputs],
    tolerance: Tolerance,
    report: Report,
) -> Verification:
    """Run a plan, or its graph, on pairs and compare it with given outputs, whose origin `reference` names."""
    reports = []
    for pair, wanted in zip(pairs, references, strict=True):
        report(f"{subject}, {pair.title}")
        reports.append(compare(wanted, run_engine(engine, pair), pair.shapes))
    return Verification(subject=subject, reference=reference, tolerance=tolerance, pairs=reports)


def save_outputs(file: Path, outputs: Sequence[Outputs]) -> None:
    """Record the outputs of pairs, for `load_outputs`. Raises OSError."""
    arrays: dict[str, Any] = {f"{i}.{name}": value for i, pair in enumerate(outputs) for name, value in pair.items()}
    np.savez(file, **arrays)


def load_outputs(data: memoryview) -> list[Outputs]:
    """What `save_outputs` recorded. Raises BundleDamaged where it is something else."""
    pairs: dict[int, Outputs] = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for key in arrays.files:
                number, _, name = key.partition(".")
                pairs.setdefault(int(number), {})[name] = arrays[key]
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BundleDamaged(f"the recorded outputs cannot be read ({error})", fix="build the bundle again") from error
    return [pairs[number] for number in sorted(pairs)]


def _shape(shape: InputShape) -> Shape:
    return Shape(height=shape[0], width=shape[1])
