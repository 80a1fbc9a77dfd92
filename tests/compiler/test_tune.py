"""Candidates of a bundle's operations, prepared here; timed on the GPU only."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from smc.compiler import tune
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.launch_timing import Timing
from smc.compiler.operations import default_tile, tiles
from smc.compiler.targets import TARGETS
from smc.compiler.tuning import Tuning, describe, tile_fields
from smc.exported.engines import cuda_memory
from smc.exported.engines.cuda_program import decode_plan
from smc.exported.errors import BackendFailed, BadInput, CannotWrite, DiskError, UsageError
from smc.plugins.gemm.specification import Gemm
from smc.plugins.matching.specification import Matching
from tests.compiler.lowering.compiling import MadeUpKernels
from tests.compiler.small_stages import job


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the graphs of a very small model, and what a manifest would say of it."""
    asked = job(tmp_path, max_batch=2)
    manifest = SimpleNamespace(
        backend=SimpleNamespace(name="cuda"),
        target=SimpleNamespace(gpu="h200"),
        graphs={stage: path.name for stage, path in asked.graphs.items()},
        input_shapes=[(48, 64)],
        max_batch=2,
    )
    monkeypatch.setattr(tune, "open_bundle", lambda path: SimpleNamespace(manifest=manifest))
    monkeypatch.setattr(KernelCache, "try_all", lambda self, kernels, sm: MadeUpKernels().try_all(kernels, sm))
    monkeypatch.setattr(tune, "tiles", lambda operation, sm: [default_tile(operation, sm)])
    return tmp_path


def entries(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = msgspec.json.decode((directory / "job.json").read_bytes())["entries"]
    return found


def test_every_operation_has_candidates(bundle: Path) -> None:
    reports: list[tuple[str, float]] = []
    count = tune.prepare(bundle, bundle / "job", bundle / "cache", lambda what, done: reports.append((what, done)))
    found = entries(bundle / "job")
    assert len(found) == count
    kinds = {entry["operation"].partition(" ")[0] for entry in found}
    assert {"Patches", "Gemm", "LayerNorm", "DescriptorHead", "Matching"} <= kinds
    assert len({(entry["operation"], entry["name"]) for entry in found}) == count, "each once"
    assert all("groups=2" in entry["operation"] for entry in found if "n=2048" in entry["operation"]), "both views' product"
    plan = decode_plan((bundle / "job" / "plan.json").read_bytes())
    assert len(plan.programs) == count
    assert [done for _, done in reports] == sorted(done for _, done in reports)


def test_matching_is_timed_from_all_starting_points_of_the_usual_grid(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    operation = Matching((48, 64), (48, 64), 7)
    monkeypatch.setattr(tune, "tiles", tiles)
    tune.prepare(bundle, bundle / "job", bundle / "cache")
    found = [entry for entry in entries(bundle / "job") if entry["operation"] == describe(operation)]
    assert [entry["name"] for entry in found] == [json.dumps(tile_fields(tile)) for tile in tiles(operation, 90)]
    plan = decode_plan((bundle / "job" / "plan.json").read_bytes())
    for entry in found:
        assert entry["values"].keys() == {"starts.0", "options.0"}
        assert entry["values"]["options.0"] == [48, 0, 1, 0, 0, 0, 0, 0]
        starts = np.array(entry["values"]["starts.0"]).reshape(plan.programs[entry["program"]].inputs["starts.0"].shape)
        assert starts[0, :48].tolist() == [64 * y + x for y in range(4, 48, 8) for x in range(4, 64, 8)]
        assert not starts[0, 48:].any()
        assert not starts[1].any()


def test_a_bundle_of_another_backend_has_nothing_to_tune(tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="onnxruntime plan, which has nothing to tune"):
        tune.prepare(tiny_bundle, tmp_path / "job", tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["encoder.onnx/job", "job"])
def test_a_directory_that_cannot_be_written(place: str, bundle: Path) -> None:
    (bundle / "job" / "job.json").mkdir(parents=True)
    with pytest.raises(CannotWrite, match=re.escape(f"writing {bundle / place}")) as caught:
        tune.prepare(bundle, bundle / place, bundle / "cache")
    assert caught.value.fix == "choose another --prepare"


def test_a_full_disk_is_said_to_be_full(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tune, "write_job", refuse)
    with pytest.raises(DiskError, match=re.escape(f"writing {tmp_path / 'job'}: No space left")) as caught:
        tune.prepare(bundle, tmp_path / "job", tmp_path / "cache")
    assert caught.value.fix == "free disk space"


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"gpu": "h200"}'])
def test_what_is_no_job(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(BadInput, match="no candidates that can be timed") as caught:
        tune.measure(tmp_path)
    assert "--prepare" in caught.value.fix


Answer = Callable[[str], float]


def timed(monkeypatch: pytest.MonkeyPatch, directory: Path, median: Answer, failure: str = "", sm: str = "9.0") -> None:
    """Let a job be timed by a made-up GPU."""
    timings: Sequence[Timing] = [Timing(one["operation"], one["name"], median(one["name"]), 1.0, failure) for one in entries(directory)]
    monkeypatch.setattr(tune, "time_job", lambda *_: timings)
    monkeypatch.setattr(cuda_memory, "devices", lambda: [SimpleNamespace(name="NVIDIA H200", sm=sm, index=0)])
    monkeypatch.setattr(cuda_memory, "driver_version", lambda: (13, 0))


def test_the_fastest_tile_of_each_operation_is_kept(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "tiles", tiles)
    tune.prepare(bundle, bundle / "job", bundle / "cache")
    names = {entry["name"] for entry in entries(bundle / "job")}
    slow = {name: 10.0 + i for i, name in enumerate(sorted(names))}
    timed(monkeypatch, bundle / "job", slow.__getitem__)
    found = tune.measure(bundle / "job")
    assert (found.gpu, found.sm) == ("h200", 90)
    assert found.made_with["device"] == "NVIDIA H200"
    assert found.tiles.keys() == {entry["operation"] for entry in entries(bundle / "job")}
    for operation, best in found.tiles.items():
        assert best.microseconds == min(slow[entry["name"]] for entry in entries(bundle / "job") if entry["operation"] == operation)
    tune.write(found, bundle / "tuning.json")
    from smc.compiler.tuning import read_tuning

    assert read_tuning(bundle / "tuning.json") == found


def test_a_job_for_another_gpu(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.prepare(bundle, bundle / "job", bundle / "cache")
    timed(monkeypatch, bundle / "job", lambda name: 1.0, sm="8.6")
    with pytest.raises(BackendFailed, match=r"for sm 9\.0, and this machine has NVIDIA H200 \(sm 8\.6\)"):
        tune.measure(bundle / "job")


def test_nothing_that_ran(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.prepare(bundle, bundle / "job", bundle / "cache")
    timed(monkeypatch, bundle / "job", lambda name: 1.0, failure="launch failed")
    with pytest.raises(BackendFailed, match="no candidate ran"):
        tune.measure(bundle / "job")


def test_what_was_tuned_is_found_again(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tune.prepare(bundle, bundle / "job", bundle / "cache")
    timed(monkeypatch, bundle / "job", lambda name: 1.0)
    known = tune.measure(bundle / "job")
    operation = Gemm(groups=2, m=12, n=2048, k=32, a_row=32, a_group=12 * 32, out_row=2048, out_group=12 * 2048, out_dtype="float32")
    assert any(key.startswith("Gemm groups=2 m=12 n=2048") for key in known.tiles)
    assert Tuning(90, known).tile(operation) == default_tile(operation, 90)
    assert describe(operation).startswith("Gemm")
    assert TARGETS["h200"].sm == "9.0"
