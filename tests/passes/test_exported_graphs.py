"""The FlashMatch passes on the graphs that this project exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from smc.passes.base import PassReport
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.prepare import prepare
from smc.passes.rotary_fusion import RotaryFusion
from tests.conformance import DATA
from tests.passes.graphs import assert_same, count, normal

CONFIG = json.loads((DATA / "tiny_landscape.config.json").read_text())
ATTENTIONS = {"encoder": CONFIG["enc_depth"], "decoder": 2 * 2 * CONFIG["dec_depth"]}
"""The decoder's: two views, self and cross."""
TABLES = {"encoder": 1, "decoder": 2}
"""Token grids, each with a cos and a sin table."""
PASSES = (FlashMatch(), RotaryFusion(), FoldPermutation())


def optimised(model: onnx.ModelProto) -> tuple[gs.Graph, list[PassReport]]:
    graph = prepare(model)
    return graph, [one(graph) for one in PASSES]


def grids(name: str, batch: int, rows: int, cols: int) -> dict[str, np.ndarray]:
    """Random input of a token grid of rows x cols, the decoder's second view of another."""
    if name == "encoder":
        return {"image": normal(batch, 3, 16 * rows, 16 * cols)}
    width = CONFIG["enc_embed_dim"]
    return {"features1": normal(batch, rows, cols, width), "features2": normal(batch, cols, rows + 1, width)}


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_every_attention_and_rotation_is_fused(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / f"{name}.onnx")
    graph, reports = optimised(model)
    expected = ATTENTIONS[name]
    assert [(report.rewrites, report.declined) for report in reports] == [(expected, []), (2 * expected, []), (2 * expected, [])]

    counts = count(graph)
    assert (counts["Attention"], counts["RotaryEmbedding"]) == (expected, 2 * expected)
    assert not {"Softmax", "Neg", "Split"} & set(counts)
    rotations = [node for node in graph.nodes if node.op == "RotaryEmbedding"]
    assert not any(node.i(0).op == "Gather" for node in rotations)
    assert len({node.inputs[1].name for node in rotations}) == len({node.inputs[2].name for node in rotations}) == TABLES[name]
    assert {node.attrs["scale"] for node in graph.nodes if node.op == "Attention"} == {64**-0.5}

    assert_same(model, graph, grids(name, 1, 3, 4), grids(name, 2, 6, 8), grids(name, 3, 5, 7), grids(name, 1, 9, 3))


@pytest.mark.parametrize("name", ["encoder", "decoder"])
def test_weights_keep_their_number_and_the_model_its_own(tiny_bundle: Path, name: str) -> None:
    model = onnx.load(tiny_bundle / f"{name}.onnx")
    before = {weight.name: weight.raw_data for weight in model.graph.initializer}
    graph, _ = optimised(model)
    assert {weight.name: weight.raw_data for weight in model.graph.initializer} == before
    after = gs.export_onnx(graph)
    large = {weight.name for weight in model.graph.initializer if np.prod(weight.dims) > 1024}
    assert {weight.name for weight in after.graph.initializer if np.prod(weight.dims) > 1024} == large


def test_a_second_run_changes_nothing(tiny_bundle: Path) -> None:
    graph, _ = optimised(onnx.load(tiny_bundle / "encoder.onnx"))
    before = len(graph.nodes)
    assert [one(graph).rewrites for one in PASSES] == [0, 0, 0]
    assert len(graph.nodes) == before
