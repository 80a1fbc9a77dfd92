"""The paper's techniques, added one by one: the report of made results, and what `benchmarks/accuracy.py` does when rungs fail."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from smc.compiler import checkpoint
from smc.compiler.bench.variants import REFERENCE
from smc.compiler.evaluation.ladder import AGAIN, STEPS, Report, Rung, comparisons
from smc.compiler.evaluation.pairs import Task
from smc.compiler.evaluation.records import SCHEMA, Config, DataConfig, Estimate, Header, PairResult
from smc.compiler.evaluation.results import open_results
from smc.compiler.evaluation.summary import paired_differences

PAIRS, DRAWS = 6, 2

PIXELS = {"1 px": 0.25, "3 px": 0.5, "5 px": 0.75}
EPIPOLAR = {"epipolar 5e-4": 0.5, "epipolar 1e-4": 0.25}

FAILED = Rung(STEPS[-1], failure="NoTarget: no OpenCV | here")


def made_rung(number: int, kinds: dict[str, tuple[Task, dict[str, float]]], tmp_path: Path) -> Rung:
    """A rung's results from two files, as of two parts; the first has all data sets, as the script's has. Rung n is n degrees off."""
    step = STEPS[number]
    draws = DRAWS * (2 if step.contestant == REFERENCE else 1)
    rung = Rung(step)
    for part, mine in enumerate((kinds, {kind: kinds[kind] for kind in list(kinds)[:1]})):
        data = [DataConfig(kind, task, PAIRS // 2, "digest", "own size", f"made {kind}") for kind, (task, _) in mine.items()]
        config = Config({"matcher": step.technique}, data, None, 0, draws, 1000, 2.0, 3.0, "poselib 2.0.5")
        path = tmp_path / f"{number}-{part}.jsonl"
        with open_results(path, Header(SCHEMA, config, "2026-01-01", {}, {})) as file:
            for kind, (_, precision) in mine.items():
                for i in range(part, PAIRS, 2):
                    errors = [float(number + i + 1) + 0.1 * draw for draw in range(draws)]
                    file.add(PairResult(kind, f"pair {i}", 100, [Estimate(50, error, error, error) for error in errors], precision, {}))
        rung.add(path)
    return rung


def report_of(rungs: list[Rung]) -> Report:
    differences = {key: paired_differences(*both) for key, both in comparisons(rungs, DRAWS).items()}
    model = {"source": "made", "sha256": "0123456789abcdef0123", "device": "cpu"}
    machine, versions = {"processor": "a processor"}, {"torch": "2.9"}
    return Report(
        rungs=rungs,
        draws=DRAWS,
        differences=differences,
        model=model,
        created="2026-01-01",
        command=["python", "accuracy.py", "--out", "to here"],
        machine=machine,
        versions=versions,
    )


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a text in Markdown, cell by cell, without the rules under their headers."""
    found: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("| "):
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        elif found[-1]:
            found.append([])
    return [[rows[0], *rows[2:]] for rows in found if rows]


def test_what_the_tables_say(tmp_path: Path) -> None:
    kinds: dict[str, tuple[Task, dict[str, float]]] = {"rendered": ("pose", PIXELS | EPIPOLAR), "homography": ("homography", PIXELS)}
    report = report_of([made_rung(number, kinds, tmp_path) for number in (0, 1, 2)])
    text = report.markdown()
    assert "    python accuracy.py --out 'to here'" in text.splitlines()
    assert "## rendered: 6 pairs\n\nmade rendered.\n" in text
    assert "estimated 2 times" in text
    assert "poselib 2.0.5, at most 1,000 samples, inliers of a pose within 2 px" in text
    assert "Without results" not in text
    poses, differences, homographies, _ = tables(text)
    assert poses[0] == ["", "AUC@5°", "AUC@10°", "AUC@20°", "mean AUC", "precision@3 px", "matches", "median error", "without an estimate"]
    assert [row[0] for row in poses[1:]] == [step.technique for step in STEPS[:3]]
    # Errors of the first draws: 2 + i and 2.1 + i, i from 0 to 5.
    assert poses[2][5:] == ["50.00", "100", "4.55°", "0"]
    assert differences[0] == ["", *poses[0][1:7]]
    assert {row[0] for row in differences[1:]} == {AGAIN, STEPS[0].technique, STEPS[2].technique}
    assert all(row[5] == "+0.00 (+0.00 to +0.00)" for row in differences[1:])
    assert {row[0]: row[2][0] for row in differences[1:]} == {AGAIN: "-", STEPS[0].technique: "+", STEPS[2].technique: "-"}
    assert homographies[1][-2].endswith(" px")


def test_poses_without_the_place_of_every_pixel_have_no_precision_in_pixels(tmp_path: Path) -> None:
    text = report_of([made_rung(number, {"pairs": ("pose", EPIPOLAR)}, tmp_path) for number in (0, 1)]).markdown()
    results, differences = tables(text)
    assert results[0][1:6] == differences[0][1:] == ["AUC@5°", "AUC@10°", "AUC@20°", "mean AUC", "matches"]
    assert all(len(row) == len(results[0]) for row in results)


def test_a_rung_that_failed_is_named_with_its_reason(tmp_path: Path) -> None:
    halfway = made_rung(2, {"rendered": ("pose", PIXELS)}, tmp_path)
    halfway.failure = "RuntimeError: out of memory"
    rungs = [made_rung(number, {"rendered": ("pose", PIXELS)}, tmp_path) for number in (0, 1)]
    report = report_of([*rungs, halfway, FAILED])
    failures, results, differences = tables(report.markdown())
    assert failures[1:] == [[STEPS[2].technique, "RuntimeError: out of memory"], ["SIFT", r"NoTarget: no OpenCV \| here"]]
    assert [row[0] for row in results[1:]] == [rung.step.technique for rung in rungs]
    assert {row[0] for row in differences[1:]} == {AGAIN, STEPS[0].technique}


def test_all_rungs_failed(tmp_path: Path) -> None:
    report = report_of([Rung(step, failure=f"{step.contestant} is absent") for step in STEPS])
    (failures,) = tables(report.markdown())
    assert failures[1:] == [[step.technique, f"{step.contestant} is absent"] for step in STEPS]
    found = report.to_json()
    assert (found["config"], found["pairs"], found[AGAIN]) == ({}, {}, {})


def test_nothing_is_compared_where_the_reference_failed(tmp_path: Path) -> None:
    rungs = [made_rung(number, {"rendered": ("pose", PIXELS)}, tmp_path) for number in (0, 2)]
    report = report_of([*rungs, Rung(STEPS[1], failure="RuntimeError")])
    assert report.differences == {}
    assert len(tables(report.markdown())) == 2


def test_the_record_holds_every_pair_and_no_single_matcher(tmp_path: Path) -> None:
    rungs = [made_rung(number, {"rendered": ("pose", PIXELS)}, tmp_path) for number in (1, 2)]
    rungs[1].rows["rendered"][3] = PairResult("rendered", "pair 1", 0, [Estimate()] * DRAWS, dict.fromkeys(PIXELS, 0.0), {})
    report = report_of([*rungs, FAILED])
    report.write(tmp_path / "a.v2")
    found = json.loads((tmp_path / "a.v2.json").read_text())
    assert (tmp_path / "a.v2.md").read_text() == report.markdown()
    assert "matcher" not in found["config"]
    assert (found["config"]["draws"], found["config"]["data"][0]["pairs"]) == (DRAWS, PAIRS)
    assert found["pairs"] == {"rendered": [f"pair {i}" for i in range(PAIRS)]}
    first, second, failed = found["rungs"]
    assert [rung["matcher"] for rung in found["rungs"]] == [{"matcher": STEPS[1].technique}, {"matcher": STEPS[2].technique}, None]
    np.testing.assert_allclose(first["results"]["rendered"]["errors"][5], [7, 7.1, 7.2, 7.3])
    assert second["results"]["rendered"]["errors"][1] == [None, None]
    assert second["results"]["rendered"]["matches"] == [100, 0, 100, 100, 100, 100]
    assert second["summaries"]["rendered"]["failed"] == 1
    assert (failed["failure"], failed["results"], failed["summaries"]) == (FAILED.failure, {}, {})


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[3] / "benchmarks" / "accuracy.py"
    spec = importlib.util.spec_from_file_location("accuracy_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


class Isolated:
    """In place of new processes: rendering makes nothing, SIFT finds what `made` writes, and everything else breaks. Keeps the jobs."""

    def __init__(self, script: ModuleType, made: Callable[[Any], None]) -> None:
        self.script, self.made = script, made
        self.jobs: list[Any] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if function is self.script.render:
            return
        assert function is self.script.run_job
        (job,) = arguments
        self.jobs.append(job)
        if job.step.contestant != "sift":
            raise RuntimeError("no luck\nand a traceback")
        self.made(job)


@pytest.fixture
def any_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SimpleNamespace(config=SimpleNamespace(to_json=lambda: {}), tensors={}, source="made", sha256="0")
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda path: found)


def call(script: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> None:
    command = ["accuracy.py", "checkpoint", "--device", "cpu", "--work", str(folder / "work"), "--out", str(folder / "new" / "a.v2")]
    monkeypatch.setattr(sys, "argv", [*command, *options])
    script.main()


@pytest.mark.usefixtures("any_checkpoint")
def test_the_script_without_its_reference(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def results(job: Any) -> None:
        data = [DataConfig("rendered", "pose", 1, "digest", "own size")]
        config = Config({"matcher": "sift"}, data, None, 0, job.draws, 1000, 2.0, 3.0, "poselib 2.0.5")
        with open_results(job.out, Header(SCHEMA, config, "2026-01-01", {}, {})) as file:
            file.add(PairResult("rendered", "a", 9, [Estimate(5, 1.0, 1.0, 1.0)] * job.draws, PIXELS, {}))

    isolated = Isolated(script, results)
    monkeypatch.setattr(script, "isolated", isolated)
    with pytest.raises(SystemExit, match=r"strict float32, which all else is compared with: RuntimeError: no luck$"):
        call(script, monkeypatch, tmp_path, "--pairs", "3", "--draws", "4", "--pose-threshold", "1.5")
    failures, found = tables((tmp_path / "new" / "a.v2.md").read_text())
    reasons = dict(failures[1:])
    assert reasons["original, strict float32"] == "RuntimeError: no luck"
    assert reasons["+ HybridCast"] == "not run: no hybrid bundle was given"
    assert reasons["original, TF32 as shipped"] == "not run: CPUs have no TF32"
    assert [row[0] for row in found[1:]] == ["SIFT"]
    assert json.loads((tmp_path / "new" / "a.v2.json").read_text())["pairs"] == {"rendered": ["a"]}
    assert "## rendered: 1 pair" in capsys.readouterr().out
    # Another number of pairs or draws, or another threshold, is another file.
    assert {job.out.name for job in isolated.jobs if job.step.contestant == "sift"} == {"rung7-3-pairs-4-draws-1.5px-1of1.jsonl"}
    assert {job.data for job in isolated.jobs} == {(f"homography:{script.EXAMPLES}",)}


@pytest.mark.usefixtures("any_checkpoint")
def test_data_of_ones_own_takes_the_place_of_the_photographs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, examples: Path
) -> None:
    isolated = Isolated(script, lambda job: None)
    monkeypatch.setattr(script, "isolated", isolated)
    monkeypatch.setattr(script, "EXAMPLES", tmp_path / "absent")
    with pytest.raises(SystemExit, match="strict float32"):
        call(script, monkeypatch, tmp_path, "--pairs", "3", "--data", f"homography:{examples}")
    assert {job.data for job in isolated.jobs} == {(f"homography:{examples}",)}


@pytest.mark.parametrize("kinds", [("homography", "homography"), ("homography", "rendered")])
def test_kinds_are_checked_before_anything_is_rendered(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, examples: Path, kinds: tuple[str, str]
) -> None:
    isolated = Isolated(script, lambda job: None)
    monkeypatch.setattr(script, "isolated", isolated)
    np.savez(tmp_path / "a.npz", image0=np.zeros(1))
    options = [option for kind in kinds for option in ("--data", f"{kind}:{tmp_path if kind == 'rendered' else examples}")]
    with pytest.raises(SystemExit, match="each has to be of another kind"):
        call(script, monkeypatch, tmp_path, *options)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", [("--pairs", "0"), ("--draws", "0"), ("--draws", "some")])
def test_there_has_to_be_something_to_evaluate(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(script, monkeypatch, tmp_path, *option)
    assert f"{option[1]}: a number from 1 on was expected" in capsys.readouterr().err


def test_the_estimator_is_looked_for_before_anything_is_rendered(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("smc.compiler.packages._is_installed", lambda name: name != "poselib")
    with pytest.raises(SystemExit, match="poselib"):
        call(script, monkeypatch, tmp_path)
    assert not (tmp_path / "work").exists()
