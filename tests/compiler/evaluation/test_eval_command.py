"""`smc eval` as it is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import smc
from smc.compiler import cli
from smc.exported import matcher
from tests.compiler.evaluation.made import save_image

Run = Callable[..., tuple[int, str, str]]

pytest.importorskip("cv2")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_here(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli._run(["eval", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run_here


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Two small images with a homography: the same noise twice, and the identity."""
    folder = tmp_path / "small"
    for name in ("a1.png", "a3.png"):
        save_image(folder / name)
    (folder / "H1to3.txt").write_text("1 0 0 0 1 0 0 0 1")
    return folder


def test_a_table_and_then_the_same_from_the_file(run: Run, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.jsonl"
    status, first, said = run("sift", "--data", f"homography:{small}", "--out", out)
    assert status == 0
    assert "homography: 1 pair, own size" in first
    assert "100.00 %" in first
    assert str(out) in first
    assert "already" not in said
    before = out.read_bytes()
    status, again, said = run("sift", "--data", f"homography:{small}", "--out", out)
    assert (status, again) == (0, first)
    assert "1 of 1 pairs were in the file already." in said
    assert out.read_bytes() == before


def test_the_summary_as_json(run: Run, small: Path, tmp_path: Path) -> None:
    status, out, _ = run("sift", "--data", f"homography:{small}", "--out", tmp_path / "r", "--json")
    (summary,) = json.loads(out)
    assert status == 0
    assert (summary["kind"], summary["pairs"], summary["failed"]) == ("homography", 1, 0)
    assert summary["figures"]["accuracy@1 px"] == 1
    assert summary["seconds"].keys() == {"read", "detect", "match", "estimate"}


def test_a_bundle_of_random_weights_says_so_and_is_compared(
    run: Run, small: Path, tmp_path: Path, tiny_bundle: Path, tiny_matcher: smc.Matcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher, "load", lambda path: tiny_matcher)
    results = []
    for name, subject, *options in (("sift", "sift"), ("bundle", tiny_bundle, "--subsample", 16)):
        results.append(tmp_path / f"{name}.jsonl")
        status, _, said = run(subject, "--data", f"homography:{small}", "--out", results[-1], *options)
        assert status == 0
    assert "weights of this bundle are random" in said
    header = json.loads(results[1].read_text().splitlines()[0])
    assert header["config"]["matcher"]["options"]["subsample"] == 16
    status, out, _ = run("--compare", *results)
    assert status == 0
    assert "homography: 1 pair in both; 95 % intervals by a paired bootstrap" in out
    status, out, _ = run("--compare", *results, "--json")
    assert json.loads(out)[0]["figures"]["accuracy@1 px"]["first"] == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 2, "an evaluation needs a matcher, data and a file"),
        (["sift"], 2, "an evaluation needs"),
        (["sift", "--data", "nonsense:x", "--out", "{tmp}/r"], 2, "KIND:PATH"),
        (["sift", "--data", "homography:{tmp}/absent", "--out", "{tmp}/r"], 66, "no such folder"),
        (["sift", "--data", "pairs:{tmp}/absent.txt", "--out", "{tmp}/r"], 66, "absent.txt: No such file"),
        (["sift", "--data", "homography:{small}", "--out", "{tmp}/absent/r"], 73, "No such file"),
        (["{tmp}/no-bundle", "--data", "homography:{small}", "--out", "{tmp}/r"], 66, "no-bundle"),
        (["--compare", "{tmp}/a", "{tmp}/b"], 66, "{tmp}/a: No such file"),
        (["sift", "--compare", "{tmp}/a", "{tmp}/b"], 2, "evaluates nothing"),
    ],
)
def test_refusals(run: Run, small: Path, tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    names = {"tmp": tmp_path, "small": small}
    found, out, said = run(*(argument.format(**names) for argument in arguments))
    assert found == status
    assert out == ""
    assert message.format(**names) in said
    assert not (tmp_path / "r").exists()


def test_a_missing_library_is_named(run: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smc.compiler.packages._is_installed", lambda name: name != "poselib")
    status, _, said = run("sift", "--data", f"homography:{small}", "--out", tmp_path / "r")
    assert status == 69
    assert "poselib, which is not installed" in said
    assert "pip install poselib" in said
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr("smc.compiler.packages._is_installed", lambda name: name != "cv2")
    status, _, said = run("sift", "--data", f"homography:{small}", "--out", tmp_path / "r")
    assert (status, "pip install opencv-python-headless" in said) == (69, True)


def test_a_damaged_image_ends_it_and_the_rest_is_kept(run: Run, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hpatches" / "v_noise"
    folder.mkdir(parents=True)
    for i in range(1, 7):
        save_image(folder / f"{i}.ppm")
        (folder / f"H_1_{i}").write_text("1 0 0 0 1 0 0 0 1")
    whole = folder / "4.ppm"
    shutil.copy(whole, tmp_path / "kept.ppm")
    whole.write_bytes(b"P6 no image")
    status, _, said = run("sift", "--data", f"hpatches:{folder.parent}", "--out", tmp_path / "r")
    assert (status, "4.ppm" in said) == (65, True)
    assert len((tmp_path / "r").read_text().splitlines()) == 3  # the header, and two pairs
    shutil.copy(tmp_path / "kept.ppm", whole)
    status, out, said = run("sift", "--data", f"hpatches:{folder.parent}", "--out", tmp_path / "r")
    assert status == 0
    assert "2 of 5 pairs were in the file already." in said
    assert "hpatches: 5 pairs, short side 480 px" in out
