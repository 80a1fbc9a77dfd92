"""Whole builds that are interrupted, killed, wrong, or raced by another; and the command line's way out of each."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir
import pytest

import smc.compiler.export
from smc.compiler import cli
from smc.compiler.build import BuildRequest, BuildResult, build
from smc.compiler.checkpoint import random_weights
from smc.compiler.config import resolve_config
from smc.compiler.source import CheckpointSource
from smc.exported.bundle import open_bundle, read_manifest
from smc.exported.engines.onnxruntime import OnnxRuntimeEngine
from smc.exported.errors import AccuracyFailed, BackendFailed, Busy, DiskError
from tests.bundles import leftovers, locked
from tests.conformance import DATA
from tests.conftest import TINY_SHAPES

CONFIG = DATA / "tiny_landscape.config.json"
ONE_SHAPE = TINY_SHAPES[:1]
MAIN = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom smc.compiler.cli import main; main()"
"""The command line, in a child whose parent may ignore SIGINT."""


def wanted(out: Path, **changes: Any) -> BuildRequest:
    """What `tiny_bundle` was built with."""
    return BuildRequest(**{"gpu": "cpu", "out": out, "random_seed": 0, "model": str(CONFIG), "shapes": TINY_SHAPES, **changes})


def arguments(out: Path, *more: str) -> list[str]:
    """The same, on the command line."""
    shapes = [argument for height, width in TINY_SHAPES for argument in ("--shape", f"{width}x{height}")]
    return ["build", "--gpu", "cpu", "--random-weights", "0", "--model", str(CONFIG), *shapes, "--out", str(out), *more]


@pytest.fixture(scope="module")
def out(tiny_bundle: Path, module_tmp_path: Path) -> Path:
    """An old bundle, up to date. Every test leaves it, or a new one, in its place, and nothing beside it."""
    return shutil.copytree(tiny_bundle, module_tmp_path / "bundle")


@pytest.fixture
def exported(tiny_graphs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a build the export, most of its time: the graphs are taken from the tiny bundle."""
    for file in tiny_graphs:
        monkeypatch.setattr(smc.compiler.export, f"export_{file.stem}", lambda model, file=file: onnx_ir.load(file))


def identity(bundle: Path) -> dict[str, tuple[int, int, int]]:
    """Which files a bundle consists of."""
    stats = {path.name: path.stat() for path in bundle.iterdir()}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def run_main(*arguments: str) -> int:
    """Run the command line in this process; returns its exit status."""
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    signal.signal(signal.SIGTERM, handler)
    return int(caught.value.code or 0)


@contextmanager
def running(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace"
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    """Read the progress up to a line."""
    assert process.stderr is not None
    assert any(line in text for text in process.stderr), "it ended before"


# Interrupted


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_an_interrupted_build_leaves_the_old_bundle(out: Path, number: signal.Signals, status: int) -> None:
    before = identity(out)
    with running(*arguments(out, "--force")) as process:
        wait_for(process, "exporting the encoder")
        (staging,) = leftovers(out)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in errors
    assert leftovers(out) == ([staging] if number == signal.SIGKILL else [])
    assert identity(out) == before
    assert build(wanted(out)).reused, "the old bundle is whole and the lock is free"
    assert not leftovers(out), "swept"


def test_a_build_that_waits_can_be_interrupted(out: Path) -> None:
    with locked(out), running(*arguments(out)) as process:
        wait_for(process, "waiting for another build of bundle")
        process.terminate()
        assert process.wait() == 143
    assert not leftovers(out)


# Failed


@pytest.mark.parametrize(("factor", "error"), [(1.001, r"0\.001"), (np.nan, r"1e\+30")])
def test_a_plan_that_is_wrong_is_not_kept(out: Path, exported: None, monkeypatch: pytest.MonkeyPatch, factor: float, error: str) -> None:
    decode = OnnxRuntimeEngine.decode

    def perturbed(self: OnnxRuntimeEngine, *features: Any) -> dict[str, Any]:
        maps = decode(self, *features)
        maps["conf2"] = maps["conf2"] * np.float32(factor)
        return maps

    monkeypatch.setattr(OnnxRuntimeEngine, "decode", perturbed)
    before = identity(out)
    with pytest.raises(AccuracyFailed, match=f"conf2 at 128x96 with 128x96: relative error {error}, allowed 2e-05") as caught:
        build(wanted(out, shapes=ONE_SHAPE))
    assert caught.value.exit_status == 78
    assert identity(out) == before
    assert leftovers(out) == []


def test_failures_on_the_way_leave_the_old_bundle(out: Path, exported: None) -> None:
    before = identity(out)
    for place, failure, expected in (
        ("smc.compiler.export.export_decoder", BackendFailed("no"), BackendFailed),
        ("onnx_ir.save", OSError(errno.ENOSPC, "No space left on device"), DiskError),
        ("smc.compiler.verify.check", KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with mock.patch(place, side_effect=failure), pytest.raises(expected):
            build(wanted(out, shapes=ONE_SHAPE))
        assert identity(out) == before
        assert leftovers(out) == []


# Built again, or at once


def test_force_builds_again(out: Path, exported: None) -> None:
    before, key = identity(out), read_manifest(out).build_key
    assert build(wanted(out)).reused
    assert identity(out) == before
    result = build(wanted(out, force=True))
    assert not result.reused
    assert not set(identity(out).values()) & set(before.values())
    assert read_manifest(out).build_key == key
    assert leftovers(out) == []


def test_a_damaged_bundle_is_built_again(out: Path, exported: None) -> None:
    (out / "encoder.onnx").write_bytes(b"damage")
    assert not build(wanted(out)).reused
    open_bundle(out)


def test_of_two_builds_one_waits_and_reuses(tmp_path: Path, exported: None) -> None:
    out = tmp_path / "bundle"
    results: list[BuildResult] = []
    reports: list[str] = []

    def run() -> None:
        results.append(build(wanted(out), lambda description, fraction: reports.append(description)))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.reused for result in results) == [False, True]
    assert reports.count("waiting for another build of bundle") == 1
    assert reports.count("exporting the encoder") == 1
    open_bundle(out)
    shutil.rmtree(out)


def test_no_wait(out: Path) -> None:
    with locked(out), pytest.raises(Busy) as caught:
        build(wanted(out, wait=False))
    assert caught.value.exit_status == 75


# The command line's streams


def squeezed(text: str) -> str:
    """Without line breaks, and newlines that are printed as such."""
    return "".join(text.replace("\\n", "").split())


@pytest.mark.parametrize("name", ["[bold]:smile:[", "two\nlines", "größe 🙂", os.fsdecode(b"\xff")], ids=ascii)
def test_names_are_printed_as_they_are(out: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest, name: str) -> None:
    place = out.parent / "[" / "]"  # with the separator, the end of markup
    place.mkdir(parents=True)
    named = out.rename(place / name)

    def put_back() -> None:
        named.rename(out)
        shutil.rmtree(place.parent)

    request.addfinalizer(put_back)
    assert run_main(*arguments(named)) == 0
    captured = capsys.readouterr()
    name_alone = squeezed(str(named).encode(errors="backslashreplace").decode())
    assert name_alone in squeezed(captured.out)
    with locked(named):
        assert run_main(*arguments(named, "--no-wait")) == 75
    assert name_alone in squeezed(capsys.readouterr().err)


def test_a_checkpoint_whose_name_is_not_unicode(
    tmp_path: Path, exported: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(resolve_config(str(CONFIG)), 0)
    named = dataclasses.replace(weights, source=os.fsdecode(b"model\xff.pth"))
    monkeypatch.setattr("smc.compiler.build._open_source", lambda request: CheckpointSource(named))
    out = tmp_path / "bundle"
    build(wanted(out, shapes=ONE_SHAPE))
    assert run_main("inspect", str(out)) == 0
    assert run_main("inspect", "--json", str(out)) == 0
    shutil.rmtree(out)
    assert capsys.readouterr().out.count("model?.pth") == 2


@pytest.mark.parametrize("command", [["targets"], ["targets", "--json"], ["--help"]], ids=" ".join)
@pytest.mark.parametrize(("stdout", "status"), [("gone", 141), ("full", 74), ("closed", 0)])
def test_a_stdout_that_takes_nothing(command: list[str], stdout: str, status: int) -> None:
    reader, gone = os.pipe()
    os.close(reader)
    with os.fdopen(gone) as writer, Path("/dev/full").open("wb") as full:
        close = ["sh", "-c", 'exec "$@" >&-', "sh"] if stdout == "closed" else []
        run = subprocess.run(
            [*close, sys.executable, "-c", MAIN, *command], stdout=full if stdout == "full" else writer, stderr=subprocess.PIPE, text=True
        )
    assert run.returncode == status
    assert "Traceback" not in run.stderr
    assert status == 74 or not run.stderr
