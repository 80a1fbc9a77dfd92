"""ONNX files as the source of a build: what is taken, what is refused, and that the reference is the files' own."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import smc
from smc.compiler import verify
from smc.compiler.build import BuildRequest, build
from smc.compiler.source import MAPS, OnnxSource
from tests.passes.graphs import Builder, weights


def encoder(shape: list[int | str], outputs: int = 1, dtype: type = np.float32) -> onnx.ModelProto:
    """Patches as tokens: (batch, 3, H, W) -> (batch, H/16, W/16, 64)."""
    b = Builder()
    image = b.input("img", shape, dtype)
    pixels = b.op("Cast", image, to=onnx.TensorProto.FLOAT)
    patches = b.op("Conv", pixels, weights(64, 3, 16, 16), strides=[16, 16], kernel_shape=[16, 16])
    for _ in range(outputs):
        b.output(b.op("Transpose", patches, perm=[0, 2, 3, 1]))
    return b.model()


def decoder(names: tuple[str, ...] = MAPS, inputs: int = 2) -> onnx.ModelProto:
    """Maps that are the same over each patch."""
    b = Builder()
    features = [b.input(f"feat{i}", ["batch", "rows", "cols", 64]) for i in range(inputs)]
    for name in names:
        tokens = features[0 if "1" in name else -1]
        width = {"pts3d": 3, "desc": 8}.get(name[:-1], 1)
        maps = b.op("MatMul", tokens, weights(64, width, seed=len(name)))
        maps = b.op("Resize", maps, "", np.array([1, 16, 16, 1], np.float32), mode="nearest")
        maps = maps if width > 1 else b.op("Squeeze", maps, np.array([3]))
        b.nodes.append(onnx.helper.make_node("Identity", [maps], [name]))
        b.output(name)
    return b.model()


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    onnx.save_model(encoder(["b", 3, "h", "w"]), tmp_path / "enc.onnx")
    onnx.save_model(decoder(), tmp_path / "dec.onnx")
    return tmp_path / "enc.onnx", tmp_path / "dec.onnx"


def test_two_files_are_a_source(files: tuple[Path, Path]) -> None:
    source = OnnxSource(*files)
    assert source.info.source == "enc.onnx and dec.onnx"
    assert source.info.parameters == 64 * 3 * 16 * 16 + 2 * 64 * (3 + 1 + 8 + 1) + 8 * 4  # the scales of the resizes
    assert source.fixed_shape is None
    (pair,) = verify.sample_pairs([(96, 128)])
    (outputs,) = source.run([pair], lambda what, done: None)
    assert outputs.keys() == {"features1", "features2", *MAPS}
    patches = pair.view1[0].reshape(3, 6, 16, 8, 16).transpose(1, 3, 0, 2, 4).reshape(6, 8, -1)
    wanted = patches @ weights(64, 3, 16, 16).reshape(64, -1).T
    np.testing.assert_allclose(outputs["features1"], wanted, rtol=1e-4, atol=1e-4)


def test_the_identity_is_that_of_the_contents(files: tuple[Path, Path], tmp_path: Path) -> None:
    first = OnnxSource(*files).info.checkpoint_sha256
    moved = tmp_path / "moved.onnx"
    shutil.copy(files[1], moved)
    assert OnnxSource(files[0], moved).info.checkpoint_sha256 == first
    onnx.save_model(encoder(["b", 3, 96, 128]), files[0])
    assert OnnxSource(*files).info.checkpoint_sha256 != first


def test_a_static_input_fixes_the_shape(files: tuple[Path, Path]) -> None:
    onnx.save_model(encoder([1, 3, 96, 128]), files[0])
    assert OnnxSource(*files).fixed_shape == (96, 128)


REFUSED = {
    "two images": (encoder(["b", 3, "h", "w"]), decoder(inputs=1), "takes 1 inputs .*features of two images"),
    "no image": (decoder(), decoder(), "takes 2 inputs .*one image"),
    "bytes": (encoder(["b", 3, "h", "w"], dtype=np.uint8), decoder(), "img is UINT8, float32"),
    "two outputs": (encoder(["b", 3, "h", "w"], outputs=2), decoder(), "returns 2 outputs .*features alone"),
    "other names": (encoder(["b", 3, "h", "w"]), decoder(MAPS[:-1]), "exactly pts3d1, .*desc_conf2 were expected"),
    "not of patches": (encoder([1, 3, 100, 128]), decoder(), "128x100, multiples of 16"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_encoder_and_decoder_is_refused(kind: str, files: tuple[Path, Path]) -> None:
    first, second, message = REFUSED[kind]
    onnx.save_model(first, files[0])
    onnx.save_model(second, files[1])
    with pytest.raises(smc.BadInput, match=message):
        OnnxSource(*files)


def test_a_shape_that_the_files_do_not_take_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    onnx.save_model(encoder([1, 3, 96, 128]), files[0])
    with pytest.raises(smc.UsageError, match="takes the input shape 128x96 alone"):
        build(BuildRequest(gpu="cpu", out=tmp_path / "out", onnx=files, shapes=[(96, 96)]))


def test_a_bundles_graphs_build_the_same_bundle_again(tiny_graphs: tuple[Path, Path], tiny_matcher: smc.Matcher, tmp_path: Path) -> None:
    result = build(BuildRequest(gpu="cpu", out=tmp_path / "again", onnx=tiny_graphs, shapes=[(96, 128)]))
    assert result.manifest.model.config == {}
    assert not result.manifest.random_weights
    (pair,) = verify.sample_pairs([(96, 128)])
    wanted, found = tiny_matcher.infer(pair.view1, pair.view2), smc.load(result.path).infer(pair.view1, pair.view2)
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    assert build(BuildRequest(gpu="cpu", out=tmp_path / "again", onnx=tiny_graphs, shapes=[(96, 128)])).reused


WRONG_MAPS = {
    "channels first": (
        "Transpose",
        {"perm": [0, 3, 1, 2]},
        "pts3d1",
        r"dec\.onnx: its output pts3d1 is float32 \(1, 3, 96, 128\); float32 \(1, 96, 128, 3\)",
    ),
    "half": ("Cast", {"to": onnx.TensorProto.FLOAT16}, "conf2", r"its output conf2 is float16"),
}


@pytest.mark.parametrize("kind", WRONG_MAPS)
def test_maps_of_another_layout_or_type_are_refused(kind: str, tiny_graphs: tuple[Path, Path], tmp_path: Path) -> None:
    op, attrs, name, message = WRONG_MAPS[kind]
    model = onnx.load(tiny_graphs[1])
    for node in model.graph.node:
        node.output[:] = [f"{out}_right" if out == name else out for out in node.output]
    model.graph.node.append(onnx.helper.make_node(op, [f"{name}_right"], [name], **attrs))
    output = next(value for value in model.graph.output if value.name == name)
    output.CopyFrom(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT16 if kind == "half" else onnx.TensorProto.FLOAT, None))
    onnx.save_model(model, tmp_path / "dec.onnx", save_as_external_data=True, location="dec.weights")
    with pytest.raises(smc.BadInput, match=message):
        build(BuildRequest(gpu="cpu", out=tmp_path / "out", onnx=(tiny_graphs[0], tmp_path / "dec.onnx"), shapes=[(96, 128)]))
    assert not (tmp_path / "out").exists()
