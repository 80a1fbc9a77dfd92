"""Whole builds for GPUs with TensorRT-RTX, on a machine without one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest

import smc
from smc.compiler import verify
from smc.compiler.backends import choose_backend
from smc.compiler.build import BuildRequest, BuildResult, build
from smc.compiler.inspect import inspect_contents
from smc.compiler.targets import find_target
from smc.exported.bundle import open_bundle
from tests.conformance import DATA

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install tensorrt-rtx-cu13")

SHAPE = (96, 128)
OFFLINE = ("t4", "a10", "a30", "a40", "a100", "rtxa6000", "rtx3090", "l4", "l40s", "rtx4090", "rtx5090")


@pytest.fixture(scope="module")
def built(tiny_graphs: tuple[Path, Path], module_tmp_path: Path) -> BuildResult:
    """An A40's bundle, hybrid precision, one shape."""
    return build(
        BuildRequest(gpu="a40", out=module_tmp_path / "bundle", onnx=tiny_graphs, shapes=[SHAPE], dump_graphs=module_tmp_path / "dump")
    )


@pytest.mark.parametrize("name", OFFLINE)
def test_plans_for_these_machines_are_built_anywhere(name: str) -> None:
    assert choose_backend(find_target(name)).NAME in ("tensorrt-rtx", "tensorrt")


def test_hopper_is_refused_with_what_can_be_done() -> None:
    with pytest.raises(smc.NoTarget, match=r"TensorRT-RTX does not run on sm 9\.0") as caught:
        choose_backend(find_target("h200"), "tensorrt-rtx")
    assert caught.value.exit_status == 69
    with pytest.raises(smc.NoTarget, match=r"tensorrt: builds only on a machine with a GPU of sm 9\.0, such as NVIDIA H200"):
        choose_backend(find_target("h200"), "tensorrt")
    assert choose_backend(find_target("h200")).NAME == "cuda"


def test_the_bundle_is_whole(built: BuildResult) -> None:
    manifest = open_bundle(built.path).manifest
    assert (manifest.target.gpu, manifest.target.sm, manifest.precision) == ("a40", "8.6", "hybrid")
    assert manifest.stages == {"encoder": "encoder.engine", "decoder": "decoder.engine"}
    assert manifest.verification.subject == "graph"
    assert set(manifest.files) - set(manifest.verify_only) == {"encoder.engine", "decoder.engine"}
    assert max(error.relative for error in manifest.verification.pairs[0].outputs.values()) > 1e-5, "float16 leaves a mark"


def test_attention_rotation_and_types_are_in_the_engine(built: BuildResult) -> None:
    config = json.loads((DATA / "tiny_landscape.config.json").read_text())
    layers = inspect_contents(open_bundle(built.path)).layers
    for stage, attentions in (("encoder", config["enc_depth"]), ("decoder", 4 * config["dec_depth"])):
        counts = {(total.type, total.precision): total.layers for total in layers[stage].totals}
        assert counts["attention_input", "float16"] == attentions
        assert counts["rotary_embedding", "float16"] == 2 * attentions
        assert ("softmax", "float32") not in counts
        assert counts["matrix_multiply", "float16"] > attentions
        assert ("matrix_multiply", "float32") not in counts
        assert layers[stage].engine_bytes == (built.path / f"{stage}.engine").stat().st_size


def test_the_graph_takes_bytes_and_returns_float32(built: BuildResult) -> None:
    encoder, decoder = (onnx.load(built.path / f"{stage}.onnx", load_external_data=False) for stage in ("encoder", "decoder"))
    (image,) = encoder.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert [size.dim_value for size in image.type.tensor_type.shape.dim][1:] == [*SHAPE, 3]
    assert {output.type.tensor_type.elem_type for output in decoder.graph.output} == {onnx.TensorProto.FLOAT}


def test_every_pass_is_dumped_and_the_last_dump_is_what_was_built(built: BuildResult) -> None:
    dump = built.path.parent / "dump"
    for report in built.passes:
        names = sorted(path.stem for path in dump.glob(f"{report.stage}-*.onnx"))
        assert names == [f"{report.stage}-{number:02}-{step.name}" for number, step in enumerate(report.passes, 1)]
        assert [step.nodes_after for step in report.passes][:-1] == [step.nodes_before for step in report.passes][1:]
        last, final = (
            onnx.load(path, load_external_data=False) for path in (dump / f"{names[-1]}.onnx", built.path / f"{report.stage}.onnx")
        )
        assert [node.op_type for node in last.graph.node] == [node.op_type for node in final.graph.node]


def test_verification_without_the_gpu_runs_the_graph(built: BuildResult) -> None:
    said: list[str] = []
    found = verify.verify_bundle(open_bundle(built.path), said.append)
    verify.check(found)
    assert found.subject == "graph"
    assert any(line.startswith("the engine itself is not run") for line in said)
    recorded = built.manifest.verification.pairs[0].outputs
    for name, error in found.pairs[0].outputs.items():
        assert error.relative == pytest.approx(recorded[name].relative, rel=1e-3), name


def test_verification_notices_other_weights(built: BuildResult, tmp_path: Path) -> None:
    opened = open_bundle(built.path)
    weights = np.frombuffer(opened.files["decoder.weights"], np.uint8).copy()
    weights[: len(weights) // 4] = 0
    opened.files["decoder.weights"] = memoryview(weights.tobytes())
    with pytest.raises(smc.AccuracyFailed):
        verify.check(verify.verify_bundle(opened, lambda what: None))


def test_other_images_need_the_gpu(built: BuildResult, examples: Path) -> None:
    with pytest.raises(smc.NoTarget, match="float32 outputs are recorded for the shipped photographs only"):
        verify.verify_bundle(open_bundle(built.path), lambda what: None, (examples / "graf1.png", examples / "graf3.png"))


def test_loading_without_the_gpu_says_what_is_missing(built: BuildResult) -> None:
    with pytest.raises((smc.NoTarget, smc.BundleMismatch)) as caught:
        smc.load(built.path)
    assert caught.value.exit_status in (69, 77)


def test_the_same_request_is_not_built_twice(built: BuildResult, tiny_graphs: tuple[Path, Path]) -> None:
    assert build(BuildRequest(gpu="a40", out=built.path, onnx=tiny_graphs, shapes=[SHAPE])).reused


def test_bfloat16_builds_with_its_transposed_convolutions_in_float32(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    found = build(BuildRequest(gpu="a40", out=tmp_path / "bundle", onnx=tiny_graphs, shapes=[SHAPE], precision="bf16"))
    decoder = inspect_contents(open_bundle(found.path)).layers["decoder"]
    counts = {(total.type, total.precision): total.layers for total in decoder.totals}
    assert counts["deconvolution", "float32"] > 0
    assert ("deconvolution", "bfloat16") not in counts
    assert counts["convolution", "bfloat16"] > 0


def test_a_pattern_that_matches_nothing_is_refused_with_the_closest_names(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(smc.UsageError, match=r"no node is named 'node_layer_norm_x'; the closest names are node_layer_norm"):
        build(BuildRequest(gpu="a40", out=tmp_path / "out", onnx=tiny_graphs, shapes=[SHAPE], exclude=["node_layer_norm_x"]))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp32", "exclude": ["*"]}, "patterns of nodes mean nothing"),
        ({"gpu": "cpu", "precision": "hybrid"}, "onnxruntime plans are fp32"),
        ({"backend": "tensorflow"}, "unknown backend 'tensorflow', known: tensorrt, tensorrt-rtx, cuda, onnxruntime"),
        ({"max_batch": 0}, "1 to 64"),
    ],
)
def test_options_that_make_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"gpu": "a40", "out": tmp_path / "out", "random_seed": 0, "model": "small"}
    with pytest.raises(smc.UsageError, match=message):
        build(BuildRequest(**(fields | changes)))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_tensorrt_does_not_take_is_named_and_nothing_is_kept(tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    decoder = onnx_ir.load(tiny_graphs[1])
    relu = next(node for node in decoder.graph if node.op_type == "Relu")
    relu.op_type = "Det"  # of square matrices; TensorRT has none
    relu.name = "odd_one"
    folder = tmp_path / "odd"
    folder.mkdir()
    onnx_ir.save(decoder, folder / "decoder.onnx", external_data="decoder.weights")
    with pytest.raises(smc.SmcError):
        build(BuildRequest(gpu="a40", out=tmp_path / "bundle", onnx=(tiny_graphs[0], folder / "decoder.onnx"), shapes=[SHAPE]))
    assert [path.name for path in tmp_path.iterdir() if not re.fullmatch(r"odd|\.bundle\.lock", path.name)] == []
