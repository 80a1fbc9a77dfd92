"""The command line: what each command prints where, and every exit status."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import smc
from smc.compiler import cli, match
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.targets import TARGETS
from smc.exported.manifest import OutputError, decode_manifest, encode_manifest
from smc.plugins.compile import Compiled
from smc.plugins.launch import Kernel
from tests.conformance import DATA
from tests.conftest import TINY_SHAPES

CONFIG = str(DATA / "tiny_landscape.config.json")
RANDOM = "The weights of this bundle are random: its matches mean nothing. Build with --checkpoint for real ones."
SMC = [sys.executable, "-c", "from smc.compiler.cli import main; main()"]

BUILD = ["build", "--gpu", "cpu", "--random-weights", "0", "--model", CONFIG]


@dataclass(frozen=True)
class Result:
    status: int
    out: str
    err: str

    def check_error(self, status: int, code: str, message: str, fix: str = "") -> None:
        """One `smc: error` line on stderr, at most a fix below it, nothing on stdout, no traceback."""
        lines = self.err.splitlines()
        position = next(i for i, line in enumerate(lines) if line.startswith("smc: error"))
        assert self.status == status
        assert lines[position].startswith(f"smc: error[{code}]: ")
        assert message in lines[position]
        assert len(lines) <= position + 2
        assert not lines[position + 1 :] or lines[position + 1].startswith("fix: ")
        assert fix in "".join(lines[position + 1 :])
        assert self.out == ""
        assert "Traceback" not in self.err


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process."""

    def run_here(*arguments: object) -> Result:
        capsys.readouterr()
        status = cli._run([str(argument) for argument in arguments])
        return Result(status, *capsys.readouterr())

    return run_here


@pytest.fixture
def loaded(tiny_bundle: Path, tiny_matcher: smc.Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares `smc match` in this process the loading of the tiny bundle."""
    monkeypatch.setattr(match, "load", lambda path: tiny_matcher if path == tiny_bundle else smc.load(path))


def run_apart(*arguments: object, **options: Any) -> Result:
    """Runs a command in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [*SMC, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="surrogateescape", env=environment, check=False, **options)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def pair(examples: Path) -> tuple[Path, Path]:
    return examples / "graf1.png", examples / "graf3.png"


def table(text: str) -> dict[str, str]:
    """A two-column table's rows by their first cell."""
    return dict(re.split(r" {2,}", line.strip(), maxsplit=1) for line in text.splitlines())


# --- build -------------------------------------------------------------------------------------------------------------------


def test_build_reuses_what_is_up_to_date(run: Run, tiny_bundle: Path) -> None:
    shapes = [argument for height, width in TINY_SHAPES for argument in ("--shape", f"{width}x{height}")]
    before = (tiny_bundle / "manifest.json").read_bytes()
    result = run(*BUILD, *shapes, "--out", tiny_bundle)
    assert result.status == 0
    rows = table(result.out)
    assert rows["built in"] == "up to date, nothing to do"
    assert rows["bundle"] == str(tiny_bundle)
    assert rows["target"] == "cpu"
    assert rows["input shapes"] == "128x96, 96x128, 112x80"
    assert rows["model"].startswith("random weights, seed 0, ")
    assert result.err.splitlines()[-1] == RANDOM
    assert (tiny_bundle / "manifest.json").read_bytes() == before


# --- match -------------------------------------------------------------------------------------------------------------------


def test_match_prints_a_summary_and_writes_matches_and_a_picture(
    run: Run, tiny_bundle: Path, tiny_matcher: smc.Matcher, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    out, viz = tmp_path / "matches.npz", tmp_path / "matches.png"
    result = run("match", *pair, "--bundle", tiny_bundle, "--out", out, "--viz", viz, "--points3d", "--border", 3)
    assert result.status == 0
    wanted = tiny_matcher.match(*pair, points3d=True, border=3)
    rows = table(result.out)
    assert rows["image 0"] == "graf1.png, 800x640"
    assert rows["image 1"] == "graf3.png, 800x640"
    assert rows["matches"] == str(len(wanted))
    assert (rows["written"], rows["picture"]) == (str(out), str(viz))
    assert re.fullmatch(r"load \d+ ms, encode 0 \d+ ms, encode 1 \d+ ms, decode and match \d+ ms", rows["time"])
    progress = ["loading the bundle", "encoding graf1.png", "encoding graf3.png", "decoding and matching"]
    assert result.err.splitlines() == [*progress, RANDOM]

    with np.load(out, allow_pickle=False) as arrays:
        assert set(arrays) == set(wanted.arrays())
        for name, value in wanted.arrays().items():
            np.testing.assert_array_equal(arrays[name], value)
    with Image.open(viz) as picture:
        assert picture.size == (1608, 640)
        pixels = np.asarray(picture)
    with Image.open(pair[0]) as image:
        changed = (pixels[:, :800] != np.asarray(image)).any(axis=2)
    assert 100 < changed.sum() < changed.size / 2, "lines over the photograph"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matches.npz", "matches.png"]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("kind", ["jpg", "jpeg", "webp", "PNG"])
def test_match_draws_every_kind_of_picture(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], kind: str, tmp_path: Path) -> None:
    assert run("match", *pair, "--bundle", tiny_bundle, "--viz", tmp_path / f"x.{kind}").status == 0
    with Image.open(tmp_path / f"x.{kind}") as picture:
        assert picture.format in ("JPEG" if kind.startswith("jp") else kind.upper(),)
        assert np.asarray(picture).std() > 10


def test_match_prints_json_and_nothing_else_on_stdout(tiny_bundle: Path, pair: tuple[Path, Path]) -> None:
    result = run_apart("match", *pair, "--bundle", tiny_bundle, "--json", "--both-ways", "--subsample", 16)
    assert result.status == 0
    summary = json.loads(result.out)
    assert summary.keys() == {"matches", "image_size0", "image_size1", "exif", "random_weights", "seconds"}
    assert summary["matches"] > 0
    assert summary["image_size0"] == [800, 640]
    assert (summary["exif"], summary["random_weights"]) == ("apply", True)
    assert all(seconds >= 0 for seconds in summary["seconds"].values())
    assert result.err.splitlines()[-1] == RANDOM


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_match_names_the_frame(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], exif: str, tmp_path: Path) -> None:
    tags = Image.Exif()
    tags[0x0112] = 6
    with Image.open(pair[0]) as image:
        image.save(tmp_path / "lying.png", exif=tags)
    out, viz = tmp_path / "out.npz", tmp_path / "viz.png"
    result = run("match", tmp_path / "lying.png", pair[1], "--bundle", tiny_bundle, "--exif", exif, "--out", out, "--viz", viz, "--json")
    size = [640, 800] if exif == "apply" else [800, 640]
    summary = json.loads(result.out)
    assert (summary["exif"], summary["image_size0"]) == (exif, size)
    with np.load(out) as arrays:
        assert (str(arrays["exif"]), arrays["image_size0"].tolist()) == (exif, size)
    with Image.open(viz) as picture:
        assert picture.size == (size[0] + 8 + 800, max(size[1], 640))


@pytest.mark.usefixtures("loaded")
def test_match_replaces_older_outputs(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "matches.npz"
    out.write_bytes(b"old")
    with out.open("rb") as reader:
        assert run("match", *pair, "--bundle", tiny_bundle, "--out", out).status == 0
        assert reader.read() == b"old", "whoever reads the older file reads on"
    with np.load(out) as arrays:
        assert len(arrays["keypoints0"])


@pytest.mark.usefixtures("loaded")
def test_match_warns_on_stderr_where_little_of_an_image_is_kept(
    run: Run, tiny_bundle: Path, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    Image.new("RGB", (1600, 400)).save(tmp_path / "wide.png")
    result = run("match", tmp_path / "wide.png", pair[0], "--bundle", tiny_bundle, "--json")
    assert json.loads(result.out)["matches"] >= 0
    assert "smc: warning: the bundle's input shapes keep only 35% of a 1600x400 image" in result.err
    result = run("match", tmp_path / "wide.png", tmp_path / "none.png", "--bundle", tiny_bundle)
    assert "smc: warning: " in result.err
    result.check_error(66, "INPUT_MISSING", "none.png")


@pytest.mark.parametrize(
    ("command", "work"),
    [
        ("build --gpu cpu --random-weights 0 --out {out}", "smc.compiler.build.build"),
        ("tune {out} --prepare {out}", "smc.compiler.tune.prepare"),
    ],
)
def test_of_warnings_a_build_shows_its_own(command: str, work: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    kernel = Kernel("smc.plugins.elementwise.kernel:elementwise", (), (), frozenset(), warps=4, stages=2)

    def work_that_warns(*_: Any) -> None:
        KernelCache(tmp_path / "file" / "kernels")._kept(kernel, 90, Compiled("name", b"code", 128, 0, ()))
        exec(compile("import warnings; warnings.warn('of the exporter', UserWarning)", "torch.py", "exec"), {"__name__": "torch.onnx"})
        raise smc.BadInput("that was all")

    monkeypatch.setattr(work, work_that_warns)
    lines = run(*command.format(out=tmp_path / "out").split()).err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("smc: warning: compiled kernels cannot be kept, so that the next build compiles them again: ")
    assert lines[1] == "smc: error[BAD_INPUT]: that was all"


NAMES = ["[red]a[bold].png", "[]:smile: %s {0} {task}.png", "größe 深度 😀.png", " two  spaces .png", "-dash.png", "深" * 80 + ".png"]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_names_are_printed_as_they_are(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], name: str, tmp_path: Path) -> None:
    shutil.copy(pair[0], tmp_path / name)
    out, viz = (tmp_path / name).with_suffix(".npz"), tmp_path / f"v{name[1:]}"
    result = run("match", tmp_path / name, pair[1], "--bundle", tiny_bundle, "--out", out, "--viz", viz)
    assert result.status == 0
    assert f"image 0  {name}, 800x640" in result.out
    assert f"written  {out}" in result.out
    assert f"picture  {viz}" in result.out
    assert f"encoding {name}" in result.err.splitlines()
    assert out.exists()
    assert viz.exists()

    missing = tmp_path / f"none{name}"
    run("match", missing, pair[1], "--bundle", tiny_bundle).check_error(66, "INPUT_MISSING", f"{missing}: No such file")


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(
    ("name", "shown"), [("a\nb.png", r"a\nb.png"), ("a\x1b[31mb.png", r"a\x1b[31mb.png"), ("a\udcffb.png", r"a\udcffb.png")]
)
def test_names_stay_in_one_line_and_send_nothing_to_the_terminal(
    run: Run, tiny_bundle: Path, pair: tuple[Path, Path], name: str, shown: str, tmp_path: Path
) -> None:
    shutil.copy(pair[0], tmp_path / name)
    result = run("match", tmp_path / name, pair[1], "--bundle", tiny_bundle, "--out", (tmp_path / name).with_suffix(".npz"))
    assert result.status == 0
    assert table(result.out)["image 0"] == f"{shown}, 800x640"
    assert f"encoding {shown}" in result.err.splitlines()
    (tmp_path / name).unlink()
    run("match", tmp_path / name, pair[1], "--bundle", tiny_bundle).check_error(66, "INPUT_MISSING", f"{shown}: No such file")


# --- verify, inspect, targets, doctor ----------------------------------------------------------------------------------------


def test_verify(run: Run, tiny_bundle: Path, pair: tuple[Path, Path]) -> None:
    result = run("verify", tiny_bundle)
    assert result.status == 0
    assert result.out.startswith("against float32 graph in ONNX Runtime, not optimised; allowed: relative 2e-05")
    assert "128x96 with 128x96" in result.out
    assert "96x128 with 112x80" in result.out
    assert "reading the bundle" in result.err

    as_json = run("verify", tiny_bundle, "--pair", *pair, "--json")
    assert as_json.status == 0
    report = json.loads(as_json.out)
    for pair_report in report["pairs"]:
        assert len(pair_report["outputs"]) == 10
        assert all(error["relative"] < 2e-5 for error in pair_report["outputs"].values())


def test_verify_fails_where_the_plan_is_off(run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smc.compiler import verify

    def off(*arguments: Any) -> Any:
        verification = decode_manifest((tiny_bundle / "manifest.json").read_bytes()).verification
        report = verification.pairs[0]
        outputs = report.outputs | {"desc1": OutputError(relative=0.5, worst_pixel=2.0, worst_at=(3, 4))}
        return msgspec.structs.replace(verification, pairs=[msgspec.structs.replace(report, outputs=outputs)])

    monkeypatch.setattr(verify, "verify_bundle", off)
    result = run("verify", tiny_bundle, "--json")
    assert json.loads(result.out)["pairs"][0]["outputs"]["desc1"]["relative"] == 0.5
    Result(result.status, "", result.err).check_error(78, "ACCURACY_FAILED", "desc1 at 128x96 with 128x96: relative error 0.5")


def test_inspect(run: Run, tiny_bundle: Path) -> None:
    manifest = decode_manifest((tiny_bundle / "manifest.json").read_bytes())
    result = run("inspect", tiny_bundle)
    assert (result.status, result.err) == (0, "reading the bundle\n")
    assert manifest.model.source in result.out
    assert "onnxruntime" in result.out
    for name, info in manifest.files.items():
        assert re.search(rf"^{re.escape(name)} +{info.size:,} bytes, sha256 {info.sha256[:16]}", result.out, re.MULTILINE)
    for output in manifest.verification.pairs[0].outputs:
        assert output in result.out

    as_json = run("inspect", tiny_bundle, "--json")
    shown = json.loads(as_json.out)
    assert (as_json.status, as_json.err) == (0, "reading the bundle\n")
    assert shown["files"].keys() == manifest.files.keys()
    assert shown["shapes"][0] == {"height": 96, "width": 128}


def test_targets(run: Run) -> None:
    result = run("targets")
    assert (result.status, result.err) == (0, "")
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert lines.keys() == {"--gpu", *TARGETS}
    assert "onnxruntime" in lines["cpu"]
    assert "refused: sm 7.0 is no longer supported by CUDA 13, TensorRT 11 or TensorRT-RTX" in lines["v100"]
    assert re.search(r"NVIDIA A40 +8\.6 +48 GiB", lines["a40"])

    as_json = {target["name"]: target for target in json.loads(run("targets", "--json").out)}
    assert as_json.keys() == TARGETS.keys()
    assert as_json["cpu"]["backends"] == ["onnxruntime"]
    assert as_json["v100"]["backends"] == []
    assert "sm 7.0" in as_json["v100"]["refusal"]
    assert as_json["h200"]["memory_gib"] == 141
    assert all("cuda" in target["refusals"] for target in as_json.values())
    assert "sm 7.5 is older than 8.0" in as_json["t4"]["refusals"]["cuda"]


def test_doctor(run: Run) -> None:
    result = run("doctor")
    assert (result.status, result.err) == (0, "")
    assert "run bundles [plain install]" in result.out
    assert re.search(r"^ok +build bundles \[compile\]", result.out, re.MULTILINE)

    findings = json.loads(run("doctor", "--json").out)
    assert {finding["state"] for finding in findings} <= {"ok", "missing", "absent"}
    for finding in findings:
        assert finding["fix"] in result.out, "whole, to be copied"


# --- errors ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A command that fails. In its arguments, {bundle}, {a}, {b} and {tmp} stand for the files at hand."""

    arguments: str
    status: int
    code: str
    message: str
    fix: str = ""


BUILD_WITH = "build --out {tmp}/x "
MATCH = "match {a} {b} --bundle {bundle} "
FAULTS = [
    Fault("matches", 2, "USAGE", "No such command", "--help"),
    Fault("[red]", 2, "USAGE", "'[red]'"),
    Fault("--verbose", 2, "USAGE", "--verbose"),
    Fault("match {a}", 2, "USAGE", "IMAGE1"),
    Fault("match {a} {b}", 2, "USAGE", "--bundle"),
    Fault("match {a} {b} {a} --bundle {bundle}", 2, "USAGE", "unexpected extra argument"),
    Fault(MATCH + "--subsample 0", 2, "USAGE", "--subsample"),
    Fault(MATCH + "--subsample x", 2, "USAGE", "--subsample"),
    Fault(MATCH + "--border -1", 2, "USAGE", "--border"),
    Fault(MATCH + "--pixel-tol -1", 2, "USAGE", "--pixel-tol"),
    Fault(MATCH + "--exif rotate", 2, "USAGE", "--exif"),
    Fault(MATCH + "--out {tmp}/x.txt", 2, "USAGE", "x.txt: a name that ends in .npz was expected"),
    Fault(MATCH + "--out {tmp}/x", 2, "USAGE", "a name that ends in .npz was expected"),
    Fault(MATCH + "--viz {tmp}/x.gif", 2, "USAGE", "x.gif: a name that ends in .png"),
    Fault(MATCH + "--viz {tmp}/[red].x", 2, "USAGE", "[red].x"),
    Fault(MATCH + "--both-ways --pixel-tol 3", 2, "USAGE", "choose one"),
    Fault(MATCH + "--pixel-tol nan", 2, "USAGE", "'nan' is not a finite number"),
    Fault(MATCH + "--pixel-tol inf", 2, "USAGE", "'inf' is not a finite number"),
    Fault(MATCH + "--subsample 9999999999999999999", 2, "USAGE", "subsample"),
    Fault(MATCH + "--out {tmp}/none/x.npz", 73, "CANNOT_WRITE", "its folder is missing"),
    Fault(MATCH + "--out {tmp}/empty.png/x.npz", 73, "CANNOT_WRITE", "its folder is missing"),
    Fault(MATCH + "--viz {tmp}/none/x.png", 73, "CANNOT_WRITE", "its folder is missing"),
    Fault(MATCH + "--out {tmp}/folder.npz", 73, "CANNOT_WRITE", "folder.npz is a directory"),
    Fault(MATCH + "--out /proc/x.npz", 73, "CANNOT_WRITE", "/proc/x.npz"),
    Fault(MATCH + "--out {tmp}/" + "n" * 300 + ".npz", 73, "CANNOT_WRITE", "File name too long"),
    Fault("match {tmp}/none.png {b} --bundle {bundle}", 66, "INPUT_MISSING", "none.png: No such file"),
    Fault("match {a} {tmp} --bundle {bundle}", 66, "INPUT_MISSING", "Is a directory"),
    Fault("match {tmp}/empty.png {b} --bundle {bundle}", 65, "BAD_IMAGE", "empty.png: not an image that Pillow can read (0 bytes)"),
    Fault("match {a} {tmp}/cut.png --bundle {bundle}", 65, "BAD_IMAGE", "cut.png: damaged"),
    Fault("match {a} {tmp}/long.png --bundle {bundle}", 65, "BAD_IMAGE", "aspect ratio of 10000x1", "at most 33:1"),
    Fault("match {a} {b} --bundle {tmp}/none", 66, "INPUT_MISSING", "No such file", "smc build"),
    Fault("match {a} {b} --bundle {a}", 66, "INPUT_MISSING", "a bundle is a directory"),
    Fault("match {a} {b} --bundle {tmp}", 66, "INPUT_MISSING", "manifest.json is missing"),
    Fault("match {a} {b} --bundle {tmp}/damaged", 76, "BUNDLE_DAMAGED", "encoder.onnx", "build the bundle again"),
    Fault("match {a} {b} --bundle {tmp}/newer", 77, "BUNDLE_MISMATCH", "bundle format 99", "upgrade"),
    Fault("inspect", 2, "USAGE", "BUNDLE"),
    Fault("inspect {tmp}/none", 66, "INPUT_MISSING", "No such file"),
    Fault("inspect {tmp}/damaged --json", 76, "BUNDLE_DAMAGED", "encoder.onnx"),
    Fault("verify {tmp}/damaged", 76, "BUNDLE_DAMAGED", "encoder.onnx"),
    Fault("verify {bundle} --pair {a}", 2, "USAGE", "--pair"),
    Fault("verify {bundle} --pair {a} {tmp}/cut.png", 65, "BAD_IMAGE", "cut.png"),
    Fault(BUILD_WITH + "--random-weights 0", 2, "USAGE", "--gpu"),
    Fault(BUILD_WITH + "--gpu cpu", 2, "USAGE", "a checkpoint, random weights and ONNX files", "--random-weights SEED"),
    Fault(BUILD_WITH + "--gpu tpu --random-weights 0", 2, "USAGE", "unknown target 'tpu'", "smc targets"),
    Fault(BUILD_WITH + "--gpu v100 --random-weights 0", 69, "NO_TARGET", "sm 7.0 is no longer supported", "smc targets"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights x", 2, "USAGE", "'x' is not a valid integer"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --shape 512", 2, "USAGE", "'512' is not WIDTHxHEIGHT"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --shape 512x", 2, "USAGE", "is not WIDTHxHEIGHT"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --shape -512x384", 2, "USAGE", "is not WIDTHxHEIGHT"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --shape 500x384", 2, "USAGE", "500x384: both sides must be multiples of 16"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --model {tmp}/none.json", 65, "BAD_INPUT", "none.json"),
    Fault(BUILD_WITH + "--gpu cpu --checkpoint {tmp}/none.pth", 66, "INPUT_MISSING", "none.pth"),
    Fault(BUILD_WITH + "--gpu cpu --checkpoint {tmp}/empty.png", 65, "BAD_CHECKPOINT", "0 bytes"),
    Fault(BUILD_WITH + "--gpu t4 --random-weights 0 --backend cuda", 69, "NO_TARGET", "cuda: sm 7.5 is older than 8.0", "smc targets"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --backend cuda", 69, "NO_TARGET", "cuda: runs on NVIDIA GPUs only"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --tuning {a}", 2, "USAGE", "take no tuning file", "leave them out"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --kernels {tmp}", 2, "USAGE", "no kernels", "leave them out"),
    Fault(BUILD_WITH + "--gpu h200 --random-weights 0 --backend cuda --kernels {tmp}/none", 66, "INPUT_MISSING", "none: No such file"),
    Fault(BUILD_WITH + "--gpu h200 --random-weights 0 --backend cuda --kernels {a}", 66, "INPUT_MISSING", "Not a directory"),
    Fault(BUILD_WITH + "--gpu cpu --random-weights 0 --max-batch 2", 2, "USAGE", "any number of pairs", "leave out --max-batch"),
    *[
        Fault(f"tune {arguments}", 2, "USAGE", "in one go, or in two steps", "smc tune BUNDLE --out FILE")
        for arguments in (
            "",
            "{bundle}",
            "--out {tmp}/x.json",
            "{bundle} --prepare {tmp}/x --out {tmp}/x.json",
            "{bundle} --candidates {tmp}/x --out {tmp}/x.json",
            "--candidates {tmp}/x",
            "--candidates {tmp}/x --prepare {tmp}/y",
        )
    ],
    Fault("tune {bundle} --out {tmp}/x.json", 2, "USAGE", "is a onnxruntime plan, which has nothing to tune", "--backend cuda"),
    Fault("tune {bundle} --out {tmp}/x.txt", 2, "USAGE", "ends in .json"),
    Fault("tune {bundle} --out {tmp}/none/x.json", 73, "CANNOT_WRITE", "its folder is missing"),
    Fault("tune {tmp}/none --prepare {tmp}/x", 66, "INPUT_MISSING", "No such file"),
    Fault("tune --candidates {tmp} --out {tmp}/x.json", 65, "BAD_INPUT", "no candidates that can be timed", "--prepare"),
    Fault("build --gpu cpu --random-weights 0 --out {tmp}", 73, "CANNOT_WRITE", "holds files and is no bundle"),
    Fault("build --gpu cpu --random-weights 0 --out {a}", 73, "CANNOT_WRITE", "is not a directory"),
]


@pytest.fixture(scope="module")
def workplace(module_tmp_path: Path, tiny_bundle: Path, examples: Path) -> Path:
    """A folder of faulty things."""
    folder = module_tmp_path
    (folder / "empty.png").write_bytes(b"")
    (folder / "cut.png").write_bytes((examples / "graf1.png").read_bytes()[:9999])
    (folder / "folder.npz").mkdir()
    Image.new("L", (10_000, 1)).save(folder / "long.png")
    shutil.copytree(tiny_bundle, folder / "damaged")
    graph = bytearray((tiny_bundle / "encoder.onnx").read_bytes())
    graph[-1] ^= 1
    (folder / "damaged" / "encoder.onnx").write_bytes(graph)
    (folder / "newer").mkdir()
    current = decode_manifest((tiny_bundle / "manifest.json").read_bytes())
    (folder / "newer" / "manifest.json").write_bytes(encode_manifest(msgspec.structs.replace(current, format=99)))
    return folder


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.arguments[:90])
def test_errors(run: Run, workplace: Path, tiny_bundle: Path, pair: tuple[Path, Path], fault: Fault) -> None:
    before = sorted(workplace.rglob("*"))
    words = [word.format(bundle=tiny_bundle, a=pair[0], b=pair[1], tmp=workplace) for word in fault.arguments.split()]
    run(*words).check_error(fault.status, fault.code, fault.message, fault.fix)
    left = set(workplace.rglob("*")) - set(before)
    assert all(path.suffix == ".lock" for path in left)


@pytest.mark.parametrize(
    ("arguments", "status", "code"),
    [
        (["--nonsense"], 2, "USAGE"),
        (["inspect", "none"], 66, "INPUT_MISSING"),
        (["build", "--gpu", "v100", "--random-weights", "0", "--out", "x"], 69, "NO_TARGET"),
    ],
)
def test_errors_of_the_command_itself(arguments: list[str], status: int, code: str, tmp_path: Path) -> None:
    run_apart(*arguments, cwd=tmp_path).check_error(status, code, "")
    assert list(tmp_path.iterdir()) == []


def test_help_and_version(run: Run) -> None:
    assert run("--version").out.startswith("smc, version ")
    for arguments in (["--help"], ["-h"], *([name, "--help"] for name in cli.cli.commands)):
        result = run(*arguments)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith("Usage: smc")
    bare = run()
    assert (bare.status, bare.out) == (2, "")
    assert bare.err.startswith("Usage: smc")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "secret.png").touch(mode=0)
    run("match", tmp_path / "secret.png", pair[1], "--bundle", tiny_bundle).check_error(66, "INPUT_MISSING", "Permission denied")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_match_into_a_read_only_folder(run: Run, tiny_bundle: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    run("match", *pair, "--bundle", tiny_bundle, "--out", tmp_path / "x.npz").check_error(73, "CANNOT_WRITE", "read-only")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("option", "name"), [("--out", "x.npz"), ("--viz", "x.png"), ("--viz", "x.jpg"), ("--viz", "x.webp")])
def test_a_full_disk_leaves_the_older_output(
    run: Run, tiny_bundle: Path, pair: tuple[Path, Path], option: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(b"old")
    with file_size_limit(1000):
        result = run("match", *pair, "--bundle", tiny_bundle, option, tmp_path / name)
    result.check_error(74, "DISK_ERROR", f"{tmp_path / name}: File too large")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(name, b"old")]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("name", "width"), [("x.webp", 9000), ("x.jpg", 33_000)])
def test_a_picture_too_large_for_its_format(run: Run, tiny_bundle: Path, name: str, width: int, tmp_path: Path) -> None:
    Image.new("L", (width, width // 30)).save(tmp_path / "wide.png")
    result = run("match", tmp_path / "wide.png", tmp_path / "wide.png", "--bundle", tiny_bundle, "--viz", tmp_path / name)
    result.check_error(73, "CANNOT_WRITE", f"{2 * width + 8}x{width // 30} does not go into", "take .png")
    assert [path.name for path in tmp_path.iterdir()] == ["wide.png"]


# --- bugs, memory, signals, pipes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "last"),
    [
        (RuntimeError("[red]what"), 1, "smc: error[INTERNAL]: RuntimeError: [red]what"),
        (OSError(5, "Input/output error"), 1, "smc: error[INTERNAL]: OSError: [Errno 5] Input/output error"),
        (OSError(28, "No space left on device"), 74, "smc: error[DISK_ERROR]: [Errno 28] No space left on device"),
        (MemoryError(), 75, "smc: error[OUT_OF_MEMORY]: not enough memory"),
        (smc.Busy("a\nb", fix="c\nd"), 75, r"smc: error[BUSY]: a\nb"),
        (smc.BackendFailed("[/]"), 70, "smc: error[BACKEND_FAILED]: [/]"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_whatever_goes_wrong(run: Run, error: BaseException, status: int, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(match, "match_files", fail)
    result = run("match", "a", "b", "--bundle", "c")
    assert (result.status, result.out) == (status, "")
    assert [line for line in result.err.splitlines() if line.startswith("smc: error")] == ([last] if last else [])
    assert ("Traceback" in result.err) == (status == 1)
    assert ("report it" in result.err) == (status == 1)


INTERRUPTED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from smc.compiler import cli, match
def interrupt(*arguments, **options):
    os.kill(os.getpid(), signal.{signal})
    while True: pass
match.match_files = interrupt
cli.main(["match", "a", "b", "--bundle", "c"])
"""


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_signals(name: str, status: int) -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.replace("{signal}", name)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.parametrize("arguments", [["targets"], ["targets", "--json"], ["--help"]])
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SMC, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_an_error_into_a_closed_pipe_keeps_its_status() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*SMC, "nonsense"], stderr=writer, stdout=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stdout) == (2, b"")


PRINTS_A_NAME = """
import numpy as np
from types import SimpleNamespace
from smc.compiler import cli, match
from smc.exported.matcher import Matches
none = np.empty((0, 2), np.float32)
manifest = SimpleNamespace(random_weights=False)
result = SimpleNamespace(matches=Matches(none, none, none[:, 0], (1, 1), (1, 1), "apply"), seconds={}, manifest=manifest, plane=None)
match.match_files = lambda *arguments, **options: result
cli.main(["match", "gr\\u00f6\\u00dfe\\u6df1", "b", "--bundle", "c"])
"""


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", r"gr\xf6\xdfe\u6df1"), ("latin-1", r"größe\u6df1"), ("utf-8", "größe深")])
def test_names_are_printed_in_any_encoding(encoding: str, shown: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", PRINTS_A_NAME], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert f"image 0  {shown}, 1x1".encode(encoding) in done.stdout


def test_a_closed_stdout_is_no_error() -> None:
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *SMC, "targets"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("command", ["targets", "inspect", "doctor", "build"])
def test_a_plain_installation_lists_inspects_and_says_what_building_needs(tiny_bundle: Path, tmp_path: Path, command: str) -> None:
    """Without the packages of the extra `compile`."""
    words = {
        "inspect": ["inspect", str(tiny_bundle)],
        "build": ["build", "--gpu", "cpu", "--random-weights", "0", "--out", str(tmp_path / "out")],
    }.get(command, [command])
    script = (
        "import importlib.abc, sys\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in 'torch onnx onnxscript onnx_ir onnx_graphsurgeon safetensors platformdirs'.split():\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        f"from smc.compiler.cli import main; main({words!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    if command == "build":
        assert done.returncode == 69
        assert "building needs torch, onnx" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
