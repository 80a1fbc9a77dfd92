"""Whole builds against the original's outputs, and what a build leaves behind."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import onnx_ir
import pytest

import smc
from smc.compiler import build as build_module
from smc.compiler.build import BuildRequest, build
from smc.compiler.source import CheckpointSource
from smc.exported.bundle import read_manifest
from smc.exported.engines import Engine, engine_for
from smc.exported.manifest import Manifest
from tests.conformance import DATA, case_images, load_case, relative_error
from tests.conftest import TINY_SHAPES

LIMIT = 2e-5
"""The ONNX Runtime plan reaches 3e-6 on these cases."""


def check_case(matcher: smc.Matcher, name: str) -> None:
    case = load_case(name)
    maps = matcher.infer(*case_images(case))
    stride = int(case["stride"])
    for output, value in maps.items():
        assert relative_error(value[::stride, ::stride], case[output]) < LIMIT, output


@pytest.mark.parametrize("name", ["tiny_landscape", "tiny_portrait_mixed"])
def test_bundle_computes_what_the_original_does(tiny_matcher: smc.Matcher, name: str) -> None:
    check_case(tiny_matcher, name)


@pytest.mark.large
@pytest.mark.xdist_group("large")
def test_public_model_builds_in_12_gib_and_computes_what_the_original_does(tmp_path: Path) -> None:
    script = (
        "import resource; from pathlib import Path; from smc.compiler.build import BuildRequest, build\n"
        f"build(BuildRequest(gpu='cpu', out=Path({str(tmp_path / 'large')!r}), random_seed=0, shapes=[(160, 224)]))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) / 2**20 < 12, "peak memory of the build, GiB"
    check_case(smc.load(tmp_path / "large"), "large_160x224")


def test_manifest_records_the_build(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest.target.gpu == "cpu"
    assert manifest.input_shapes == list(TINY_SHAPES)
    assert manifest.random_weights
    assert "seed 0" in manifest.model.source
    used = {(shape.height, shape.width) for pair in manifest.verification.pairs for shape in pair.shapes}
    assert used == set(TINY_SHAPES)
    for pair in manifest.verification.pairs:
        assert pair.matches_reference > 0
        assert {"features1", "features2", "pts3d1", "desc_conf2"} <= pair.outputs.keys()


def test_the_same_request_is_not_built_twice(tiny_bundle: Path) -> None:
    config = str(DATA / "tiny_landscape.config.json")
    before = (tiny_bundle / "manifest.json").stat()
    result = build(BuildRequest(gpu="CPU", out=tiny_bundle, random_seed=0, model=config, shapes=TINY_SHAPES))
    assert result.reused
    assert (tiny_bundle / "manifest.json").stat() == before


def test_no_weights_are_in_memory_when_the_plan_is_loaded(
    tiny_graphs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[weakref.ref[Any]] = []
    loaded: list[int] = []

    def export(self: CheckpointSource, report: Any) -> dict[str, onnx_ir.Model]:
        weights.extend(weakref.ref(parameter) for parameter in self._model.parameters())
        models = {file.stem: onnx_ir.load(file) for file in tiny_graphs}
        for model in models.values():
            for name, value in model.graph.initializers.items():
                values = value.const_value.numpy().copy()
                value.const_value = onnx_ir.tensor(values, name=name)
                weights.append(weakref.ref(values))
        return models

    def engine(manifest: Manifest, files: dict[str, memoryview]) -> Engine:
        loaded.append(sum(weight() is not None for weight in weights))
        return engine_for(manifest, files)

    monkeypatch.setattr(CheckpointSource, "export", export)
    monkeypatch.setattr(build_module, "engine_for", engine)
    config = str(DATA / "tiny_landscape.config.json")
    build(BuildRequest(gpu="cpu", out=tmp_path / "bundle", random_seed=0, model=config, shapes=TINY_SHAPES[:1]))
    assert len(weights) > 100
    assert loaded == [0]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"random_seed": None}, smc.UsageError),
        ({"checkpoint": Path("x.pth")}, smc.UsageError),
        ({"random_seed": -1}, smc.UsageError),
        ({"shapes": []}, smc.UsageError),
        ({"shapes": [(384, 510)]}, smc.UsageError),
        ({"shapes": [(32, 512)]}, smc.UsageError),
        ({"shapes": [(384, 512), (384, 512)]}, smc.UsageError),
        ({"max_batch": 2}, smc.UsageError),
        ({"gpu": "tpu"}, smc.UsageError),
        ({"gpu": "v100"}, smc.NoTarget),
        ({"gpu": "h200", "backend": "tensorrt-rtx"}, smc.NoTarget),
        ({"model": "medium"}, smc.BadInput),
        ({"random_seed": None, "model": None, "checkpoint": Path("missing.pth")}, smc.InputMissing),
        ({"random_seed": None, "checkpoint": Path("missing.pth")}, smc.UsageError),
    ],
)
def test_a_request_that_cannot_be_built_leaves_nothing(tmp_path: Path, changes: dict[str, object], error: type[smc.SmcError]) -> None:
    fields: dict[str, object] = {"gpu": "cpu", "out": tmp_path / "bundle", "random_seed": 0, "model": "small"}
    with pytest.raises(error):
        build(BuildRequest(**(fields | changes)))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
