"""What the paper's techniques, added one by one, do to the accuracy of poses and matches (Speedy MASt3R, section 4).

    python benchmarks/accuracy.py CHECKPOINT --bundle FP32 --bundle HYBRID --bundle FP16 --photographs DIR/held-out \\
        --work FOLDER --out benchmarks/results/accuracy

CHECKPOINT is a folder that `smc build --checkpoint` takes, and the bundles are built from it with --precision fp32, hybrid and fp16,
for the machine that this runs on. It renders held-out scenes on the GPU, or on the CPU where there is none (half a minute a pair),
evaluates every rung and SIFT on each of them and on the shipped photographs, and writes tables to OUT.md and every pair's results to
OUT.json. Rungs that cannot run here are named, with the reason; where strict float32 is among them, the exit status is 1. An interrupted
run goes on from what is in --work.

A pair is estimated several times from the same matches, with other samples (--draws), and a figure is the mean over these draws: what is
left of the estimator's luck is shown by float32's own draws against as many others of the same matches.
"""

from __future__ import annotations

import argparse
import datetime
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from smc.compiler.bench.ablation import Step
from smc.compiler.bench.machine import describe_machine, describe_versions
from smc.compiler.bench.variants import VARIANTS
from smc.compiler.evaluation import estimate
from smc.compiler.evaluation.data import check_kinds, open_data
from smc.compiler.evaluation.ladder import STEPS, Report, Rung, comparisons
from smc.compiler.evaluation.matchers import BundleMatcher, PairMatcher, SiftMatcher
from smc.compiler.evaluation.pairs import PairSet
from smc.compiler.evaluation.rendered import render, rendered
from smc.compiler.evaluation.run import EvalRequest, evaluate
from smc.compiler.evaluation.summary import paired_differences
from smc.compiler.output_files import check_output
from smc.exported.bundle import read_manifest
from smc.exported.errors import CannotWrite, SmcError, UsageError
from smc.exported.matcher import load

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--bundle", dest="bundles", action="append", default=[], type=Path, help="built from the checkpoint; several times")
    parser.add_argument("--photographs", type=Path, help="held-out photographs for textures")
    parser.add_argument("--pairs", type=positive, default=500)
    parser.add_argument("--draws", type=positive, default=5)
    parser.add_argument("--pose-threshold", type=float, default=POSE_THRESHOLD, help="largest epipolar error of an inlier, pixels")
    parser.add_argument(
        "--data",
        action="append",
        help="more pairs, as smc eval names them; several times, each of another kind and none of kind rendered [default: the shipped "
        "photographs, homography:examples]",
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="of rendering and of the torch model")
    parser.add_argument("--work", type=Path, required=True, help="a folder for pairs and results, to go on from")
    parser.add_argument("--out", type=Path, required=True, help="the files to write, without .md and .json")
    options = parser.parse_args()
    try:
        run(options)
    except SmcError as error:
        sys.exit(f"{error}\nfix: {error.fix}" if error.fix else str(error))


def positive(text: str) -> int:
    """A number of 1 and more, as argparse wants it read."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a number from 1 on was expected")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Raises SystemExit where the reference has no results: nothing can then be said of the others."""
    import torch

    from smc.compiler.checkpoint import load_checkpoint

    # What can be known to be wrong is said before half an hour of work.
    estimate.version()
    named = options.data or [f"homography:{EXAMPLES}"]
    check_kinds(["rendered", *(open_data(text).kind for text in named)])
    # A core runs a process: threads of its own would only get into the others' way.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    checkpoint = load_checkpoint(options.checkpoint)
    bundles = find_bundles(options.bundles, checkpoint.sha256)
    for folder in (options.work, options.out.parent):
        make_folder(folder)
    for ending in (".md", ".json"):
        check_output(options.out.with_name(options.out.name + ending), "--out", (ending,))
    weights, pairs = options.work / "weights.pt", options.work / f"pairs-{options.pairs}"
    torch.save(checkpoint.tensors, weights)
    isolated(render, options.pairs, options.photographs, device, pairs, say_rendered)

    cores = len(os.sched_getaffinity(0))
    parts = max(1, min(options.pairs // 25, 2 * cores // len(STEPS)))
    rungs = [Rung(step, failure=why_not(step, bundles, device)) for step in STEPS]
    settings = f"{options.pairs}-pairs-{options.draws}-draws-{options.pose_threshold:g}px"
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
                data=tuple(named) if part == 0 else (),
                draws=options.draws * (2 if rung.is_reference else 1),
                pose_threshold=options.pose_threshold,
                out=options.work / f"rung{number}-{settings}-{part + 1}of{parts}.jsonl",
            ),
        )
        for number, rung in enumerate(rungs)
        for part in range(0 if rung.failure else parts)
    ]
    with ThreadPoolExecutor(cores) as pool:
        for rung, job, future in [(rung, job, pool.submit(isolated, run_job, job)) for rung, job in jobs]:
            try:
                future.result()
                rung.add(job.out)
            except Exception as error:  # whatever a rung's library raises is that rung's result
                rung.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
        comparing = {
            key: pool.submit(isolated, paired_differences, task, reference, other)
            for key, (task, reference, other) in comparisons(rungs, options.draws).items()
        }
        differences = {key: future.result() for key, future in comparing.items()}
    report = Report(
        rungs=rungs,
        draws=options.draws,
        differences=differences,
        model={"source": checkpoint.source, "sha256": checkpoint.sha256, "device": device},
        created=datetime.date.today().isoformat(),
        command=["python", *sys.argv],
        machine=describe_machine(),
        versions=describe_versions(),
    )
    report.write(options.out)
    print(report.markdown())
    if failed := next((rung for rung in rungs if rung.is_reference and rung.failure), None):
        sys.exit(f"{failed.step.technique}, which all else is compared with: {failed.failure}")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{folder}: {error.strerror}") from error


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


if __name__ == "__main__":
    main()
