"""`smc bench`: what it measures, how it reports, and that one contestant's failure is not another's."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console

import smc
from smc.compiler.bench import measure_engine, processes, records, run, sampling, tables
from smc.compiler.bench.ablation import ladder, steps
from smc.compiler.bench.inputs import image_pairs, image_size, view_pairs
from smc.compiler.bench.records import Accuracy, Clock, Contestant, Figure, Memory, Report, Result, Timing
from smc.compiler.bench.references import check_accuracy
from smc.compiler.bench.run import BenchRequest, bench
from smc.compiler.bench.tasks import PlanTask, TorchTask, Work
from smc.compiler.bench.torch_matching import block_search, pixel_confidence, reciprocal_matches
from smc.compiler.output_files import check_output, replacing
from smc.exported.engines import Maps, load_engine
from smc.exported.errors import CannotWrite, UsageError
from smc.exported.matching import match_confidence

SHAPE = (96, 128)
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}


def figure(seconds: float) -> Figure:
    return Figure(seconds, seconds, seconds, 3)


def contestant(name: str, role: Any, seconds: dict[tuple[Clock, str], float], failure: str = "", batch: int = 1) -> Contestant:
    timings = [Timing(SHAPE, batch, clock, stage, figure(value)) for (clock, stage), value in seconds.items()]
    return Contestant(name=name, title=f"the {name}", role=role, result=Result(timings=timings, failure=failure))


# --- times --------------------------------------------------------------------------------------------------------------------


def test_a_figure_leaves_out_the_warm_up() -> None:
    times = iter([9.0] * sampling.WARM_UP + [1.0, 3.0, 2.0, 8.0, 2.5])
    assert sampling.sample(lambda: next(times), 5) == Figure(median=2.5, min=1.0, max=8.0, count=5)


def test_sampling_ends_when_it_has_taken_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PATIENCE", 0.0)
    assert sampling.sample(lambda: 1.0, 100).count == sampling.FEWEST


def test_the_wall_clock_waits_for_the_device() -> None:
    calls: list[str] = []
    seconds = sampling.wall(lambda: calls.append("run"), lambda: calls.append("wait"))()
    assert calls == ["wait", "run", "wait"]
    assert seconds >= 0


# --- inputs -------------------------------------------------------------------------------------------------------------------


def test_images_are_random_alike_for_a_seed_and_have_to_be_resized() -> None:
    (first,), (again,), (other,) = (image_pairs(seed, SHAPE, 1) for seed in (1, 1, 2))
    assert image_size(SHAPE) == (120, 160)
    assert first[0].shape == (120, 160, 3)
    assert first[0].dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert (first[0] != other[0]).mean() > 0.9
    ((view0, view1),) = view_pairs([first], SHAPE)
    assert view0.framing.shape == view1.framing.shape == SHAPE
    assert view0.framing.resized_size == (128, 96)


def test_both_images_of_a_pair_show_one_scene() -> None:
    ((first, second),) = image_pairs(0, (384, 512), 1)
    same, shifted = (np.corrcoef(first[:, 12:].ravel(), b.ravel())[0, 1] for b in (second[:, 12:], second[:, :-12]))
    assert shifted > 0.9
    assert shifted > same
    assert first.std() > 30


# --- the original's matching --------------------------------------------------------------------------------------------------


def descriptors(seed: int, noise: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two maps of different sizes, whose descriptors are noisy copies of each other's."""
    random = np.random.default_rng(seed)
    field = random.standard_normal((40, 56, 8))
    maps = [part + noise * random.standard_normal(part.shape) for part in (field, field[:32, 5:])]
    first, second = ((m / np.linalg.norm(m, axis=-1, keepdims=True)).astype(np.float32) for m in maps)
    return first, second


@pytest.mark.parametrize("block", [64, 1000, 1 << 13])
def test_block_search_finds_the_nearest_both_ways(block: int) -> None:
    first, second = (torch.from_numpy(m.reshape(-1, 8)) for m in descriptors(0, 0.3))
    forth, back = block_search(first, second, block)
    scores = first.double() @ second.double().T
    assert (forth == scores.argmax(dim=1)).all()
    assert (back == scores.argmax(dim=0)).all()


@pytest.mark.parametrize(("noise", "subsample"), [(0.0, 8), (0.2, 4), (1.0, 3)])
def test_the_original_matching_gives_our_matches(noise: float, subsample: int) -> None:
    desc1, desc2 = descriptors(1, noise)
    wanted = smc.fast_reciprocal_nn(desc1, desc2, subsample)
    found = reciprocal_matches(torch.from_numpy(desc1), torch.from_numpy(desc2), subsample, block=500)
    assert len(wanted[0]) > 10
    for ours, theirs in zip(wanted, found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    conf1, conf2 = (np.random.default_rng(2).random(desc.shape[:2], np.float32) for desc in (desc1, desc2))
    confidence = pixel_confidence(*found, torch.from_numpy(conf1), torch.from_numpy(conf2))
    np.testing.assert_array_equal(confidence, match_confidence(*wanted, conf1, conf2))


# --- errors -------------------------------------------------------------------------------------------------------------------


def test_outputs_are_compared_with_what_was_recorded(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    maps = {name: random.standard_normal((2, *SHAPE, 3)).astype(np.float32) for name in ("pts3d1", "desc1", "desc2")}
    work = Work([SHAPE], [1, 2], seed=0, repeat=3, references=str(tmp_path), record=True)
    assert check_accuracy(work, SHAPE, 1, {name: value[:1] for name, value in maps.items()}) == []
    assert check_accuracy(work, SHAPE, 2, maps) == []

    work = msgspec.structs.replace(work, record=False)
    (same,) = check_accuracy(work, SHAPE, 1, maps)
    assert same.worst == 0
    assert same.overlap == 1
    assert same.matches == same.matches_reference
    (second,) = check_accuracy(work, SHAPE, 2, {name: value * np.float32(1.01) for name, value in maps.items()})
    assert second.worst == pytest.approx(0.01, rel=1e-3)
    assert second.overlap is None
    maps["pts3d1"][0, 5, 5, 0] = np.nan
    (broken,) = check_accuracy(work, SHAPE, 1, maps)
    assert broken.worst > 1e29


def test_without_references_nothing_is_compared(tmp_path: Path) -> None:
    work = Work([SHAPE], [1], seed=0, repeat=3, references=None)
    assert check_accuracy(work, SHAPE, 1, {}) == []
    assert check_accuracy(msgspec.structs.replace(work, references=str(tmp_path)), SHAPE, 1, {}) == []  # its process had failed


# --- engines with parts that can be timed -------------------------------------------------------------------------------------


@dataclasses.dataclass
class FakeSection:
    name: str
    log: list[str]

    def replay(self, count: int) -> float:
        self.log.append(f"{self.name} x {count}")
        seconds = {"encoder": 0.5, "decoder": 0.75, "decoder/decoders": 0.625, "decoder/heads": 0.25, "describer": 0.6875, "matcher": 0.125}
        return (seconds | {"copy": 0.0625})[self.name]


class FakeEngine:
    """An engine as the one for GPUs is: it matches by itself, and has sections."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.log = engine, list[str]()

    def encode(self, images: NDArray[Any]) -> Any:
        self.log.append(f"encode {len(images)}")
        return self.engine.encode(images)

    def decode(self, features1: Any, features2: Any) -> Maps:
        self.log.append(f"decode {len(features1)}")
        return self.engine.decode(features1, features2)

    def encode_image(self, image: Any) -> Any:
        raise NotImplementedError

    def match_images(self, image1: Any, image2: Any, request: Any) -> Any:
        raise NotImplementedError

    def match_features(self, features1: Any, features2: Any, request: Any) -> Any:
        raise NotImplementedError

    def sections(self, batch: int, shape: tuple[int, int]) -> Sequence[FakeSection]:
        names = ("encoder", "decoder", "decoder/decoders", "decoder/heads")
        return [FakeSection(name, self.log) for name in (*names, *(("describer", "matcher", "copy") if batch == 1 else ()))]

    def memory_bytes(self) -> int:
        return 123


@pytest.fixture(scope="module")
def fake(tiny_bundle: Path) -> tuple[FakeEngine, Result]:
    """The tiny bundle's engine with sections, and what was measured of it in batches of 1 and 2."""
    engines: list[FakeEngine] = []

    def load_fake(bundle: Any) -> FakeEngine:
        engines.append(FakeEngine(load_engine(bundle)))
        return engines[-1]

    class Matcher:
        def __init__(self, engine: FakeEngine, manifest: Any) -> None:
            self.engine, self.manifest = engine, manifest

        def match(self, image0: NDArray[np.uint8], image1: NDArray[np.uint8]) -> None:
            assert self.manifest.input_shapes == [SHAPE]
            assert image0.shape == image1.shape == (*image_size(SHAPE), 3)
            self.engine.log.append("match")

    result = Result()
    work = Work([SHAPE], [1, 2], seed=3, repeat=3, references=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_engine, "load_engine", load_fake)
        patch.setattr(measure_engine, "Matcher", Matcher)
        patch.setattr(sampling, "WARM_UP", 1)
        measure_engine.measure_plan(PlanTask(str(tiny_bundle), work), result, lambda: None)
    return engines[0], result


def test_sections_are_timed_on_the_device_after_a_real_run(fake: tuple[FakeEngine, Result]) -> None:
    engine, result = fake
    measured = Contestant("plan", "plan", "subject", result)
    assert measured.stages(SHAPE, 1, "device") == {
        "encoder": 0.5, "decoders and heads": 0.75, "decoders": 0.625, "heads": 0.25, "decoders and descriptors": 0.6875,
        "matching": 0.125, "copy": 0.0625,
    }  # fmt: skip
    assert measured.network(SHAPE, 1, "device") == 1.25
    assert [memory.engine for memory in result.memory] == [123, 123]
    wanted = {"encoder": "encode 2", "decoder": "decode 1", "decoder/heads": "decode 1", "describer": "match", "matcher": "match"}
    assert {name: engine.log[engine.log.index(f"{name} x {sampling.RUNS}") - 1] for name in wanted} == wanted


def test_what_matches_on_the_device_is_not_matched_on_the_host(fake: tuple[FakeEngine, Result]) -> None:
    _, result = fake
    for batch in (1, 2):
        wall = {timing.stage for timing in result.timings if timing.clock == "wall" and timing.batch == batch}
        assert wall == {"image in", "encoder", "decoders and heads", "matches out", "end to end"}


# --- processes ----------------------------------------------------------------------------------------------------------------


def test_a_process_that_takes_too_long_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slow.py").write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    start = time.monotonic()
    assert processes._run(["slow"], tmp_path, 3.0) == ("", "stopped after 3 seconds")
    assert time.monotonic() - start < 30
    state = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_failed_process_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "fails.py").write_text("raise SystemExit('no luck')")
    (tmp_path / "dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert processes._run(["fails"], tmp_path, 60)[1] == "exit status 1: no luck"
    assert processes._run(["dies"], tmp_path, 60)[1].startswith("signal 11")


def test_a_library_that_raises_is_that_contestants_result(tmp_path: Path) -> None:
    work = Work([SHAPE], [1], seed=0, repeat=3, references=None)
    result = processes.run_task(TorchTask({}, str(tmp_path / "none.pt"), "eager-float32", work, "cpu"), tmp_path, 120)
    assert result.failure
    assert result.timings == []


# --- the ladder ---------------------------------------------------------------------------------------------------------------


def test_the_ladder_takes_each_step_from_its_contestant() -> None:
    torch_times: dict[tuple[Clock, str], float] = {
        ("wall", "encoder"): 9.0, ("wall", "decoders"): 9.0, ("wall", "heads"): 9.0, ("wall", "matching"): 4.0,
        ("device", "encoder"): 1.0, ("device", "decoders"): 2.0, ("device", "heads"): 3.0,
    }  # fmt: skip
    plan_times: dict[tuple[Clock, str], float] = {
        ("wall", "encoder"): 9.0, ("wall", "decoders and heads"): 9.0, ("wall", "block matching"): 4.0,
        ("device", "encoder"): 0.5, ("device", "decoders and heads"): 1.0, ("device", "decoders"): 0.75, ("device", "heads"): 0.5,
        ("device", "matching"): 0.125,
    }  # fmt: skip
    found = {
        "eager-float32": contestant("eager-float32", "peer", torch_times),
        "eager-float32-flash": contestant("eager-float32-flash", "ablation", {}, failure="out of memory"),
        "plan-fp32": contestant("plan-fp32", "ablation", plan_times),
    }
    rungs = ladder(steps("plan-fp32", "plan"), found, SHAPE, {"plan": "not built"})
    by_name = {rung.technique: rung for rung in rungs}
    assert [rung.technique for rung in rungs] == [
        "original, TF32 as shipped", "original, strict float32", "+ FlashMatch", "+ GraphFusion", "+ FastNN-Lite", "+ HybridCast",
    ]  # fmt: skip
    original = by_name["original, strict float32"]
    assert original.seconds == {"encoder": 1.0, "decoders": 2.0, "heads": 3.0, "matching": 4.0}
    assert original.clocks == {"encoder": "device", "decoders": "device", "heads": "device", "matching": "wall"}
    assert original.total == 10.0
    assert by_name["+ GraphFusion"].seconds == {"encoder": 0.5, "decoders and heads": 1.0, "matching": 4.0}, "heads run beside"
    assert by_name["+ FastNN-Lite"].total == 0.5 + 1.0 + 0.125
    assert (by_name["+ FlashMatch"].total, by_name["+ FlashMatch"].why_not) == (None, "out of memory")
    assert by_name["+ HybridCast"].why_not == "not built"
    assert by_name["original, TF32 as shipped"].why_not == "not measured"


# --- reports ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def report() -> Report:
    """One with something in every part."""
    times: dict[tuple[Clock, str], float] = {
        ("wall", "image in"): 0.001, ("wall", "encoder"): 0.0023, ("wall", "decoders and heads"): 0.0045, ("wall", "end to end"): 0.0123,
        ("device", "encoder"): 0.002, ("device", "decoders and heads"): 0.003, ("device", "decoders"): 0.0024, ("device", "heads"): 0.0011,
        ("device", "matching"): 0.0005,
    }  # fmt: skip
    plan = contestant("plan", "subject", times)
    plan.result.timings += contestant(
        "plan", "subject", {("device", "encoder"): 0.003, ("device", "decoders and heads"): 0.005}, "", 2
    ).result.timings
    plan.result.accuracy = [Accuracy(SHAPE, 1, {"conf1": 1e-3, "desc2": 0.5}, 9, 10, 0.875)]
    plan.result.memory = [Memory(SHAPE, 1, 2_500_000_000, None, 900_000_000)]
    plan.load = {"load": figure(0.75), "process start to first result": figure(1.5)}
    peer = contestant("eager-float32", "peer", {("wall", "encoder"): 1.0, ("wall", "decoders"): 2.0, ("wall", "heads"): 0.5})
    failed = contestant("compile", "peer", {}, failure="stopped after 900 seconds")
    return Report(
        schema=records.SCHEMA, created="2026-11-21T12:00:00+00:00", command=["smc", "bench"],
        machine={"processor": "a CPU", "gpu": "a GPU"}, versions={"python": "3.11"},
        bundle={"target": "h200", "tolerance": 1e-2, "random_weights": True},
        settings={"shapes": [SHAPE], "batches": [1, 2]}, contestants=[plan, peer, failed],
        ablation=ladder(steps("plan", "plan"), {"plan": plan, "eager-float32": peer}, SHAPE, {}),
    )  # fmt: skip


def test_tables_show_medians_errors_and_failures(report: Report) -> None:
    console = Console(width=400, record=True, file=io.StringIO())
    for table in tables.tables(report):
        console.print(table)
    text = console.export_text()
    device = next(line for line in text.partition("GPU's events")[2].splitlines() if line.startswith("the plan"))
    assert device.split()[2:] == ["2.00", "2.40", "1.10", "3.00", "0.50", "5.00"]  # the network has the two as one
    assert "5.0e-01, allowed 1e-02" in text
    assert "0.875 of 10" in text
    assert "2,500" in text
    assert "stopped after 900 seconds" in text
    batches = next(line for line in text.partition("ms a pair")[2].splitlines() if line.startswith("the plan"))
    assert batches.split()[2:4] == ["5.00", "4.00"]


def test_a_report_is_read_back_as_it_was_written(report: Report) -> None:
    read = msgspec.json.decode(msgspec.json.encode(report), type=Report)
    assert read.subject.result == report.subject.result
    assert json.loads(msgspec.json.encode(read)) == json.loads(msgspec.json.encode(report))


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_a_plot_is_drawn(report: Report, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    from smc.compiler.bench.plot import draw

    draw(report, tmp_path / f"plot.{ending}")
    start = (tmp_path / f"plot.{ending}").read_bytes()[:5]
    assert start in (b"\x89PNG\r", b"<?xml")


def test_output_files_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.json"):
        check_output(tmp_path / "a.txt", "--json", (".json",))
    with pytest.raises(CannotWrite, match="folder is missing"):
        check_output(tmp_path / "none" / "a.json", "--json", (".json",))
    (tmp_path / "b.json").mkdir()
    with pytest.raises(CannotWrite, match="is a directory"):
        check_output(tmp_path / "b.json", "--json", (".json",))
    with replacing(tmp_path / "a.json") as file:
        file.write_text("x")
    assert (tmp_path / "a.json").read_text() == "x"

    def fail() -> None:
        with replacing(tmp_path / "a.json") as file:
            file.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(smc.DiskError):
        fail()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    assert (tmp_path / "a.json").read_text() == "x"


# --- requests -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shapes": [(512, 512)]}, "not built for 512x512; it takes 128x96"),
        ({"batches": [0]}, "1 to 64 pairs"),
        ({"only": ["jax"]}, "unknown peer jax, known: eager-float32"),
        ({"repeat": 2}, "too few for a median"),
        ({"checkpoint": Path("x.pth")}, "the bundle has random weights, seed 0"),
        ({"checkpoint": Path("x.pth"), "random_seed": 0}, "at once"),
        ({"json": Path("x.txt")}, "ends in .json"),
    ],
)
def test_requests_that_make_no_sense(tiny_bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        bench(BenchRequest(bundle=tiny_bundle, **options))


def test_a_missing_matplotlib_is_said_at_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(run, "require_packages", lambda purpose, names: (_ for _ in ()).throw(smc.NoTarget(f"{purpose} needs {names}")))
    with pytest.raises(smc.NoTarget, match="a plot needs"):
        bench(BenchRequest(bundle=tiny_bundle, plot=tmp_path / "a.png"))


def test_other_weights_give_times_without_errors(tiny_bundle: Path) -> None:
    manifest = run.read_manifest(tiny_bundle)
    assert run._find_weights(BenchRequest(bundle=tiny_bundle), manifest) == run._Weights(seed=0)
    assert not run._find_weights(BenchRequest(bundle=tiny_bundle, random_seed=1), manifest).same
    model = msgspec.structs.replace(manifest.model, source="a.pth", checkpoint_sha256="0" * 64)
    trained = msgspec.structs.replace(manifest, model=model)
    assert "--checkpoint FILE" in run._find_weights(BenchRequest(bundle=tiny_bundle), trained).why_not
    assert not run._find_weights(BenchRequest(bundle=tiny_bundle, random_seed=0), trained).same
    assert run._find_weights(BenchRequest(bundle=tiny_bundle, checkpoint=Path("a.pth")), trained).same
    foreign = msgspec.structs.replace(manifest, model=msgspec.structs.replace(manifest.model, config={}))
    assert "ONNX files" in run._find_weights(BenchRequest(bundle=tiny_bundle), foreign).why_not


# --- all of it ----------------------------------------------------------------------------------------------------------------


def test_the_command_measures_the_tiny_model(tiny_bundle: Path, tmp_path: Path) -> None:
    """The whole of it for real, in a process of its own: plan, torch, ONNX Runtime and the ladder on a CPU."""
    command = [sys.executable, "-c", "from smc.compiler.cli import main; main()", "bench", str(tiny_bundle)]
    options = ["--shape", "112x80", "--batch", "1,2", "--repeat", "3", "--ablation", "--json", str(tmp_path / "report.json")]
    peers = ["--peer", "eager-float32", "--peer", "eager-tf32", "--peer", "onnxruntime"]
    done = subprocess.run([*command, *options, *peers], capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr
    assert "+ FastNN-Lite" in done.stdout
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes(), type=Report)
    assert report.schema == 1
    assert report.command[:2] == ["smc", "bench"]
    assert report.versions["torch"]
    found = {contestant.name: contestant for contestant in report.contestants}
    assert list(found) == ["plan", "eager-float32", "eager-tf32", "onnxruntime", "eager-float32-flash"]
    assert found["eager-tf32"].result.failure == "not run: CPUs have no TF32"
    for name in ("plan", "onnxruntime", "eager-float32-flash"):
        accuracy = found[name].result.accuracy
        assert all(error.worst < 2e-5 for error in accuracy)
        assert [error.batch for error in accuracy] == ([1] if name == "eager-float32-flash" else [1, 2])
        assert accuracy[0].overlap == pytest.approx(1, abs=0.05)
    for contestant in report.contestants:
        assert all(timing.clock == "wall" and timing.seconds.count == 3 for timing in contestant.result.timings)
        assert all(memory.device is None and memory.host_peak > 1e8 for memory in contestant.result.memory)
    assert {"load", "load to first result", "process start to first result"} <= report.subject.load.keys()
    totals = {rung.technique: rung.total for rung in report.ablation}
    assert [technique for technique, total in totals.items() if total is None] == ["original, TF32 as shipped", "+ HybridCast"]
