"""That HybridCast keeps a model right whose residual streams and exponents float16 cannot hold."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
import torch
from numpy.typing import NDArray

from smc.compiler.calibration import plan_precision, relative_error
from smc.compiler.checkpoint import Weights, random_weights
from smc.compiler.config import ModelConfig
from smc.compiler.export import export_decoder, export_encoder
from smc.compiler.graph_runner import GraphRunner
from smc.compiler.verify import match_set
from smc.exported.images import load_view
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.hybrid_cast import HybridCast, HybridCastReport
from smc.passes.prepare import prepare
from smc.passes.rotary_fusion import RotaryFusion
from tests.passes.graphs import count

CONFIG = ModelConfig(
    enc_embed_dim=128,
    enc_depth=1,
    enc_num_heads=2,
    dec_embed_dim=64,
    dec_depth=4,
    dec_num_heads=1,
    dpt_dim=32,
    dpt_level_dims=(16, 24, 32, 48),
)
SHAPE = (128, 160)
STREAM = 2.0**16
"""By how much the residual streams are larger than usual."""
EXPONENT = 12.0
"""What the heads' exponentials take, e^12 = 163 000."""

STREAM_WRITERS = re.compile(
    r"(patch_embed\.proj|decoder_embed|(enc_blocks|dec_blocks2?)\.\d+\.(attn\.proj|cross_attn\.proj|mlp\.fc2))\.(weight|bias)"
)
STREAM_READERS = re.compile(r"downstream_head[12]\.dpt\.act_postprocess\.[12]\.0\.weight")
"""Without a normalisation before them."""

Outputs = dict[str, NDArray[np.float32]]
Graphs = dict[str, gs.Graph]


def extreme_weights() -> Weights:
    """Streams far beyond float16, undone by the normalisations, and exponentials far beyond it; both views alike.

    A model with random weights finds hardly any matches. With equal branches and nearly equal images, equal places have nearly equal
    descriptors.
    """
    weights = random_weights(CONFIG, seed=0)
    tensors = dict(weights.tensors)
    for name in tensors:
        if STREAM_WRITERS.fullmatch(name):
            tensors[name] = tensors[name] * STREAM
        elif STREAM_READERS.fullmatch(name):
            tensors[name] = tensors[name] / STREAM
    points = tensors["downstream_head1.dpt.head.4.bias"]
    points[:3] = EXPONENT / 3**0.5  # xyz, whose length is the exponent
    points[3] = EXPONENT
    tensors["downstream_head1.head_local_features.fc2.bias"][CONFIG.desc_dim * CONFIG.patch_size**2 :] = EXPONENT
    for name in tensors:
        first = name.replace("dec_blocks2.", "dec_blocks.").replace("downstream_head2.", "downstream_head1.")
        tensors[name] = tensors[first]
    return dataclasses.replace(weights, tensors=tensors)


def graph(model: ir.Model) -> gs.Graph:
    prepared = prepare(ir.to_proto(model))
    for one in (FlashMatch(), RotaryFusion(), FoldPermutation()):
        one(prepared)
    return prepared


@pytest.fixture(scope="module")
def graphs() -> Graphs:
    model = extreme_weights().build_model()
    with torch.no_grad():
        return {"encoder": graph(export_encoder(model)), "decoder": graph(export_decoder(model))}


@pytest.fixture(scope="module")
def images(examples: Path) -> NDArray[np.float32]:
    """(2, 3, H, W): a photograph, and the same with other noise."""
    image = load_view(examples / "graf1.png", [SHAPE]).pixels
    noise = np.random.default_rng(0).standard_normal((2, *image.shape)).astype(np.float32)
    return image + 0.02 * noise


def run(graphs: Mapping[str, gs.Graph], images: NDArray[np.float32]) -> Outputs:
    features = GraphRunner(graphs["encoder"]).run({"image": images})["features"]
    maps = GraphRunner(graphs["decoder"]).run({"features1": features[:1], "features2": features[1:]})
    return {name: values[0] for name, values in {"features1": features[:1], "features2": features[1:], **maps}.items()}


@pytest.fixture(scope="module")
def reference(graphs: Graphs, images: NDArray[np.float32]) -> Outputs:
    return run(graphs, images)


def compare(reference: Outputs, found: Outputs) -> tuple[dict[str, float], float]:
    errors = {name: relative_error(values, found[name]) for name, values in reference.items()}
    wanted, matches = match_set(reference), match_set(found)
    return errors, len(wanted & matches) / len(wanted | matches)


def cast(graphs: Graphs, passes: Mapping[str, HybridCast]) -> tuple[Graphs, dict[str, HybridCastReport]]:
    typed = {stage: graph.copy() for stage, graph in graphs.items()}
    return typed, {stage: passes[stage](graph) for stage, graph in typed.items()}


def test_the_model_is_extreme_and_matches(reference: Outputs) -> None:
    assert all(np.isfinite(values).all() for values in reference.values())
    for view in "12":
        for name in ("pts3d", "conf", "desc_conf"):
            assert np.abs(reference[name + view]).max() > 65504
    assert len(match_set(reference)) > 300


def test_plain_float16_fails(graphs: Graphs, images: NDArray[np.float32], reference: Outputs) -> None:
    typed, _ = cast(graphs, {stage: HybridCast("fp16") for stage in graphs})
    found = run(typed, images)
    assert not any(np.isfinite(values).all() for values in found.values())


def test_hybrid_with_calibration_stays_right(graphs: Graphs, images: NDArray[np.float32], reference: Outputs) -> None:
    features = {f"features{view}": reference[f"features{view}"][None] for view in "12"}
    said: list[str] = []
    feeds = {"encoder": {"image": images}, "decoder": features}
    passes = {stage: plan_precision(graph, "hybrid", [feeds[stage]], said.append) for stage, graph in graphs.items()}
    typed, reports = cast(graphs, passes)
    errors, overlap = compare(reference, run(typed, images))
    assert max(errors.values()) < 1e-2
    assert overlap > 0.99

    # The islands are islands: every projection that reads a normalised stream, every attention and nearly all of the heads stay low.
    for stage, report in reports.items():
        operations = {node.name: node.op for node in graphs[stage].nodes}
        low = Counter(operations[name] for name in report.low)
        assert low["Attention"] == count(graphs[stage])["Attention"]
        assert low["MatMul"] >= count(graphs[stage])["MatMul"] / 2
        assert low["Conv"] >= count(graphs[stage])["Conv"] - 4
        assert any("reaches" in island.reason for island in report.islands)


def test_without_ranges_the_stream_overflows(graphs: Graphs, images: NDArray[np.float32], reference: Outputs) -> None:
    typed, _ = cast(graphs, {stage: HybridCast("hybrid") for stage in graphs})
    found = run(typed, images)
    assert not np.isfinite(found["features1"]).all()
