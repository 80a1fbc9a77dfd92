"""Whole builds with the cuda backend, on a machine without a GPU. Kernels are made up: other tests compile them."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

import smc
from smc.compiler import build as build_module
from smc.compiler import verify
from smc.compiler.build import BuildRequest, BuildResult, build
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.targets import TARGETS
from smc.exported.bundle import open_bundle
from smc.exported.engines import cuda_memory
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS, decode_plan
from tests.compiler.lowering.compiling import MadeUpKernels

SHAPE = (96, 128)


@pytest.fixture(scope="module")
def no_compiler() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelCache, "try_all", lambda self, kernels, sm: MadeUpKernels().try_all(kernels, sm))
        patch.setattr("smc.compiler.backends.cuda.runs_here", lambda target: False)
        yield


@pytest.fixture(scope="module")
def built(tiny_graphs: tuple[Path, Path], no_compiler: None, module_tmp_path: Path) -> BuildResult:
    """An H200's bundle, hybrid precision, one shape."""
    return build(BuildRequest(gpu="h200", backend="cuda", out=module_tmp_path / "bundle", onnx=tiny_graphs, shapes=[SHAPE]))


def test_the_bundle_is_whole(built: BuildResult) -> None:
    manifest = open_bundle(built.path).manifest
    assert (manifest.target.gpu, manifest.target.sm, manifest.precision, manifest.backend.name) == ("h200", "9.0", "hybrid", "cuda")
    assert manifest.stages == {"encoder": PLAN, "decoder": PLAN}
    assert set(manifest.files) - set(manifest.verify_only) == {PLAN, KERNELS, WEIGHTS}
    assert {"encoder.onnx", "decoder.onnx", "decoder.weights", "reference.npz"} <= set(manifest.verify_only)
    assert manifest.verification.subject == "graph"
    assert max(error.relative for error in manifest.verification.pairs[0].outputs.values()) > 1e-5, "float16 leaves a mark"


def test_the_plan_has_a_program_for_each_batch(built: BuildResult) -> None:
    plan = decode_plan((built.path / PLAN).read_bytes())
    assert [program.stage for program in plan.programs] == ["encoder", "encoder", "decoder", "describer", "matcher"]
    decoder, describer = plan.programs[2:4]
    assert {"pts3d1", "pts3d2", "conf1", "conf2", "desc1", "desc2", "desc_conf1", "desc_conf2"} == decoder.outputs.keys()
    kinds = [step.label.split()[0] for step in decoder.steps]
    parts = {kind: {step.part for step in decoder.steps if step.label.split()[0] == kind} for kind in kinds}
    assert parts["Attention"] == parts["LayerNorm"] == {"decoders"}
    assert parts["Conv"] == parts["Upsample"] == parts["PointHead"] == parts["DescriptorHead"] == {"heads"}
    assert parts["Gemm"] == {"decoders", "heads"}
    assert {step.part for program in plan.programs if program is not decoder for step in program.steps} == {""}
    assert not {"Conv", "Upsample", "PointHead"} & {step.label.split()[0] for step in describer.steps}
    assert kinds.count("PointHead") == kinds.count("DescriptorHead") == 1
    assert kinds.count("Elementwise") == 5, "casts of the features and of two streams for the heads; both tokens side by side"
    assert {name.partition(" ")[0] for name in kinds} <= {
        "Gemm", "Attention", "LayerNorm", "Conv", "Upsample", "PointHead", "DescriptorHead", "Elementwise"
    }  # fmt: skip


def test_the_plan_is_no_larger_than_the_graphs(built: BuildResult) -> None:
    """Weights are stored once, whichever programs read them, but for the tables of rotations."""
    stored = sum((built.path / f"{stage}.weights").stat().st_size for stage in ("encoder", "decoder"))
    assert (built.path / WEIGHTS).stat().st_size < 1.02 * stored


def test_the_graph_takes_bytes_and_returns_float32(built: BuildResult) -> None:
    encoder, decoder = (onnx.load(built.path / f"{stage}.onnx", load_external_data=False) for stage in ("encoder", "decoder"))
    assert encoder.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert {output.type.tensor_type.elem_type for output in decoder.graph.output} == {onnx.TensorProto.FLOAT}


def test_verification_without_the_gpu_runs_the_graph(built: BuildResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_memory, "devices", lambda: [])
    found = verify.verify_bundle(open_bundle(built.path), lambda what: None)
    verify.check(found)
    assert found.subject == "graph"


def test_the_same_request_is_not_built_twice(built: BuildResult, tiny_graphs: tuple[Path, Path]) -> None:
    assert build(BuildRequest(gpu="h200", backend="cuda", out=built.path, onnx=tiny_graphs, shapes=[SHAPE])).reused


def another_tuning(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    (folder / "tuning.json").write_text('{"gpu": "h200", "sm": 90, "when": "2025-01-01", "made_with": {}, "tiles": {}}')
    return {"tuning": folder / "tuning.json"}


def other_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Perhaps of another Triton, whose code differs."""
    (folder / "key.1.2.3.kernel").touch()
    return {"kernels": folder}


def another_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """As after `git pull`."""
    monkeypatch.setattr(build_module, "_sources", lambda: "other sources")
    return {}


@pytest.mark.parametrize("change", [another_tuning, other_kernels, another_compiler])
def test_what_gives_another_plan_is_built_anew(
    change: Callable[[Path, pytest.MonkeyPatch], dict[str, Any]],
    built: BuildResult,
    tiny_graphs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class BuiltAnewError(Exception):
        pass

    def run(self: Any, out: Path, key: str, *_: Any) -> BuildResult:
        assert key != built.manifest.build_key
        raise BuiltAnewError

    monkeypatch.setattr(build_module._Build, "run", run)
    changes = change(tmp_path, monkeypatch)
    with pytest.raises(BuiltAnewError):
        build(BuildRequest(gpu="h200", backend="cuda", out=built.path, onnx=tiny_graphs, shapes=[SHAPE], **changes))


@pytest.mark.parametrize("folder", ["compiler", "examples", "exported", "passes", "plugins"])
def test_the_key_changes_with_every_source(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = importlib.import_module(f"smc.{folder}")
    copy = shutil.copytree(package.__path__[0], tmp_path / "moved", ignore=shutil.ignore_patterns("pocket", "__pycache__"))
    before = build_module._sources.__wrapped__()
    monkeypatch.setattr(package, "__path__", [str(copy)])
    assert build_module._sources.__wrapped__() == before, "wherever it is installed"
    for path in sorted(copy.rglob("*.png" if folder == "examples" else "*.py"))[-2:]:
        content = path.read_bytes()
        path.write_bytes(content + b"#")
        assert build_module._sources.__wrapped__() != before
        path.write_bytes(content)
    path.unlink()
    assert build_module._sources.__wrapped__() != before


@pytest.mark.usefixtures("no_compiler")
def test_other_gpus_get_plans_if_asked_for(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    found = build(BuildRequest(gpu="a40", backend="cuda", out=tmp_path / "bundle", onnx=tiny_graphs, shapes=[SHAPE], precision="fp16"))
    assert (found.manifest.target.sm, found.manifest.backend.name, found.manifest.precision) == ("8.6", "cuda", "fp16")
    plan = decode_plan((tmp_path / "bundle" / PLAN).read_bytes())
    assert not any(step.overlaps for program in plan.programs for step in program.steps)


@pytest.mark.usefixtures("no_compiler")
def test_files_that_say_little_of_their_dimensions(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    """Inputs without names, or with odd ones, and outputs stated to be the example's, as exporters leave them."""
    stated: dict[str, list[Any]] = {
        "image": [None, 3, "16*s0 + 0", None],
        "features1": [None, None, None, 128],
        "features2": [None, "2*s1 - s1", None, 128],
        "features": [1, 6, 8, 128],
        "pts3d": [1, *SHAPE, 3],
        "desc": [1, *SHAPE, 24],
    }
    files = []
    for file in tiny_graphs:
        model = onnx.load(file)
        del model.graph.value_info[:]
        for value in (*model.graph.input, *model.graph.output):
            shape = stated.get(value.name) or stated.get(value.name[:-1], [1, *SHAPE])
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
        files.append(tmp_path / file.name)
        onnx.save_model(model, files[-1], save_as_external_data=True, location=f"{file.stem}.weights")
    found = build(BuildRequest(gpu="h200", backend="cuda", out=tmp_path / "bundle", onnx=(files[0], files[1]), shapes=[SHAPE[::-1]]))
    plan = decode_plan((found.path / PLAN).read_bytes())
    assert [program.stage for program in plan.programs] == ["encoder", "encoder", "decoder", "describer", "matcher"]
    assert plan.programs[2].outputs["conf2"].shape == (1, 128, 96)


@pytest.mark.parametrize("option", ["tuning", "kernels"])
def test_another_backend_takes_no_tuning_and_no_kernels(option: str, tmp_path: Path) -> None:
    for gpu, name, fix in (("cpu", "onnxruntime", "leave them out"), ("a40", "tensorrt", "add --backend cuda")):
        fields: dict[str, Any] = {"gpu": gpu, "out": tmp_path / "out", "random_seed": 0, option: tmp_path / "given"}
        with pytest.raises(smc.UsageError, match=f"{name}.* plans take no tuning file and no kernels") as caught:
            build(BuildRequest(**fields))
        assert caught.value.fix == fix
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "content",
    [
        None,
        "no JSON",
        '{"gpu": "a40", "sm": 86, "when": "", "made_with": {}, "tiles": {}}',
        '{"gpu": "h200", "sm": 90, "when": "", "made_with": {}, "tiles": '
        '{"Patches": {"tile": {"patches": 0, "warps": 4}, "microseconds": 1}}}',
    ],
)
def test_a_tuning_file_that_is_none_leaves_nothing(content: str | None, tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(smc.BadInput, match=r"tuning\.json|tuning file"):
        build(BuildRequest(gpu="h200", backend="cuda", out=tmp_path / "out", onnx=tiny_graphs, shapes=[SHAPE], tuning=file))
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
def test_the_plan_itself_is_verified_on_its_gpu(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    sm = cuda_memory.devices()[0].sm
    gpu = next((target.name for target in TARGETS.values() if target.sm == sm), None)
    if gpu is None:
        pytest.skip(f"no target has sm {sm}")
    found = build(
        BuildRequest(gpu=gpu, backend="cuda", out=tmp_path / "bundle", onnx=tiny_graphs, shapes=[SHAPE, SHAPE[::-1]], max_batch=2)
    )
    assert found.manifest.verification.subject == "plan"
    said: list[str] = []
    again = verify.verify_bundle(open_bundle(found.path), said.append)
    verify.check(again)
    assert again.subject == "plan"
