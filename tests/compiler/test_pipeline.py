"""The backends' lists of passes on the tiny model: what comes out computes the same, whatever shapes the plan is for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import torch

import smc
from smc.compiler import verify
from smc.compiler.checkpoint import random_weights
from smc.compiler.config import resolve_config
from smc.compiler.graph_engine import GraphEngine
from smc.compiler.model import Mast3r
from smc.compiler.optimize import StageGraph
from smc.compiler.pipeline import PIPELINES, PipelineTask, fixed_dims
from smc.compiler.source import MAPS, OnnxSource
from smc.exported.images import to_bytes
from tests.conformance import DATA

CONFIG = DATA / "tiny_landscape.config.json"
LANDSCAPE, PORTRAIT = (96, 128), (128, 96)


@pytest.fixture(scope="module")
def source(tiny_graphs: tuple[Path, Path]) -> OnnxSource:
    return OnnxSource(*tiny_graphs)


def optimised(source: OnnxSource, shapes: list[tuple[int, int]], max_batch: int) -> dict[str, gs.Graph]:
    graphs = {}
    for stage, model in source.export(lambda what, done: None).items():
        graph = StageGraph(model, PipelineTask(stage, shapes, max_batch, "fp32", (), ()), None, lambda what, done: None)
        graph.run(PIPELINES["tensorrt"])
        graphs[stage] = graph.graph
    return graphs


@pytest.mark.parametrize("max_batch", [1, 2])
@pytest.mark.parametrize("shapes", [[LANDSCAPE], [LANDSCAPE, PORTRAIT]], ids=["one shape", "two shapes"])
def test_optimised_graphs_compute_the_same(
    source: OnnxSource, tiny_matcher: smc.Matcher, shapes: list[tuple[int, int]], max_batch: int
) -> None:
    graphs = optimised(source, shapes, max_batch)
    engine = GraphEngine(graphs)
    for pair in verify.sample_pairs([*shapes, shapes[0]] if len(shapes) > 1 else shapes):
        wanted = tiny_matcher.infer(pair.view1, pair.view2)
        found = verify.run_engine(engine, pair)
        for name, value in wanted.items():
            assert verify.output_error(value, found[name]).relative < 2e-5, name
    if max_batch == 2:
        (pair,) = verify.sample_pairs(shapes[:1])
        both = engine.encode(np.concatenate([to_bytes(pair.view1), to_bytes(pair.view2)]))
        maps = engine.decode(both, both[::-1])
        swapped = tiny_matcher.infer(pair.view2, pair.view1)
        for name, value in swapped.items():
            assert verify.output_error(value, maps[name][1]).relative < 2e-5, name


def test_one_shape_leaves_no_shape_arithmetic_and_constant_tables(source: OnnxSource) -> None:
    for stage, graph in optimised(source, [LANDSCAPE], 1).items():
        counts = Counter(node.op for node in graph.nodes)
        assert not {"Softmax", "Range", "Cos", "Sin"} & set(counts), stage
        rotations = [node for node in graph.nodes if node.op == "RotaryEmbedding"]
        assert len(rotations) == 2 * counts["Attention"] > 0
        if stage == "decoder":  # whose batch is fixed as well
            assert "Shape" not in counts
            assert all(isinstance(table, gs.Constant) for node in rotations for table in node.inputs[1:3])


@pytest.mark.filterwarnings("ignore")  # the old exporter's, many
@pytest.mark.parametrize(("opset", "dynamic"), [(17, False), (18, True)])
def test_graphs_of_torchs_old_exporter_are_fused_as_well(
    opset: int, dynamic: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "expm1", lambda x: x.exp() - 1)  # which that exporter does not know
    config = resolve_config(str(CONFIG))
    model = random_weights(config, 0).build_model()
    names = {"encoder": (["img"], ["feat"]), "decoder": (["f1", "f2"], list(MAPS))}
    features = torch.zeros(1, 6, 8, config.enc_embed_dim)
    for stage, example in (("encoder", (torch.zeros(1, 3, *LANDSCAPE),)), ("decoder", (features, features))):
        inputs, outputs = names[stage]
        axes = {name: {0: "n"} for name in (*inputs, *outputs)} if dynamic else None
        torch.onnx.export(
            Stage(model, stage),
            example,
            tmp_path / f"{stage}.onnx",
            opset_version=opset,
            dynamo=False,
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=axes,
        )
    source = OnnxSource(tmp_path / "encoder.onnx", tmp_path / "decoder.onnx")
    graphs = optimised(source, [LANDSCAPE], 1)
    attentions = {"encoder": config.enc_depth, "decoder": 4 * config.dec_depth}
    for stage, graph in graphs.items():
        counts = Counter(node.op for node in graph.nodes)
        assert (counts["Attention"], counts["RotaryEmbedding"]) == (attentions[stage], 2 * attentions[stage])
        assert not {"Softmax", "Cos", "Sin", "Neg"} & set(counts)
    (pair,) = verify.sample_pairs([LANDSCAPE])
    (wanted,) = source.run([pair], lambda what, done: None)
    for name, error in verify.compare(wanted, verify.run_engine(GraphEngine(graphs), pair), pair.shapes).outputs.items():
        assert error.relative < 2e-5, name


class Stage(torch.nn.Module):
    """The encoder or the decoder as a module with tensors for arguments and results."""

    def __init__(self, model: Mast3r, stage: str) -> None:
        super().__init__()
        self.model, self.stage = model, stage

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        if self.stage == "encoder":
            return self.model.encode(*inputs)
        maps = self.model.decode(*inputs)
        return tuple(maps[name] for name in MAPS)


def test_names_of_dimensions_play_no_part(source: OnnxSource) -> None:
    """A graph that somebody else exported names its dimensions as it likes."""
    image = gs.Variable("img", np.float32, ["n", 3, "height", "width"])
    task = PipelineTask("encoder", [LANDSCAPE], 1, "fp32", (), ())
    assert fixed_dims(gs.Graph(inputs=[image]), task) == {"height": 96, "width": 128}
    image.shape = ["n", 3, "16*h", "16*w"]
    assert fixed_dims(gs.Graph(inputs=[image]), task) == {"h": 6, "w": 8}
    tokens = [gs.Variable(f"tokens{view}", np.float32, ["n", "count", 64]) for view in (1, 2)]
    assert fixed_dims(gs.Graph(inputs=tokens), PipelineTask("decoder", [LANDSCAPE], 1, "fp32", (), ())) == {"n": 1, "count": 48}
    assert fixed_dims(gs.Graph(inputs=tokens), PipelineTask("decoder", [LANDSCAPE, PORTRAIT], 2, "fp32", (), ())) == {}
