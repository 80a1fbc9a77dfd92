"""ONNX files as the source of a build: what is taken, what is refused, and that the reference is the files' own."""

from __future__ import annotations

import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import smc
from smc.compiler import verify
from smc.compiler.build import BuildRequest, build
from smc.compiler.graph_files import import_graph
from smc.compiler.source import MAPS, STAGES, OnnxSource
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


def set_shape(value: onnx.ValueInfoProto, sizes: list[int | str | None] | None) -> None:
    """State another shape; None for a dimension without a name, or for no shape at all."""
    kind = value.type.tensor_type
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind.elem_type, sizes))


def test_dimensions_without_names_get_some(files: tuple[Path, Path]) -> None:
    first, second = map(onnx.load, files)
    set_shape(first.graph.input[0], [None, None, None, "w"])
    set_shape(second.graph.input[0], [None, None, None, 64])
    set_shape(second.graph.input[1], ["unk__7", "", "cols", 64])
    onnx.save_model(first, files[0])
    onnx.save_model(second, files[1])
    models = OnnxSource(*files).export(lambda what, done: None)
    shapes = [[str(size) for size in value.shape or ()] for stage in STAGES for value in models[stage].graph.inputs]
    assert shapes == [["batch", "3", "height", "w"], ["batch", "rows1", "cols1", "64"], ["batch", "rows2", "cols", "64"]]


def test_what_a_file_says_of_its_outputs_is_not_believed(files: tuple[Path, Path]) -> None:
    """torch's older exporter states the shapes of the example's outputs, unless it is told that these are dynamic as well."""
    model = onnx.load(files[0])
    set_shape(model.graph.output[0], [1, 6, 8, 64])
    onnx.save_model(model, files[0])
    source = OnnxSource(*files)
    graph = import_graph(source.export(lambda what, done: None)["encoder"], "encoder")
    assert not any(isinstance(size, int) for size in graph.outputs[0].shape[:3])
    (outputs,) = source.run(list(verify.sample_pairs([(64, 80)])), lambda what, done: None)
    assert outputs["features1"].shape == (4, 5, 64)


def test_weights_of_bfloat16_may_lie_in_a_file(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[0])
    (weight,) = model.graph.initializer
    values = onnx.numpy_helper.to_array(weight).astype(ml_dtypes.bfloat16)
    narrow = onnx.numpy_helper.from_array(values, "narrow")
    model.graph.initializer.append(narrow)
    model.graph.initializer.remove(weight)
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["narrow"], [weight.name], to=onnx.TensorProto.FLOAT))
    onnx.save_model(model, files[0], save_as_external_data=True, location="enc.weights")
    first = OnnxSource(*files).info.checkpoint_sha256
    data = files[0].with_name("enc.weights")
    data.write_bytes(data.read_bytes()[::-1])
    assert OnnxSource(*files).info.checkpoint_sha256 != first


def test_a_decoder_must_state_the_rank_of_what_it_takes(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[1])
    for sizes, message in ((None, "has no shape"), (["n", 64], r"has the shape \(n, 64\)")):
        set_shape(model.graph.input[1], sizes)
        onnx.save_model(model, files[1])
        with pytest.raises(smc.BadInput, match=rf"dec\.onnx: its input feat1 {message}, \(batch, rows, cols, channels\) or"):
            OnnxSource(*files)


def test_features_of_another_layout_are_refused(files: tuple[Path, Path]) -> None:
    model = onnx.load(files[0])
    model.graph.node[-1].CopyFrom(onnx.helper.make_node("Identity", model.graph.node[-1].input, model.graph.node[-1].output))
    set_shape(model.graph.output[0], None)
    onnx.save_model(model, files[0])
    found, wanted = r"float32 \(1, 64, 6, 8\)", r"float32 \(1, 6, 8, channels\) or \(1, 48, channels\)"
    with pytest.raises(smc.BadInput, match=rf"enc\.onnx: its features of an image of 128x96 are {found}; {wanted} was expected"):
        OnnxSource(*files).run(list(verify.sample_pairs([(96, 128)])), lambda what, done: None)


@pytest.mark.parametrize(
    ("stage", "sizes", "message"),
    [
        ("encoder", ["n", 3, 64, "w"], r"enc\.onnx: its input img takes \(n, 3, 64, w\), .* 128x96 it is given \(1, 3, 96, 128\)"),
        ("decoder", [1, 6, 9, 64], r"dec\.onnx: its input feat1 takes \(1, 6, 9, 64\), .* 128x96 it is given \(1, 6, 8, 64\)"),
    ],
)
def test_files_of_other_shapes_are_refused(stage: str, sizes: list[int | str | None], message: str, files: tuple[Path, Path]) -> None:
    file = files[STAGES.index(stage)]
    model = onnx.load(file)
    set_shape(model.graph.input[-1], sizes)
    onnx.save_model(model, file)
    with pytest.raises(smc.BadInput, match=message) as caught:
        OnnxSource(*files).run(list(verify.sample_pairs([(96, 128)])), lambda what, done: None)
    assert "--shape" in caught.value.fix


def test_a_file_that_computes_in_float16_is_not_built_in_float32(files: tuple[Path, Path], tmp_path: Path) -> None:
    model = onnx.load(files[0])
    cast, patches, _ = model.graph.node
    patches.name = "patches"
    cast.attribute[0].i = onnx.TensorProto.FLOAT16
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight).astype(np.float16), weight.name))
    narrow = patches.output[0]
    patches.output[0] = "narrow"
    model.graph.node.insert(2, onnx.helper.make_node("Cast", ["narrow"], [narrow], to=onnx.TensorProto.FLOAT))
    onnx.save_model(model, files[0])
    with pytest.raises(smc.BadInput, match=r"encoder: the model itself computes in float16, by .* is to be in float32") as caught:
        build(BuildRequest(gpu="cpu", out=tmp_path / "out", onnx=files, shapes=[(96, 128)]))
    assert caught.value.fix == "export the model in float32"


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
