"""What the paper's techniques, added one by one, do to the accuracy of poses and matches (Speedy MASt3R, section 4).

    python benchmarks/accuracy.py CHECKPOINT --bundle FP32 --bundle HYBRID --bundle FP16 --photographs DIR/held-out \\
        --work FOLDER --out benchmarks/results/accuracy

CHECKPOINT is a folder that `smc build --checkpoint` takes, and the bundles are built from it with --precision fp32, hybrid and fp16,
for the machine that this runs on. It renders held-out scenes on the GPU, or on the CPU where there is none (half a minute a pair),
evaluates every rung and SIFT on each of them and on the shipped photographs, and writes a table to OUT.md and every pair's results to
OUT.json. Rungs that cannot run here are named, with the reason. An interrupted run goes on from what is in --work.

A pair is estimated several times from the same matches, with other samples (--draws), and a figure is the mean over these draws: what is
left of the estimator's luck is shown by float32's own draws against as many others of the same matches.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from smc.compiler.bench.ablation import Step, steps
from smc.compiler.bench.machine import describe_machine, describe_versions
from smc.compiler.bench.variants import REFERENCE, VARIANTS
from smc.compiler.evaluation.data import open_data
from smc.compiler.evaluation.matchers import BundleMatcher, PairMatcher, SiftMatcher
from smc.compiler.evaluation.metrics import columns_of
from smc.compiler.evaluation.pairs import PairSet
from smc.compiler.evaluation.records import Config, PairResult
from smc.compiler.evaluation.rendered import render, rendered
from smc.compiler.evaluation.results import read_results
from smc.compiler.evaluation.run import EvalRequest, evaluate
from smc.compiler.evaluation.summary import Difference, Summary, paired_differences, summarise
from smc.exported.bundle import read_manifest
from smc.exported.errors import SmcError, UsageError
from smc.exported.matcher import load

STEPS = (*steps("fp32", "hybrid"), Step("all float16, for contrast", "fp16", "own"), Step("SIFT", "sift", "own"))
"""A contestant is a variant of the torch model, the precision of a bundle, or SIFT."""

ITERATIONS = 10_000
"""Samples of an estimate. poselib's own limit is ten times as high: then the pairs of which no pose can be estimated take nearly all of
the time, and more draws of fewer samples say more."""

POSE_THRESHOLD = 2.0
"""Pixels. Matches are whole pixels in both images, and a small network's are off by another one or two: at half of this, which of several
poses wins is luck more often (tried on made matches: a pair's share of AUC@10° then varies two to ten times as much between draws)."""

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A rung on some of the pairs, in a process of its own.

    Attributes:
        step: the rung.
        config, weights: of the torch model.
        bundle: with the rung's precision, if it is a bundle's.
        device: "cuda" or "cpu".
        shape: (H, W) of the network's input.
        pairs: the folder of rendered pairs.
        part, parts: which of them.
        data: further data sets, which the first part evaluates.
        draws, pose_threshold: of the estimator.
        out: the file of results.
    """

    step: Step
    config: Mapping[str, Any]
    weights: Path
    bundle: Path | None
    device: str
    shape: tuple[int, int]
    pairs: Path
    part: int
    parts: int
    data: tuple[str, ...]
    draws: int
    pose_threshold: float
    out: Path


@dataclass
class Rung:
    """A step with its results: the config of its evaluation, lines by data set, or why there are none."""

    step: Step
    config: Config | None = None
    rows: dict[str, list[PairResult]] = field(default_factory=dict)
    failure: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", dest="bundles", action="append", default=[], type=Path, help="built from the checkpoint; several times")
    parser.add_argument("--photographs", type=Path, help="held-out photographs for textures")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--pose-threshold", type=float, default=POSE_THRESHOLD, help="largest epipolar error of an inlier, pixels")
    parser.add_argument("--data", action="append", default=[f"homography:{EXAMPLES}"], help="more pairs, as smc eval names them")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="of rendering and of the torch model")
    parser.add_argument("--work", type=Path, required=True, help="a folder for pairs and results, to go on from")
    parser.add_argument("--out", type=Path, required=True, help="the files to write, without .md and .json")
    options = parser.parse_args()
    try:
        run(options)
    except SmcError as error:
        sys.exit(f"{error}\nfix: {error.fix}" if error.fix else str(error))


def run(options: argparse.Namespace) -> None:
    import torch

    from smc.compiler.checkpoint import load_checkpoint

    # A core runs a process: threads of its own would only get into the others' way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(options.checkpoint)
    bundles = find_bundles(options.bundles, checkpoint.sha256)
    options.work.mkdir(parents=True, exist_ok=True)
    weights, pairs = options.work / "weights.pt", options.work / f"pairs-{options.pairs}"
    torch.save(checkpoint.tensors, weights)
    isolated(render, options.pairs, options.photographs, device, pairs, say_rendered)

    cores = len(os.sched_getaffinity(0))
    parts = max(1, min(options.pairs // 25, 2 * cores // len(STEPS)))
    rungs = [Rung(step, failure=why_not(step, bundles, device)) for step in STEPS]
    jobs = [
        (
            rung,
            Job(
                step=rung.step,
                config=checkpoint.config.to_json(),
                weights=weights,
                bundle=bundles.get(rung.step.contestant),
                device=device,
                shape=next((manifest.input_shapes[0] for manifest in map(read_manifest, bundles.values())), (384, 512)),
                pairs=pairs,
                part=part,
                parts=parts,
                data=tuple(options.data) if part == 0 else (),
                draws=options.draws * (2 if rung.step.contestant == REFERENCE else 1),
                pose_threshold=options.pose_threshold,
                out=options.work / f"rung{number}-{part + 1}of{parts}.jsonl",
            ),
        )
        for number, rung in enumerate(rungs)
        for part in range(0 if rung.failure else parts)
    ]
    with ThreadPoolExecutor(cores) as pool:
        for rung, job, future in [(rung, job, pool.submit(isolated, run_job, job)) for rung, job in jobs]:
            try:
                future.result()
                add_results(rung, job.out)
            except Exception as error:  # whatever a rung's library raises is that rung's result
                rung.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
        done = [rung for rung in rungs if not rung.failure]
        reference = next((rung for rung in done if rung.step.contestant == REFERENCE), None)
        differences = compare_all(reference, done, options.draws, pool) if reference is not None else {}
    write(options, rungs, differences, {"source": checkpoint.source, "sha256": checkpoint.sha256, "device": device})


def isolated(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call in a new process: one that crashes takes nothing else with it, and torch's switches are its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def say_rendered(done: int) -> None:
    if done % 50 == 0:
        print(f"{done} pairs rendered", file=sys.stderr, flush=True)


def find_bundles(paths: Sequence[Path], sha256: str | None) -> dict[str, Path]:
    """Bundles by their precision. Raises UsageError where one is of other weights, or two are of one precision or of several shapes."""
    found: dict[str, Path] = {}
    shapes = set()
    for path in paths:
        manifest = read_manifest(path)
        if manifest.model.checkpoint_sha256 != sha256:
            raise UsageError(f"{path} was not built from this checkpoint", fix="smc build --checkpoint CHECKPOINT")
        if manifest.precision in found:
            raise UsageError(f"{path} and {found[manifest.precision]} are both {manifest.precision}")
        found[manifest.precision] = path
        shapes.add(tuple(manifest.input_shapes))
    if len(shapes) > 1 or any(len(each) > 1 for each in shapes):
        raise UsageError("the bundles are of several input shapes", fix="build each with the same one --shape")
    return found


def why_not(step: Step, bundles: Mapping[str, Path], device: str) -> str:
    """Why a rung cannot be tried, "" if it can."""
    if step.contestant in VARIANTS:
        return "not run: CPUs have no TF32" if device == "cpu" and VARIANTS[step.contestant].precision == "tf32" else ""
    return "" if step.contestant in {"sift", *bundles} else f"not run: no {step.contestant} bundle was given"


def run_job(job: Job) -> None:
    title = f"{job.step.technique}, part {job.part + 1} of {job.parts}"
    said = [0]

    def say(description: str, fraction: float) -> None:
        if 4 * fraction >= said[0]:
            said[0] += 1
            print(f"{title}: {100 * fraction:.0f} %", file=sys.stderr, flush=True)

    try:
        data: list[PairSet] = [rendered(job.pairs, None).part(job.part, job.parts), *map(open_data, job.data)]
        request = EvalRequest(
            matcher=matcher_of(job),
            data=data,
            out=job.out,
            draws=job.draws,
            iterations=ITERATIONS,
            pose_threshold=job.pose_threshold,
        )
        evaluate(request, say)
    except BaseException:
        traceback.print_exc()
        raise


def matcher_of(job: Job) -> PairMatcher:
    if job.step.contestant == "sift":
        return SiftMatcher()
    from smc.compiler.config import ModelConfig
    from smc.compiler.evaluation.original import BlockMatchedBundle, OriginalMatcher

    if job.bundle is None:
        config = ModelConfig.from_fields(dict(job.config))
        return OriginalMatcher(config, job.weights, job.step.contestant, job.device, job.shape)
    matcher = load(job.bundle, threads=1)
    return BundleMatcher(matcher) if job.step.matching == "own" else BlockMatchedBundle(matcher, job.device)


def add_results(rung: Rung, path: Path) -> None:
    header, rows = read_results(path)
    rung.config = rung.config or header.config  # the first part's, which names every data set
    for (kind, _), row in rows.items():
        rung.rows.setdefault(kind, []).append(row)


def cut(rows: Sequence[PairResult], draws: slice = slice(None)) -> list[PairResult]:
    """The lines by name, with some of their draws."""
    return [msgspec.structs.replace(row, estimates=row.estimates[draws]) for row in sorted(rows, key=lambda row: row.name)]


Differences = dict[tuple[str, str], dict[str, Difference]]
"""By data set and technique."""

AGAIN = "strict float32, other draws"


def compare_all(reference: Rung, rungs: Sequence[Rung], draws: int, pool: ThreadPoolExecutor) -> Differences:
    """How each rung differs from the reference, and how that differs from itself."""
    assert reference.config is not None
    first, others = slice(draws), slice(draws, None)
    running: dict[tuple[str, str], Future[dict[str, Difference]]] = {}
    for data in reference.config.data:
        base = columns_of(cut(reference.rows[data.kind], first))
        found = {rung.step.technique: cut(rung.rows[data.kind], first) for rung in rungs if rung is not reference}
        for technique, rows in {AGAIN: cut(reference.rows[data.kind], others), **found}.items():
            running[data.kind, technique] = pool.submit(isolated, paired_differences, data.task, base, columns_of(rows))
    return {key: future.result() for key, future in running.items()}


def write(options: argparse.Namespace, rungs: Sequence[Rung], differences: Differences, model: Mapping[str, Any]) -> None:
    done = [rung for rung in rungs if rung.config is not None and not rung.failure]
    summaries = {
        rung.step.technique: {
            summary.kind: msgspec.structs.replace(summary, seconds={})  # many processes at once: times mean nothing
            for summary in summarise(rung.config, [row for rows in rung.rows.values() for row in cut(rows, slice(options.draws))])
        }
        for rung in done
        if rung.config is not None
    }
    record = {
        "created": datetime.date.today().isoformat(),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "model": model,
        "config": msgspec.to_builtins(done[0].config) | {"draws": options.draws} if done else {},
        "pairs": {kind: [row.name for row in cut(rows)] for rung in done[:1] for kind, rows in rung.rows.items()},
        "rungs": [
            {
                "technique": rung.step.technique,
                "contestant": rung.step.contestant,
                "matching": rung.step.matching,
                "failure": rung.failure,
                "matcher": rung.config.matcher if rung.config else None,
                "summaries": msgspec.to_builtins(summaries.get(rung.step.technique, {})),
                "differences": differences_of(differences, rung.step.technique),
                "results": {} if rung.failure else {kind: compact(cut(rows)) for kind, rows in rung.rows.items()},
            }
            for rung in rungs
        ],
        AGAIN: differences_of(differences, AGAIN),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.with_suffix(".json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    text = markdown(options, record, rungs, summaries, differences)
    options.out.with_suffix(".md").write_text(text)
    print(text)


def differences_of(differences: Differences, technique: str) -> dict[str, Any]:
    return {kind: msgspec.to_builtins(found) for (kind, name), found in differences.items() if name == technique}


def compact(rows: Sequence[PairResult]) -> dict[str, Any]:
    """Columns of a data set's lines, errors (pairs, draws) with null where nothing was estimated; four digits."""
    return {
        "matches": [row.matches for row in rows],
        "errors": [[None if found.error is None else float(f"{found.error:.4g}") for found in row.estimates] for row in rows],
        **{name: [float(f"{row.precision[name]:.4g}") for row in rows] for name in rows[0].precision},
    }


POSE_FIGURES = ("AUC@5°", "AUC@10°", "AUC@20°", "mean AUC", "precision@3 px", "matches")
HOMOGRAPHY_FIGURES = ("AUC@3 px", "AUC@5 px", "AUC@10 px", "precision@3 px", "matches")


def markdown(
    options: argparse.Namespace,
    record: Mapping[str, Any],
    rungs: Sequence[Rung],
    summaries: Mapping[str, Mapping[str, Summary]],
    differences: Differences,
) -> str:
    machine, versions, config = record["machine"], record["versions"], record["config"]
    lines = [
        "# Accuracy, technique by technique",
        "",
        f"{record['created']}, {machine.get('gpu', machine['processor'])}, torch {versions.get('torch')}, "
        f"{config.get('estimator', 'no estimator')}; model {record['model']['source']}, sha256 {str(record['model']['sha256'])[:16]}.",
        "",
        f"Fractions are in percent. A pair is estimated {options.draws} times with other samples of the same matches, and figures are "
        f"means over these draws (poselib, at most {ITERATIONS:,} samples, inliers of a pose within {options.pose_threshold:g} px, seeds "
        f"{config.get('seed', 0)} and up). docs/evaluation.md says what each figure is; mean AUC is what the paper calls mAA.",
        "",
    ]
    for data in config.get("data", []):
        kind, count = data["kind"], data["pairs"]
        if kind in record["pairs"]:
            count = len(record["pairs"][kind])
        names = POSE_FIGURES if data["task"] == "pose" else HOMOGRAPHY_FIGURES
        title = f"{kind}: {count} pair{'s' if count != 1 else ''}"
        lines += [f"## {title}", "", *([data["origin"] + ".", ""] if data["origin"] else [])]
        unit = "°" if data["task"] == "pose" else " px"
        rows = []
        for rung in rungs:
            summary = summaries.get(rung.step.technique, {}).get(kind)
            if summary is None:
                rows.append([rung.step.technique, rung.failure])
                continue
            median = "none" if summary.median_error is None else f"{summary.median_error:.2f}{unit}"
            rows.append([rung.step.technique, *(value_of(name, summary.figures[name]) for name in names), median, str(summary.failed)])
        lines += table(["", *names, "median error", "without an estimate"], rows)
        found = {technique: values for (of, technique), values in differences.items() if of == kind}
        if found and count > 1:
            lines += ["", "Difference from strict float32, in points, with 95 % intervals by a paired bootstrap over pairs:", ""]
            lines += table(
                ["", *names], [[technique, *(difference(name, values[name]) for name in names)] for technique, values in found.items()]
            )
        lines.append("")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of Markdown; a short row is filled up."""
    filled = [[*row, *[""] * (len(header) - len(row))] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] + ["---:"] * (len(header) - 1), *filled)]


def value_of(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "matches" else f"{100 * value:.2f}"


def difference(name: str, found: Difference) -> str:
    factor, digits = (1, 1) if name == "matches" else (100, 2)
    middle, low, high = (f"{factor * value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
