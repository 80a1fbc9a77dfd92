"""The command line: parses, calls, prints. Results go to stdout, progress and errors to stderr."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from smc.exported.errors import DiskError, OutOfMemory, SmcError
from smc.version import VERSION


class PlainConsole(Console):
    """Prints text as it is: paths may hold what rich takes for markup. Colours are given as styles."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, soft_wrap=True, **options)

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))  # left to `_run`; rich would exit with 1


OUT = PlainConsole()
ERR = PlainConsole(stderr=True)


class ShapeType(click.ParamType):  # type: ignore[type-arg]  # generic in the newest click only
    """`512x384`: width by height, as image sizes are written. Gives (H, W)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        width, x, height = str(value).lower().partition("x")
        if not (x and width.isdecimal() and height.isdecimal()):
            self.fail(f"{value!r} is not WIDTHxHEIGHT, such as 512x384", param, ctx)
        return int(height), int(width)


class CountsType(click.ParamType):  # type: ignore[type-arg]
    """`1,2,4`: whole numbers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        parts = str(value).split(",")
        if not all(part.isdecimal() for part in parts):
            self.fail(f"{value!r} is not whole numbers with commas between, such as 1,2,4", param, ctx)
        return tuple(map(int, parts))


class FiniteType(click.FloatRange):
    """A number in a range; NaN, which is in none, and infinity are refused too."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


POSITIVE = FiniteType(0, min_open=True)
PATH = click.Path(path_type=Path, readable=False)  # what cannot be read is not a wrong usage: whoever reads it says so


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="smc")
def cli() -> None:
    """Compile MASt3R ahead of time, and match images with what comes out."""


@cli.command()
@click.option("--gpu", required=True, help="Machine to build for; `smc targets` lists them.")
@click.option("--checkpoint", type=PATH, help="A .pth file, or a folder of config.json and model.safetensors.")
@click.option(
    "--random-weights", "random_seed", type=int, metavar="SEED", help="Random weights instead of a checkpoint: for trying the tool out."
)
@click.option(
    "--onnx",
    nargs=2,
    type=PATH,
    metavar="ENCODER DECODER",
    help="Two ONNX files instead of a checkpoint; README says what they must take and return.",
)
@click.option("--model", metavar="NAME|FILE", help="With --random-weights: large, small, pocket or a config.json.  [default: large]")
@click.option("--out", required=True, type=PATH, help="The bundle's directory. An older bundle there is removed.")
@click.option(
    "--shape",
    "shapes",
    type=ShapeType(),
    multiple=True,
    help="Input shape, several times for several.  [default: the trained ones, both orientations]",
)
@click.option("--backend", help="Backend to build for.  [default: the best that can build here]")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "hybrid", "fp16", "bf16"]),
    help="hybrid: float16 with float32 where it is needed; bf16 likewise; fp16: float16 everywhere.  [default: hybrid on GPUs]",
)
@click.option("--include", multiple=True, metavar="PATTERN", help="Nodes to put into low precision, by name; * stands for anything.")
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Nodes to leave in float32; goes before --include.")
@click.option("--max-batch", default=1, show_default=True, help="Pairs at once that a GPU's plan takes.")
@click.option("--tuning", type=PATH, metavar="FILE", help="A file of smc tune, for --backend cuda.")
@click.option("--kernels", type=PATH, metavar="DIR", help="Take compiled kernels from here first.")
@click.option("--dump-graphs", type=PATH, metavar="DIR", help="Write the graph after every pass, numbered.")
@click.option("--verbose", is_flag=True, help="Print the backend's own log, and why passes left nodes alone.")
@click.option("--force", is_flag=True, help="Build even if the bundle is up to date.")
@click.option("--no-wait", is_flag=True, help="Fail if another build of the same bundle is running.")
def build(gpu: str, out: Path, shapes: Sequence[tuple[int, int]], no_wait: bool, verbose: bool, **request: Any) -> None:
    """Build a bundle from a checkpoint, and verify it."""
    from smc.compiler.build import BuildRequest
    from smc.compiler.build import build as run_build

    with _progress() as report, _warnings_to_stderr(_OURS):
        result = run_build(BuildRequest(gpu=gpu, out=out, shapes=shapes or None, wait=not no_wait, verbose=verbose, **request), report)
    for stage in result.passes:
        if stage.passes:
            _print_table(_passes_table(stage, verbose))
    table = _table()
    _add_bundle_rows(table, result.manifest)
    table.add_row(
        "built in", "up to date, nothing to do" if result.reused else ", ".join(f"{name} {s:.1f} s" for name, s in result.seconds.items())
    )
    table.add_row("bundle", _printable(str(result.path)))
    _print_table(table)
    _say_if_random(result.manifest)


@cli.command()
@click.argument("image0", type=PATH)
@click.argument("image1", type=PATH)
@click.option("--bundle", required=True, type=PATH, help="The bundle to match with.")
@click.option("--out", type=PATH, help="Write the matches to this .npz file.")
@click.option("--viz", type=PATH, help="Draw the matches to this picture.")
@click.option(
    "--homography",
    type=PATH,
    metavar="FILE",
    help="Of a flat scene, the true homography: check the matches with it, and draw right ones green.",
)
@click.option(
    "--subsample", default=8, show_default=True, type=click.IntRange(1), help="Step of the grid of starting points, network pixels."
)
@click.option("--both-ways", is_flag=True, help="Start from grids in both images, and merge.")
@click.option("--pixel-tol", default=0.0, show_default=True, type=FiniteType(0), help="Keep starting points that come back this close.")
@click.option("--border", default=0, show_default=True, type=click.IntRange(0), help="Drop matches this close to the input's edge.")
@click.option("--min-confidence", default=0.0, show_default=True, help="Drop matches below this confidence.")
@click.option("--points3d", is_flag=True, help="Also write the 3D points of the matches.")
@click.option(
    "--exif",
    type=click.Choice(["apply", "ignore"]),
    default="apply",
    show_default=True,
    help="Turn images upright by their EXIF orientation.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def match(
    image0: Path,
    image1: Path,
    bundle: Path,
    out: Path | None,
    viz: Path | None,
    homography: Path | None,
    as_json: bool,
    exif: Any,
    **options: Any,
) -> None:
    """Match two images."""
    from smc.compiler.match import match_files

    with _progress() as report, _warnings_to_stderr():
        result = match_files(image0, image1, bundle, out=out, viz=viz, homography=homography, exif=exif, report=report, **options)
    if as_json:
        _print_json(result.summary())
    else:
        table = _table()
        for name, path, size in zip("01", (image0, image1), (result.matches.image_size0, result.matches.image_size1), strict=True):
            table.add_row(f"image {name}", f"{_printable(path.name)}, {size[0]}x{size[1]}")
        table.add_row("matches", f"{len(result.matches)}")
        table.add_row("time", ", ".join(f"{name} {1000 * s:.0f} ms" for name, s in result.seconds.items()))
        if result.plane is not None:
            checked = result.plane.summary()
            error = checked["corner_error"]
            table.add_row("right", ", ".join(f"{100 * value:.1f} % within {name}" for name, value in checked["precision"].items()))
            table.add_row(
                "homography",
                "could not be estimated"
                if error is None
                else f"from {checked['inliers']} matches that agree, corners {error:.2f} px from the truth on average",
            )
        for name, path_written in (("written", out), ("picture", viz)):
            if path_written is not None:
                table.add_row(name, _printable(str(path_written)))
        _print_table(table)
    _say_if_random(result.manifest)


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--pair", nargs=2, type=PATH, help="Two images to verify with, instead of the shipped photographs.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(bundle: Path, pair: tuple[Path, Path] | None, as_json: bool) -> None:
    """Compare a bundle's plan with its float32 graph on real images."""
    from smc.compiler.verify import check, verify_bundle
    from smc.exported.bundle import open_bundle

    with _progress() as report:
        report("reading the bundle", 0.0)
        verification = verify_bundle(open_bundle(bundle), report, pair)
    if as_json:
        _print_json(verification)
    else:
        _print_table(_verification_table(verification))
    check(verification)


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--layers", is_flag=True, help="List every layer of the plan.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(bundle: Path, layers: bool, as_json: bool) -> None:
    """Show what a bundle is, after checking that it is whole."""
    import dataclasses

    import msgspec

    from smc.compiler.inspect import inspect_contents
    from smc.exported.bundle import open_bundle

    with _progress() as report:
        report("reading the bundle")
        opened = open_bundle(bundle)
    manifest, contents = opened.manifest, inspect_contents(opened)
    if as_json:
        _print_json(msgspec.to_builtins(manifest) | msgspec.to_builtins(dataclasses.asdict(contents)))
        return
    table = _table()
    _add_bundle_rows(table, manifest)
    table.add_row("created", f"{manifest.created} by speedy-mast3r {manifest.tool_version}")
    for name, info in manifest.files.items():
        absent = "" if name in opened.files else ", left out of this copy"
        table.add_row(name, f"{info.size:,} bytes, sha256 {info.sha256[:16]}...{absent}")
    _print_table(table)
    for stage in contents.passes:
        if stage.passes:
            _print_table(_passes_table(stage, verbose=False))
    for name, plan in contents.layers.items():
        _print_table(_layers_table(name, plan, layers))
    if contents.engine is not None:
        _print_json(contents.engine)
    elif contents.why_not:
        ERR.print(_printable(f"The layers are those of the network before TensorRT fused them: {contents.why_not}."))
    _print_table(_verification_table(manifest.verification))


@cli.command()
@click.argument("bundle", type=PATH)
@click.option("--shape", "shapes", type=ShapeType(), multiple=True, help="Input shape, several times for several.  [default: the first]")
@click.option("--batch", "batches", type=CountsType(), help="Pairs at once.  [default: 1,2,4,8 on GPUs, 1 on CPUs]")
@click.option("--peers/--no-peers", default=True, help="Also measure torch and ONNX Runtime, as far as they are installed.  [default: yes]")
@click.option("--peer", "only", multiple=True, metavar="NAME", help="Of the peers, this one, several times for several.")
@click.option("--ablation", is_flag=True, help="Also time the paper's techniques, added one by one.")
@click.option(
    "--with",
    "others",
    multiple=True,
    type=PATH,
    metavar="BUNDLE",
    help="Another bundle of the same weights: for CPUs, for ONNX Runtime; in fp32 or hybrid, for --ablation, which else builds it.",
)
@click.option("--checkpoint", type=PATH, help="What the bundle was built from, for the torch model.")
@click.option("--random-weights", "random_seed", type=click.IntRange(0), metavar="SEED", help="Random weights for the torch model.")
@click.option("--repeat", default=20, show_default=True, type=click.IntRange(3), help="Samples a figure, at most.")
@click.option("--timeout", default=900.0, show_default=True, type=FiniteType(1), help="Seconds that a contestant may take.")
@click.option("--seed", type=click.IntRange(0), help="Seed of the images.  [default: a new one]")
@click.option("--json", type=PATH, metavar="FILE", help="Write everything to this file.")
@click.option("--plot", type=PATH, metavar="FILE", help="Draw a .png, .svg or .pdf.")
def bench(bundle: Path, shapes: Sequence[tuple[int, int]], **request: Any) -> None:
    """Measure a bundle, its peers, and the paper's ablation."""
    from smc.compiler.bench.run import BenchRequest
    from smc.compiler.bench.run import bench as run_bench
    from smc.compiler.bench.tables import tables
    from smc.exported.errors import BackendFailed

    with _progress() as report:
        command = ["smc", *sys.argv[1:]]
        found = run_bench(BenchRequest(bundle=bundle, shapes=shapes or None, command=command, **request), report)
    for table in tables(found):
        _print_table(table)
        OUT.print()
    if found.bundle["random_weights"]:
        ERR.print("The weights of this bundle are random: times are a trained model's, numbers of matches are not.", style="yellow")
    if failure := found.subject.result.failure:
        raise BackendFailed(f"{bundle} could not be measured: {failure}")


@cli.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--prepare", type=PATH, metavar="DIR", help="Only compile the candidates, into DIR; needs no GPU.")
@click.option("--candidates", type=PATH, metavar="DIR", help="Only time candidates that --prepare compiled.")
@click.option("--out", type=PATH, metavar="FILE", help="The tuning file to write, a .json, for smc build --tuning.")
def tune(bundle: Path | None, prepare: Path | None, candidates: Path | None, out: Path | None) -> None:
    """Time the kernels of a bundle of --backend cuda on this machine's GPU, and write down the fastest."""
    from smc.compiler.output_files import check_output
    from smc.compiler.packages import cache_directory, require_packages
    from smc.exported.errors import UsageError

    if (bundle is None) == (candidates is None) or (prepare is None) == (out is None) or (candidates and prepare):
        raise UsageError(
            "a bundle is tuned in one go, or in two steps",
            fix="smc tune BUNDLE --out FILE; or smc tune BUNDLE --prepare DIR, and on the GPU smc tune --candidates DIR --out FILE",
        )
    check_output(out, "--out", (".json",))
    require_packages("tuning", ("triton", "onnx", "onnx_graphsurgeon", "platformdirs"))
    from smc.compiler import tune as tuning

    with _progress() as report, _warnings_to_stderr(_OURS), tempfile.TemporaryDirectory() as scratch:
        directory = candidates or prepare or Path(scratch)
        if bundle is not None:
            count = tuning.prepare(bundle, directory, cache_directory(), report)
        if out is not None:
            found = tuning.measure(directory, report)
            tuning.write(found, out)
    table = _table()
    if out is None:
        table.add_row("candidates", f"{count}, in {_printable(str(prepare))}")
    else:
        for operation, tuned in sorted(found.tiles.items(), key=lambda item: -item[1].microseconds):
            table.add_row(f"{tuned.microseconds:.1f} us", _printable(operation))
        table.add_row("tuning file", _printable(str(out)))
    _print_table(table)


@cli.command(name="eval")
@click.argument("subject", metavar="BUNDLE|sift", required=False)
@click.option(
    "--data",
    "data",
    multiple=True,
    metavar="KIND:PATH[:IMAGES]",
    help="Pairs with ground truth, several times for several kinds: megadepth, scannet, pairs, hpatches, homography, scenes, rendered.",
)
@click.option("--out", type=PATH, metavar="FILE", help="Results, a line a pair; continued if it was begun.")
@click.option("--limit", type=click.IntRange(1), help="Draw this many pairs from each data set.  [default: all]")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of that draw, and of the robust estimation.")
@click.option("--draws", default=1, show_default=True, type=click.IntRange(1), help="Estimate this often, with other samples, and average.")
@click.option("--pose-threshold", default=1.0, show_default=True, type=POSITIVE, help="Largest epipolar error of an inlier, pixels.")
@click.option("--homography-threshold", default=3.0, show_default=True, type=POSITIVE, help="Largest distance of an inlier, pixels.")
@click.option(
    "--subsample", default=8, show_default=True, type=click.IntRange(1), help="As for smc match, and so are the next four; for bundles."
)
@click.option("--both-ways", is_flag=True)
@click.option("--pixel-tol", default=0.0, show_default=True, type=FiniteType(0))
@click.option("--border", default=0, show_default=True, type=click.IntRange(0))
@click.option("--min-confidence", default=0.0, show_default=True)
@click.option(
    "--compare",
    nargs=2,
    type=PATH,
    metavar="FILE FILE",
    help="Instead, show how the second file's results differ from the first's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def evaluate(
    subject: str | None,
    data: Sequence[str],
    out: Path | None,
    limit: int | None,
    seed: int,
    draws: int,
    pose_threshold: float,
    homography_threshold: float,
    compare: tuple[Path, Path] | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how good matches are, on pairs with ground truth."""
    import msgspec

    from smc.compiler.evaluation import summary, tables
    from smc.exported.errors import UsageError

    if compare is not None:
        if subject is not None or data or out is not None:
            raise UsageError("--compare reads two files of results and evaluates nothing", fix="smc eval --compare FILE FILE")
        compared = summary.compare(*compare, seed)
        if as_json:
            _print_json(msgspec.to_builtins(compared))
            return
        for table in tables.comparison_tables(compared):
            _print_table(table)
        return
    if subject is None or not data or out is None:
        raise UsageError("an evaluation needs a matcher, data and a file", fix="smc eval BUNDLE --data KIND:PATH --out FILE")

    from smc.compiler.evaluation.data import open_data
    from smc.compiler.evaluation.matchers import BundleMatcher, PairMatcher, SiftMatcher
    from smc.compiler.evaluation.run import EvalRequest
    from smc.compiler.evaluation.run import evaluate as run_evaluation
    from smc.exported.matcher import load

    with _progress() as report, _warnings_to_stderr():
        report("reading the data's lists", 0.0)
        sets = [open_data(each) for each in data]
        report("loading the matcher", 0.0)
        matcher: PairMatcher = SiftMatcher() if subject == "sift" else BundleMatcher(load(subject), **options)
        request = EvalRequest(
            matcher=matcher,
            data=sets,
            out=out,
            limit=limit,
            seed=seed,
            draws=draws,
            pose_threshold=pose_threshold,
            homography_threshold=homography_threshold,
        )
        found = run_evaluation(request, report)
    if found.continued:
        ERR.print(f"{found.continued} of {len(found.rows)} pairs were in the file already.")
    summaries = summary.summarise(found.header.config, found.rows)
    if as_json:
        _print_json(msgspec.to_builtins(summaries))
    else:
        for table in tables.summary_tables(summaries):
            _print_table(table)
        OUT.print(_printable(str(out)))
    if isinstance(matcher, BundleMatcher):
        _say_if_random(matcher.matcher.manifest)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def targets(as_json: bool) -> None:
    """List the machines that bundles can be built for."""
    from smc.compiler.backends import BACKENDS
    from smc.compiler.targets import TARGETS

    refusals = {target.name: {backend.NAME: backend.refusal(target) for backend in BACKENDS} for target in TARGETS.values()}
    if as_json:
        import dataclasses

        _print_json(
            [
                dataclasses.asdict(target)
                | {"backends": [name for name, why in refusals[target.name].items() if not why], "refusals": refusals[target.name]}
                for target in TARGETS.values()
            ]
        )
        return

    def standing(target: Any) -> str:
        if target.refusal:
            return f"refused: {target.refusal}"
        able = [
            f"{backend.NAME} ({caveat})" if (caveat := backend.caveat(target)) else backend.NAME
            for backend in BACKENDS
            if not refusals[target.name][backend.NAME]
        ]
        return ", ".join(able) or "none here: " + "; ".join(f"{name}: {why}" for name, why in refusals[target.name].items())

    table = Table("--gpu", "machine", "sm", "memory", "backends that can build for it here", box=None, pad_edge=False)
    for target in TARGETS.values():
        table.add_row(target.name, target.title, target.sm or "", f"{target.memory_gib} GiB" if target.memory_gib else "", standing(target))
    _print_table(table)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def doctor(as_json: bool) -> None:
    """Show what this machine has and lacks for building and running bundles."""
    from smc.compiler.doctor import examine

    findings = examine()
    if as_json:
        import dataclasses

        _print_json([dataclasses.asdict(finding) for finding in findings])
        return
    table = Table(box=None, pad_edge=False, show_header=False)
    for _ in range(4):
        table.add_column(overflow="fold")  # whole, for a fix is to be copied
    for finding in findings:
        color = {"ok": "green", "missing": "red", "absent": "yellow"}[finding.state]
        table.add_row(Text(finding.state, style=color), finding.subject, finding.detail, finding.fix)
    _print_table(table)


def _table() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _add_bundle_rows(table: Table, manifest: Any) -> None:
    target = f"{manifest.target.gpu} (sm {manifest.target.sm})" if manifest.target.sm else manifest.target.gpu
    size = sum(info.size for info in manifest.files.values())
    worst = max(error.relative for pair in manifest.verification.pairs for error in pair.outputs.values())
    overlap = min(pair.match_overlap for pair in manifest.verification.pairs)
    checkpoint = f", sha256 {manifest.model.checkpoint_sha256[:16]}..." if manifest.model.checkpoint_sha256 else ""
    table.add_row("model", f"{_printable(manifest.model.source)}, {manifest.model.parameters / 1e6:.1f} M parameters{checkpoint}")
    table.add_row("target", target)
    table.add_row("backend", f"{manifest.backend.name} {manifest.backend.version}, {manifest.precision}")
    table.add_row("input shapes", ", ".join(f"{shape.width}x{shape.height}" for shape in manifest.shapes))
    table.add_row("size", f"{size / 1e6:,.1f} MB in {len(manifest.files)} files")
    table.add_row(
        "verified", f"relative error at most {worst:.1e}, match overlap at least {overlap:.3f}, against {manifest.verification.reference}"
    )
    if manifest.verification.subject == "graph":
        table.add_row("", "by the graph that the engine was built from: the engine itself has not been run; smc verify does, on its GPU")


def _passes_table(stage: Any, verbose: bool) -> Table:
    """What the passes did to a stage's graph; with `verbose` also what they left alone, and why."""
    table = Table(stage.stage, "rewrites", "nodes", "left alone", box=None, pad_edge=False)
    for step in stage.passes:
        nodes = f"{step.nodes_before} to {step.nodes_after}" if step.nodes_before != step.nodes_after else f"{step.nodes_after}"
        table.add_row(step.name, str(step.rewrites), nodes, str(len(step.declined)) if step.declined else "")
        if verbose or (step.declined and not step.rewrites):
            for node, why in step.declined:
                table.add_row("", "", "", _printable(f"{node}: {why}"))
    islands = [island for step in stage.passes for island in step.islands]
    for reason, count in Counter(reason for _, reason in islands).most_common(None if verbose else 8):
        table.add_row("float32", str(count), "", _printable(reason))
    return table


def _layers_table(stage: str, plan: Any, every: bool) -> Table:
    """A TensorRT network: how many layers of each kind and precision, or every layer by name."""
    memory = (
        f"weights {plan.weight_bytes / 1e6:,.1f} MB, engine {plan.engine_bytes / 1e6:,.1f} MB, "
        f"workspace at most {plan.workspace_limit_bytes / 2**30:,.1f} GiB"
    )
    title = f"{stage}: {len(plan.layers)} layers; {memory}"
    if plan.attention is not None:
        times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in plan.attention.milliseconds.items())
        title += f"; attention: {plan.attention.taken} ({times or plan.attention.why_not})"
    if not every:
        table = Table("layer", "precision", "count", title=title, title_justify="left", box=None, pad_edge=False)
        for total in plan.totals:
            table.add_row(total.type, total.precision, str(total.layers))
        return table
    table = Table("name", "layer", "outputs", title=title, title_justify="left", box=None, pad_edge=False)
    for layer in plan.layers:
        outputs = (f"{out.type} {'x'.join('?' if n is None else str(n) for n in out.shape)}" for out in layer.outputs)
        table.add_row(_printable(layer.name), layer.type, ", ".join(outputs))
    return table


def _verification_table(verification: Any) -> Table:
    tolerance = verification.tolerance
    ran = "" if verification.subject == "plan" else "the engine itself has not been run; the graph it was built from, in ONNX Runtime, "
    title = f"{ran}against {verification.reference}; allowed: relative {tolerance.relative:.0e}, worst pixel {tolerance.worst_pixel:.0e}"
    table = Table(
        "pair", "output", "relative error", "worst pixel", "at row, column", title=title, title_justify="left", box=None, pad_edge=False
    )
    for pair in verification.pairs:
        shapes = " with ".join(f"{shape.width}x{shape.height}" for shape in pair.shapes)
        for i, (name, error) in enumerate(pair.outputs.items()):
            table.add_row("" if i else shapes, name, f"{error.relative:.2e}", f"{error.worst_pixel:.2e}", "{}, {}".format(*error.worst_at))
        table.add_row("", "matches", f"overlap {pair.match_overlap:.3f}", f"{pair.matches_plan} of {pair.matches_reference}")
    return table


def _say_if_random(manifest: Any) -> None:
    if manifest.random_weights:
        ERR.print("The weights of this bundle are random: its matches mean nothing. Build with --checkpoint for real ones.", style="yellow")


def _print_table(table: Table) -> None:
    """Print a table, folded to the width of the terminal; where there is none, a path stays in one piece."""
    if not OUT.is_terminal:
        OUT.width = 1000
    OUT.print(table)


def _printable(text: str) -> str:
    """The text in one line: escapes what is no visible character, such as newlines and terminal codes, which names may hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _print_json(value: Any) -> None:
    import msgspec

    OUT.out(msgspec.json.format(msgspec.json.encode(value), indent=1).decode(), highlight=False)


@contextlib.contextmanager
def _progress() -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, a line for each step elsewhere. Yields report(description, fraction)."""
    if not ERR.is_terminal:
        said: list[str] = []

        def say(description: str, fraction: float | None = None) -> None:
            if said[-1:] != [description]:
                said[:] = [description]
                ERR.print(_printable(description))

        yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=ERR, transient=True) as progress:
        task = progress.add_task("", total=None)

        def report(description: str, fraction: float | None = None) -> None:
            progress.update(task, description=_printable(description), completed=fraction, total=None if fraction is None else 1.0)

        yield report


_OURS = r"smc\."
"""Modules of this package."""


@contextlib.contextmanager
def _warnings_to_stderr(modules: str = "") -> Iterator[None]:
    """Print warnings that are meant for users as the command's own, those that modules of these names give; "" is for all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", UserWarning)
        warnings.filterwarnings("always", category=UserWarning, module=modules)
        try:
            yield
        finally:
            for warning in caught:
                if issubclass(warning.category, UserWarning):
                    ERR.print(_printable(f"smc: warning: {warning.message}"))


class _Terminated(BaseException):
    """SIGTERM, as an exception, so that staging is cleaned up on the way out."""


def _on_sigterm(signum: int, frame: object) -> NoReturn:
    raise _Terminated


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `smc`: runs a command and exits with the status that `smc.exported.errors` lists."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    _prepare_stdout()
    sys.exit(_run(sys.argv[1:] if arguments is None else list(arguments)))


def _prepare_stdout() -> None:
    """Have a stdout even where the caller closed it, and one that prints every file name, Unicode or not."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(arguments: list[str]) -> int:
    try:
        with cli.make_context("smc", arguments) as context:
            cli.invoke(context)
        sys.stdout.flush()
        return 0
    except click.exceptions.Exit as exit:
        return exit.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        return _fail("USAGE", error.format_message(), "smc --help", 2)
    except SmcError as error:
        return _fail(error.code, str(error), error.fix, error.exit_status)
    except MemoryError:
        return _fail(OutOfMemory.code, "not enough memory", "free memory, or use smaller images", OutOfMemory.exit_status)
    except (KeyboardInterrupt, click.Abort):
        return 130
    except _Terminated:
        return 143
    except OSError as error:
        if error.errno == errno.EPIPE:
            # The reader has gone: say nothing, and let nothing be said when Python flushes on exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        if error.errno == errno.ENOSPC:
            return _fail(DiskError.code, str(error), "free disk space", DiskError.exit_status)
        return _bug(error)
    except Exception as error:
        return _bug(error)


def _fail(code: str, message: str, fix: str, status: int) -> int:
    with contextlib.suppress(BrokenPipeError):  # the status tells all the same
        ERR.print(_printable(f"smc: error[{code}]: {message}"))
        if fix:
            ERR.print(_printable(f"fix: {fix}"))
    return status


def _bug(error: Exception) -> int:
    traceback.print_exception(error, file=sys.stderr)
    return _fail("INTERNAL", f"{type(error).__name__}: {error}", "this is a bug in speedy-mast3r; please report it with the lines above", 1)
