"""The exported graphs: what they are, and that they compute the torch model's function at every size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import smc
from smc.compiler.checkpoint import random_weights
from smc.compiler.config import read_config_json
from smc.compiler.export import OPSET, OUTPUTS
from smc.compiler.model import Mast3r
from tests.conformance import DATA, relative_error


@pytest.fixture(scope="module")
def model() -> Mast3r:
    return random_weights(read_config_json(DATA / "tiny_landscape.config.json"), seed=0).build_model()


@pytest.fixture(scope="module")
def sessions(tiny_bundle: Path) -> dict[str, onnxruntime.InferenceSession]:
    return {stage: onnxruntime.InferenceSession(tiny_bundle / f"{stage}.onnx") for stage in ("encoder", "decoder")}


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_graph_is_valid_and_standard(tiny_bundle: Path, stage: str) -> None:
    onnx.checker.check_model(str(tiny_bundle / f"{stage}.onnx"), full_check=True)
    graph = onnx.load(tiny_bundle / f"{stage}.onnx", load_external_data=False)
    assert [(opset.domain, opset.version) for opset in graph.opset_import] == [("", OPSET)]
    assert not graph.functions


def test_graphs_do_not_name_the_machine_that_built_them(tiny_bundle: Path) -> None:
    for path in tiny_bundle.glob("*.onnx"):
        content = path.read_bytes()
        assert b".py" not in content
        assert b"/site-packages" not in content


def test_inputs_and_outputs_are_named_and_dynamic(tiny_bundle: Path) -> None:
    def signature(stage: str) -> dict[str, list[object]]:
        graph = onnx.load(tiny_bundle / f"{stage}.onnx", load_external_data=False).graph
        return {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*graph.input, *graph.output)
        }

    assert signature("encoder") == {"image": ["batch", 3, "16*rows", "16*cols"], "features": ["batch", "rows", "cols", 128]}
    decoder = signature("decoder")
    assert list(decoder) == ["features1", "features2", *OUTPUTS]
    assert decoder["features2"] == ["batch", "rows2", "cols2", 128]
    assert decoder["desc2"] == ["batch", "16*rows2", "16*cols2", 24]


@pytest.mark.parametrize(
    ("batch", "shape1", "shape2"),
    [(1, (48, 64), (48, 64)), (3, (64, 48), (80, 112)), (1, (112, 176), (48, 48)), (2, (160, 48), (48, 160))],
)
def test_every_size_and_batch_computes_the_models_function(
    sessions: dict[str, onnxruntime.InferenceSession], model: Mast3r, batch: int, shape1: tuple[int, int], shape2: tuple[int, int]
) -> None:
    random = np.random.default_rng(7)
    images = [random.uniform(-1, 1, (batch, 3, *shape)).astype(np.float32) for shape in (shape1, shape2)]
    features = [sessions["encoder"].run(None, {"image": image})[0] for image in images]
    maps = sessions["decoder"].run(None, {"features1": features[0], "features2": features[1]})
    with torch.inference_mode():
        wanted = model(*map(torch.from_numpy, images))
    for name, value in zip(OUTPUTS, maps, strict=True):
        assert relative_error(value, wanted[name].numpy()) < 2e-5, name


def test_weights_are_stored_once(tiny_bundle: Path, model: Mast3r) -> None:
    parameters = 4 * sum(p.numel() for p in model.parameters())
    stored = sum(path.stat().st_size for path in tiny_bundle.glob("*.weights"))
    assert parameters * 0.99 < stored < parameters * 1.01


def test_an_operation_that_onnx_lacks_fails_by_name(monkeypatch: pytest.MonkeyPatch, model: Mast3r) -> None:
    from smc.compiler import export

    monkeypatch.setattr(Mast3r, "encode", lambda self, image: torch.linalg.lstsq(image, image).solution)
    with pytest.raises(smc.BackendFailed, match="encoder"):
        export.export_encoder(model)
