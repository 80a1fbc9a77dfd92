"""Graphs in and out: equal after a round trip, safe to read, shared by dumps."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

import smc
from smc.compiler.graph_files import GraphDumper, import_graph, parameter_count, read_graph, read_onnx, write_graph
from smc.exported.engines.onnxruntime import WEIGHTS_SUFFIX
from tests.passes.graphs import Builder, normal, session, weights


@pytest.fixture
def model() -> onnx.ModelProto:
    """x (n, 64) @ a large weight + a small one."""
    b = Builder()
    x = b.input("x", ["n", 64])
    b.output(b.op("Add", b.op("MatMul", x, weights(64, 64)), weights(64)))
    return b.model()


@pytest.fixture
def file(model: onnx.ModelProto, tmp_path: Path) -> Path:
    path = tmp_path / "encoder.onnx"
    own = onnx.ModelProto.FromString(model.SerializeToString())  # saving moves the weights out
    onnx.save_model(own, path, save_as_external_data=True, location="encoder.data", size_threshold=0)
    return path


def test_a_graph_survives_writing_and_reading(model: onnx.ModelProto, file: Path, tmp_path: Path) -> None:
    graph = import_graph(read_onnx(file), "encoder")
    (tmp_path / "out").mkdir()
    write_graph(graph, tmp_path / "out", "encoder")
    files = {path.name: memoryview(path.read_bytes()) for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"encoder.onnx", f"encoder{WEIGHTS_SUFFIX}"}
    assert graph.name == "encoder"
    x = normal(5, 64)
    for loaded in (graph, read_graph(files, "encoder")):
        np.testing.assert_array_equal(run(loaded, x), run(model, x))


def test_weights_are_not_copied_on_the_way_in(file: Path) -> None:
    source = read_onnx(file)
    graph = import_graph(source, "encoder")
    mine = {tensor.name: tensor.values for tensor in graph.tensors().values() if getattr(tensor, "values", None) is not None}
    large = [v.const_value for v in source.graph.initializers.values() if v.const_value is not None and v.const_value.nbytes > 1024]
    assert large
    assert all(np.shares_memory(mine[str(weight.name)], weight.numpy()) for weight in large)


def test_parameters_are_counted(file: Path) -> None:
    assert parameter_count(read_onnx(file)) == 64 * 64 + 64


def run(graph: gs.Graph | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    model = graph if isinstance(graph, onnx.ModelProto) else gs.export_onnx(graph)
    return session(model).run(None, {"x": x})[0]


def external(path: Path, location: str) -> None:
    """A model whose weight says that it lies at `location`."""
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in "xy")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10).SerializeToString())


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("kind", ["parent", "absolute", "symlink"])
def test_weights_outside_the_models_folder_are_refused(kind: str, relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(64 * 64 * 4))
    folder = tmp_path / "model"
    folder.mkdir()
    if kind == "symlink":
        (folder / "weights").symlink_to(secret)
    external(folder / "m.onnx", {"parent": "../secret", "absolute": str(secret), "symlink": "weights"}[kind])
    monkeypatch.chdir(folder)
    with pytest.raises(smc.BadInput, match=r"outside|absolute|symlink"):
        read_onnx(Path("m.onnx") if relative else folder / "m.onnx")


@pytest.mark.parametrize("place", ["constant", "subgraph", "weight of a subgraph", "function"])
def test_values_of_nodes_in_other_files_are_refused(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries that would load them look in the working directory."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    Path("secret.bin").write_bytes(np.full(4, 7, np.int64).tobytes())
    values = TensorProto(name="values", data_type=TensorProto.INT64, dims=[4], data_location=TensorProto.EXTERNAL)
    values.external_data.add(key="location", value="secret.bin")
    constant = helper.make_node("Constant", [], ["values"], name="held", value=values)
    total = helper.make_node("Add", ["x", "values"], ["y"], name="total")
    x, y, inner = (helper.make_tensor_value_info(name, TensorProto.INT64, [4]) for name in ("x", "y", "inner"))
    nodes, functions = [constant, total], []
    if "subgraph" in place:
        makes, held = ([constant], []) if place == "subgraph" else ([], [values])
        body = helper.make_graph([*makes, helper.make_node("Identity", ["values"], ["inner"])], "body", [], [inner], held)
        condition = helper.make_node("Constant", [], ["yes"], value=numpy_helper.from_array(np.array(True)))
        nodes = [condition, helper.make_node("If", ["yes"], ["chosen"], name="held", then_branch=body, else_branch=body)]
        nodes.append(helper.make_node("Add", ["x", "chosen"], ["y"]))
    elif place == "function":
        opset = [helper.make_opsetid("", 23)]
        functions = [helper.make_function("own", "held", ["x"], ["y"], [constant, total], opset)]
        nodes = [helper.make_node("held", ["x"], ["y"], domain="own")]
    graph = helper.make_graph(nodes, "g", [x], [y])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("own", 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    for folder in (tmp_path, tmp_path / "here"):  # also where they would be found
        (folder / "m.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(smc.BadInput, match=r"m\.onnx: values in held lie in another file") as caught:
            read_onnx(folder / "m.onnx")
        assert "onnx.save_model" in caught.value.fix


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(smc.InputMissing, match=r"none\.onnx"):
        read_onnx(tmp_path / "none.onnx")
    external(tmp_path / "m.onnx", "none.weights")
    with pytest.raises(smc.InputMissing, match=r"none\.weights"):
        read_onnx(tmp_path / "m.onnx")


@pytest.mark.parametrize("content", [b"", b"<html>", os.urandom(2000)], ids=["empty", "page", "noise"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(smc.BadInput, match=r"bad\.onnx"):
        read_onnx(path)


def test_weights_that_are_cut_short_are_refused(file: Path) -> None:
    data = file.with_name("encoder.data")
    data.write_bytes(data.read_bytes()[:5000])
    with pytest.raises(smc.BadInput, match=r"encoder\.onnx"):
        read_onnx(file)


def test_an_old_opset_is_refused_with_the_reason(tmp_path: Path) -> None:
    b = Builder(opset=16)
    b.output(b.op("Add", b.input("x", [2]), weights(2)))
    onnx.save_model(b.model(), tmp_path / "old.onnx")
    with pytest.raises(smc.BadInput, match=r"old\.onnx: .*opset 16.*17 or newer"):
        import_graph(read_onnx(tmp_path / "old.onnx"), "old.onnx")


def test_dumps_share_weights_and_run(file: Path, tmp_path: Path) -> None:
    graph = import_graph(read_onnx(file), "encoder")
    dumper = GraphDumper(tmp_path / "dump")
    dumper.dump("encoder", 1, "First", graph)
    dumper.dump("encoder", 12, "Second", graph)
    names = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert names == ["encoder-01-First.onnx", "encoder-12-Second.onnx", "weights"]
    assert len(list((tmp_path / "dump" / "weights").iterdir())) == 1
    x = normal(3, 64)
    found = onnxruntime.InferenceSession(tmp_path / "dump" / "encoder-01-First.onnx", providers=["CPUExecutionProvider"]).run(
        None, {"x": x}
    )
    np.testing.assert_allclose(found[0], run(graph, x), rtol=1e-5)


def test_importing_leaves_the_model_as_it_is(file: Path) -> None:
    source = read_onnx(file)
    before = [str(value) for value in source.graph.inputs], sorted(source.graph.initializers)
    import_graph(source, "encoder")
    assert ([str(value) for value in source.graph.inputs], sorted(source.graph.initializers)) == before
    assert all(value.const_value is not None for value in source.graph.initializers.values())
    assert isinstance(source, ir.Model)
