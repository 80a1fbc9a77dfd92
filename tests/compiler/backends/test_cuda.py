from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from smc.compiler.backends import choose_backend, cuda
from smc.compiler.backends.cuda import fixed_graph, program_kinds
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.targets import TARGETS
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS, Plan, decode_plan
from smc.exported.errors import BackendFailed, BadInput, NoTarget
from tests.compiler.lowering.compiling import MadeUpKernels
from tests.compiler.small_stages import SIZE, C, decoder, encoder, job


def plan_of(directory: Path) -> Plan:
    plan = decode_plan((directory / PLAN).read_bytes())
    code = (directory / KERNELS).read_bytes()
    assert len(code) == sum(kernel.size for kernel in plan.kernels)
    assert (directory / WEIGHTS).stat().st_size == plan.weights_bytes
    return plan


def test_refusals() -> None:
    assert cuda.refusal(TARGETS["cpu"]) == "runs on NVIDIA GPUs only"
    assert "older than 8.0" in cuda.refusal(TARGETS["t4"])
    for name in ("a100", "a40", "rtx4090", "h200", "b200", "rtx5090"):
        assert cuda.refusal(TARGETS[name]) == ""
    with pytest.raises(NoTarget, match="older than"):
        choose_backend(TARGETS["t4"], "cuda")


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cuda.refusal(TARGETS["h200"]) == "Triton, which compiles its kernels, is not installed"


def test_hybrid_is_the_default_precision() -> None:
    assert cuda.precisions(TARGETS["h200"]) == ("hybrid", "fp16", "fp32")


def test_programs_of_a_plan(tmp_path: Path) -> None:
    """The encoder takes one image, or both of as many pairs as the decoder."""
    first, second = (48, 64), (64, 48)
    kinds = list(program_kinds(job(tmp_path, shapes=[first, second], max_batch=3)))
    encoders = [(shapes, batch) for stage, shapes, batch in kinds if stage == "encoder"]
    assert encoders == [((shape,), batch) for shape in (first, second) for batch in (1, 2, 4, 6)]
    decoders = [(shapes, batch) for stage, shapes, batch in kinds if stage == "decoder"]
    assert len(decoders) == 4 * 3
    assert [shapes for shapes, _ in decoders[:6]] == [(first, first)] * 3 + [(second, second)] * 3
    assert {batch for _, batch in decoders} == {1, 2, 3}


@pytest.mark.parametrize(("max_batch", "batches"), [(1, [1]), (2, [1, 2]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])])
def test_batches_are_powers_of_two_and_the_largest(max_batch: int, batches: list[int], tmp_path: Path) -> None:
    kinds = program_kinds(job(tmp_path, max_batch=max_batch))
    assert [batch for stage, _, batch in kinds if stage == "decoder"] == batches


@pytest.mark.parametrize("gpu", ["a100", "a40", "rtx4090", "h200"])
def test_writes_a_plan_with_machine_code(gpu: str, tmp_path: Path) -> None:
    asked = job(tmp_path, target=TARGETS[gpu])
    assert cuda.write_plan(asked) == {"encoder": PLAN, "decoder": PLAN}
    assert {path.name for path in asked.output.iterdir()} == {PLAN, KERNELS, WEIGHTS}
    plan = plan_of(asked.output)
    code = (asked.output / KERNELS).read_bytes()
    assert all(code[kernel.offset :].startswith(b"\x7fELF") for kernel in plan.kernels)
    assert [program.stage for program in plan.programs] == ["encoder", "encoder", "decoder", "describer", "matcher"]
    one, two, both, describer, matcher = plan.programs
    assert [program.inputs["image"].shape for program in (one, two)] == [(1, 48, 64, 3), (2, 48, 64, 3)]
    assert one.outputs["features"].shape == (1, 3, 4, C)
    assert both.outputs["desc2"].shape == (1, 48, 64, SIZE)
    assert {region.dtype for region in both.outputs.values()} == {"float32"}
    assert describer.inputs.keys() == both.inputs.keys()
    assert describer.outputs == {name: region for name, region in both.outputs.items() if name.startswith("desc")}
    assert matcher.inputs["desc1"].offset == both.outputs["desc1"].offset
    labels = [step.label for step in both.steps]
    assert [label.split()[0] for label in labels].count("Gemm") == 1, "both views are one product"
    assert any(step.overlaps for step in both.steps) == (gpu == "h200")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelCache, "try_all", lambda self, kernels, sm: MadeUpKernels().try_all(kernels, sm))


@pytest.mark.usefixtures("no_compiler")
def test_mixed_shapes_and_three_pairs_at_once(tmp_path: Path) -> None:
    asked = job(tmp_path, shapes=[(48, 80), (112, 64)], max_batch=3)
    cuda.write_plan(asked)
    plan = plan_of(asked.output)
    decoders = [program for program in plan.programs if program.stage == "decoder"]
    assert len(decoders) == 12
    shapes = {(program.inputs["features1"].shape, program.inputs["features2"].shape) for program in decoders}
    assert ((3, 3, 5, C), (3, 7, 4, C)) in shapes
    assert len(shapes) == 12
    # What is stacked for both views at once is stored once, also for where they are apart.
    stacked = 2 * C * (SIZE + 1) * 256 * 2
    assert stacked < plan.weights_bytes < 1.3 * stacked


@pytest.mark.usefixtures("no_compiler")
def test_progress_is_told(tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    cuda.write_plan(job(tmp_path, report=lambda what, fraction: reports.append((what, fraction))))
    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1
    assert any("decoder for 64x48, batch 1" in what for what, _ in reports)


@pytest.mark.usefixtures("no_compiler")
def test_float32(tmp_path: Path) -> None:
    asked = job(tmp_path, graphs={"encoder": encoder(np.float32), "decoder": decoder(np.float32)})
    cuda.write_plan(asked)
    plan_of(asked.output)


def test_a_graph_that_no_kernel_does_is_refused_with_its_node(tmp_path: Path) -> None:
    asked = job(tmp_path, graphs={"decoder": decoder(middle=lambda b, x: b.op("Softmax", x, axis=-1, name=f"odd_{x}"))})
    with pytest.raises(BadInput, match=r"decoder: odd_.*Softmax is not known") as caught:
        cuda.write_plan(asked)
    assert "tensorrt" in caught.value.fix


def test_a_kernel_that_does_not_compile_is_a_failure_of_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KernelCache, "try_all", lambda self, kernels, sm: [ValueError("no such instruction")] * len(kernels))
    with pytest.raises(BackendFailed, match="encoder: no such instruction"):
        cuda.write_plan(job(tmp_path))


@pytest.mark.usefixtures("no_compiler")
def test_two_inputs_that_share_their_sizes_take_no_mixed_shapes(tmp_path: Path) -> None:
    """Somebody's graph may give both views one name for their rows."""
    model = decoder()
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[1].dim_param = "rows"
    with pytest.raises(BadInput, match=r"features2.*rows is 3 and 4"):
        cuda.write_plan(job(tmp_path, shapes=[(48, 64), (64, 64)], graphs={"decoder": model}))


@pytest.mark.usefixtures("no_compiler")
def test_graphs_of_one_image_and_one_pair(tmp_path: Path) -> None:
    """An encoder of one image serves any number of pairs; a decoder of one pair does not."""
    one = {"encoder": encoder(), "decoder": decoder()}
    for model in one.values():
        for value in model.graph.input:
            value.type.tensor_type.shape.dim[0].dim_value = 1
    for number, max_batch in enumerate((1, 2)):
        (tmp_path / str(number)).mkdir()
        asked = job(tmp_path / str(number), max_batch=max_batch, graphs={"encoder": one["encoder"]})
        assert [batch for stage, _, batch in program_kinds(asked) if stage == "encoder"] == [1]
        cuda.write_plan(asked)
        assert [program.stage for program in plan_of(asked.output).programs].count("encoder") == 1
    (tmp_path / "both").mkdir()
    with pytest.raises(BadInput, match=r"decoder: .*features1 is fixed at \(1, .*and the plan is to take \(2, 3, 4, \?\)") as caught:
        cuda.write_plan(job(tmp_path / "both", max_batch=2, graphs=one))
    assert "--max-batch" in caught.value.fix


def test_what_a_plan_depends_on(tmp_path: Path) -> None:
    file = tmp_path / "tuning.json"
    file.write_text('{"gpu": "h200", "sm": 90, "when": "2025-01-01", "made_with": {}, "tiles": {}}')
    plain, tuned = cuda.ingredients(TARGETS["h200"], None), cuda.ingredients(TARGETS["h200"], file)
    assert plain != tuned
    with pytest.raises(BadInput, match=r"tuned for sm 9\.0, and .* has sm 8\.6"):
        cuda.ingredients(TARGETS["a40"], file)
    file.write_text("{}")
    with pytest.raises(BadInput, match="no tuning file that can be read"):
        cuda.ingredients(TARGETS["h200"], file)


def test_both_views_of_one_shape_are_one_stream(tmp_path: Path) -> None:
    asked = job(tmp_path, shapes=[(48, 64), (64, 48)])
    same = fixed_graph(asked, "decoder", [(48, 64)] * 2, 2)
    apart = fixed_graph(asked, "decoder", [(48, 64), (64, 48)], 2)
    products = [[node for node in graph.nodes if node.op == "MatMul"] for graph in (same, apart)]
    assert [len(found) for found in products] == [1, 2]
    assert all(math.prod(tensor.shape) > 0 for tensor in apart.outputs)
