"""The tiny conformance model through the passes, HybridCast and the lowering, against its typed graphs in ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper

from smc.compiler.backends.cuda import fixed_graph
from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.graph_files import read_onnx
from smc.compiler.graph_runner import GraphRunner
from smc.compiler.lowering.context import CannotLower
from smc.compiler.lowering.lower import lower
from smc.compiler.lowering.parts import DESCRIPTORS
from smc.compiler.optimize import StageGraph
from smc.compiler.pipeline import FLOAT32_STREAMS, PipelineTask, cuda_passes
from smc.compiler.targets import TARGETS
from smc.passes.prepare import prepare
from tests.compiler.lowering.graphs import compare, kinds, random_values
from tests.passes.graphs import Builder, weights

LANDSCAPE, PORTRAIT = (32, 64), (64, 32)
UNEVEN = (48, 80)
"""A grid whose halves are no whole numbers: maps are cut after they are enlarged."""


def typed_graphs(
    bundle: Path, directory: Path, shapes: Sequence[tuple[int, int]], precision: Precision, exclude: Sequence[str] = ()
) -> PlanJob:
    """The graphs that a build writes for these shapes."""
    directory.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    height, width = shapes[0]
    for stage in ("encoder", "decoder"):
        task = PipelineTask(stage, shapes, 3, precision, (), exclude, ("cuda", stage) in FLOAT32_STREAMS)
        graph = StageGraph(read_onnx(bundle / f"{stage}.onnx"), task, None, lambda what, done: None)
        graph.run(cuda_passes)
        if stage == "encoder":
            feeds = [random.integers(0, 256, (1, 3, height, width)).astype(np.float32) / np.float32(127.5) - 1]
        else:
            feeds = [
                random.standard_normal((1, height // 16, width // 16, graph.graph.inputs[0].shape[3])).astype(np.float32) for _ in range(2)
            ]
        graph.cast([feeds])
        graph.write(directory)
    graphs = {stage: directory / f"{stage}.onnx" for stage in ("encoder", "decoder")}
    return PlanJob(graphs=graphs, target=TARGETS["h200"], shapes=shapes, max_batch=3, output=directory, cache=directory / "cache")


@pytest.fixture(scope="module")
def hybrid(tiny_bundle: Path, module_tmp_path: Path) -> PlanJob:
    return typed_graphs(tiny_bundle, module_tmp_path, [LANDSCAPE, PORTRAIT], "hybrid")


@pytest.mark.parametrize("size", ["n", None])
def test_a_dynamic_dimension_is_refused_with_its_tensor(size: str | None) -> None:
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [2, 8]), weights(8, 8), name="product"))
    graph = prepare(b.model())
    graph.inputs[0].shape[0] = size
    with pytest.raises(CannotLower, match=rf"the graph's input x is of the shape \({size}, 8\), whose dimension 0"):
        lower(graph)
    graph.inputs[0].shape[0] = 2
    graph.outputs[0].shape = [2, "m"]
    with pytest.raises(CannotLower, match=r"product \(MatMul\): its output .* is of the shape \(2, m\), whose dimension 1"):
        lower(graph)
    graph.outputs[0].shape = None
    with pytest.raises(CannotLower, match=r"product \(MatMul\): its output .* is of a shape that cannot be told"):
        lower(graph)


@pytest.mark.parametrize("dtype", [np.float64, np.bool_, np.int8, np.uint16])
def test_a_type_that_no_kernel_takes_is_refused_with_its_tensor(dtype: type) -> None:
    b = Builder()
    odd = b.op("Cast", b.input("x", [2, 8]), to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), name="odd")
    b.output(b.op("Cast", b.op("Transpose", odd, perm=[1, 0]), to=TensorProto.FLOAT))
    with pytest.raises(CannotLower, match=f"odd_out0 is {np.dtype(dtype).name}, which"):
        lower(prepare(b.model()))


def run_both(graph: gs.Graph, tolerance: float = 1e-2) -> Counter[str]:
    """Both from random inputs; how many calls of each kind there are."""
    feeds = {tensor.name: random_values(tensor, seed) for seed, tensor in enumerate(graph.inputs)}
    made = lower(graph)
    compare(made, feeds, GraphRunner(graph).run(feeds), tolerance)
    return Counter(kinds(made.calls))


@pytest.mark.parametrize("batch", [1, 2])
def test_the_encoder(hybrid: PlanJob, batch: int) -> None:
    found = run_both(fixed_graph(hybrid, "encoder", [LANDSCAPE], batch))
    assert found["Patches"] == 1
    assert found.keys() == {"Patches", "Gemm", "Attention", "LayerNorm"}, "nothing is moved or cast by itself"
    assert found["Gemm"] == 1 + 4 * found["Attention"]


@pytest.mark.parametrize(("shapes", "batch"), [((LANDSCAPE, LANDSCAPE), 1), ((PORTRAIT, PORTRAIT), 3), ((LANDSCAPE, PORTRAIT), 2)])
def test_the_decoder(hybrid: PlanJob, shapes: tuple[tuple[int, int], ...], batch: int) -> None:
    found = run_both(fixed_graph(hybrid, "decoder", shapes, batch))
    views = 1 if shapes[0] == shapes[1] else 2
    assert (found["PointHead"], found["DescriptorHead"]) == (views, views)
    assert not found.keys() & {"add", "gelu", "relu", "exp", "Reduction"}, "all else is done on the way"
    # The features and two layers' streams, cast for the heads; tokens of encoder and decoder side by side for the descriptors.
    assert found["copy"] == 5 * views


@pytest.mark.parametrize("shapes", [(LANDSCAPE, LANDSCAPE), (LANDSCAPE, PORTRAIT)])
def test_what_only_some_of_the_outputs_need(hybrid: PlanJob, shapes: tuple[tuple[int, int], ...]) -> None:
    graph = fixed_graph(hybrid, "decoder", shapes, 1)
    feeds = {tensor.name: random_values(tensor, seed) for seed, tensor in enumerate(graph.inputs)}
    whole = lower(graph)
    made = whole.only(DESCRIPTORS)
    expected = {name: values for name, values in GraphRunner(graph).run(feeds).items() if name in DESCRIPTORS}
    compare(made, feeds, expected, 1e-2)
    calls, all_calls = Counter(kinds(made.calls)), Counter(kinds(whole.calls))
    assert not calls.keys() & {"Conv", "PointHead", "Upsample"}
    for kind in ("Attention", "LayerNorm", "DescriptorHead"):
        assert calls[kind] == all_calls[kind]
    assert whole.only(whole.outputs).calls == whole.calls, "nothing was made in vain"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_other_precisions(tiny_bundle: Path, tmp_path: Path, precision: Precision) -> None:
    job = typed_graphs(tiny_bundle, tmp_path, [LANDSCAPE], precision)
    tolerance = 1e-5 if precision == "fp32" else 3e-2
    run_both(fixed_graph(job, "encoder", [LANDSCAPE], 1), tolerance)
    found = run_both(fixed_graph(job, "decoder", [LANDSCAPE] * 2, 1), tolerance)
    assert found["PointHead"] == 1


def test_nodes_that_are_left_in_float32(tiny_bundle: Path, tmp_path: Path) -> None:
    """Those whose numbers end so, as calibration or `exclude` may ask for."""
    job = typed_graphs(tiny_bundle, tmp_path, [UNEVEN], "hybrid", ["*[147]"])
    run_both(fixed_graph(job, "encoder", [UNEVEN], 1))
    run_both(fixed_graph(job, "decoder", [UNEVEN] * 2, 1))
