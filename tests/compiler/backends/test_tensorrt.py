"""TensorRT-RTX builds here without a GPU. What only the full TensorRT does is tested with made-up devices and libraries."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY, MagicMock, Mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from smc.compiler.backends import choose_backend
from smc.compiler.backends import tensorrt as module
from smc.compiler.backends.plan_job import PlanJob
from smc.compiler.backends.tensorrt import LAYERS, full, rtx
from smc.compiler.build import BuildRequest
from smc.compiler.build import build as build_bundle
from smc.compiler.targets import TARGETS
from smc.exported.engines.tensorrt_library import TENSORRT, Library
from smc.exported.errors import BackendFailed, NoTarget, OutOfMemory, UsageError
from tests.exported import test_tensorrt_engine as made_up
from tests.passes.graphs import Builder, weights

trt = pytest.importorskip("tensorrt_rtx", reason="builds need tensorrt-rtx-cu13")


A40, T4, H200, CPU = (TARGETS[name] for name in ("a40", "t4", "h200", "cpu"))
SHAPES = ((64, 96), (96, 64))
HALF, FLOAT, BFLOAT16 = TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.BFLOAT16


def encoder(dtype: int = FLOAT, size: tuple[int | str, int | str] = ("16*rows", "16*cols")) -> onnx.ModelProto:
    """Bytes -> patches, (batch, H, W, 3) -> (batch, H / 16, W / 16, 8)."""
    build = Builder()
    image = build.input("image", ["batch", *size, 3], np.uint8)
    pixels = build.op("Transpose", build.op("Cast", image, to=FLOAT), perm=[0, 3, 1, 2])
    patches = build.op("Conv", pixels, weights(8, 3, 16, 16), strides=[16, 16], name="patches")
    features = build.op("Cast", build.op("Transpose", patches, perm=[0, 2, 3, 1]), to=dtype, name="last")
    build.outputs.append(helper.make_tensor_value_info(features, dtype, None))
    return build.model()


def decoder(middle: Callable[[Builder, str], str] = lambda build, tensor: tensor) -> onnx.ModelProto:
    """Two views' features, (batch, rows, cols, 8), summed over their grids; `middle` works on the first's."""
    build = Builder()
    first, second = (build.input(f"features{view}", ["batch", f"rows{view}", f"cols{view}", 8]) for view in "12")
    sums = [build.op("ReduceSum", tensor, np.array([1, 2])) for tensor in (middle(build, first), second)]
    build.output(build.op("Add", *sums))
    return build.model()


def attention(build: Builder, tensor: str, **attrs: Any) -> str:
    tokens = build.op("Reshape", tensor, np.array([0, 1, -1, 8]))
    operands = [build.op("MatMul", tokens, weights(8, 8, seed=seed)) for seed in range(3)]
    return build.op("Attention", *operands, scale=0.5, name="attend", **attrs)


def job(directory: Path, first: onnx.ModelProto, second: onnx.ModelProto, **changes: Any) -> PlanJob:
    graphs = {"encoder": directory / "encoder.onnx", "decoder": directory / "decoder.onnx"}
    for path, model in zip(graphs.values(), (first, second), strict=True):
        onnx.save(model, path)
    output = directory / "plan"
    output.mkdir()
    fields = {"graphs": graphs, "target": A40, "shapes": SHAPES, "max_batch": 1, "output": output, "cache": directory / "cache"}
    return PlanJob(**(fields | changes))


def test_writes_both_engines_and_their_layers(tmp_path: Path) -> None:
    reports: list[tuple[str, float]] = []
    asked = job(tmp_path, encoder(HALF), decoder(), report=lambda what, fraction: reports.append((what, fraction)))
    assert rtx.write_plan(asked) == {"encoder": "encoder.engine", "decoder": "decoder.engine"}
    assert {path.name for path in asked.output.iterdir()} == {"encoder.engine", "decoder.engine", LAYERS}

    layers = json.loads((asked.output / LAYERS).read_text())
    assert layers["encoder"]["engine_bytes"] == (asked.output / "encoder.engine").stat().st_size
    assert layers["encoder"]["weight_bytes"] == 8 * 3 * 16 * 16 * 4
    assert layers["encoder"]["workspace_limit_bytes"] == 36 * 2**30
    assert {"type": "convolution", "precision": "float32", "layers": 1} in layers["encoder"]["totals"]
    (last,) = (layer for layer in layers["encoder"]["layers"] if layer["name"] == "last")
    assert last == {"name": "last", "type": "cast", "outputs": [{"type": "float16", "shape": [None, None, None, 8]}]}

    fractions = [fraction for _, fraction in reports]
    assert fractions == sorted(fractions)
    assert fractions[0] >= 0
    assert fractions[-1] <= 1
    assert {what.split()[2] for what, _ in reports} == {"encoder", "decoder"}


def test_builds_the_exported_encoder(tiny_bundle: Path, tmp_path: Path) -> None:
    """The decoder's many layers take too long here; builds of whole bundles cover it."""
    asked = job(tmp_path, encoder(), decoder())
    for name in ("encoder.onnx", "encoder.weights"):
        shutil.copy(tiny_bundle / name, tmp_path)
    rtx.write_plan(asked)
    layers = json.loads((asked.output / LAYERS).read_text())
    stored = (tmp_path / "encoder.weights").stat().st_size
    assert layers["encoder"]["weight_bytes"] == pytest.approx(stored, rel=0.1)
    assert layers["encoder"]["engine_bytes"] > stored


@pytest.mark.parametrize("name", ["t4", "a100", "a40", "rtx4090", "rtx5090"])
def test_tensorrt_rtx_builds_for(name: str) -> None:
    assert rtx.refusal(TARGETS[name]) == ""


def test_refusals() -> None:
    assert rtx.refusal(CPU) == full.refusal(CPU) == "runs on NVIDIA GPUs only"
    assert rtx.refusal(H200) == "TensorRT-RTX does not run on sm 9.0"
    assert rtx.refusal(TARGETS["orin"]) == "TensorRT-RTX does not run on sm 8.7"


def test_h200_is_told_what_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full, "_library", Library("tensorrt", "TensorRT", "no_such_module", "tensorrt"))
    for backend, why in (
        (rtx, "TensorRT-RTX does not run on sm 9.0"),
        (full, "builds only on a machine with a GPU of sm 9.0, such as NVIDIA H200, after pip install tensorrt"),
    ):
        with pytest.raises(NoTarget, match=why):
            choose_backend(H200, backend.NAME)
    assert choose_backend(H200).NAME == "cuda"


def test_missing_library_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Library("tensorrt-rtx", "TensorRT-RTX", "no_such_module", "tensorrt-rtx-cu13")
    monkeypatch.setattr(rtx, "_library", absent)
    assert rtx.refusal(A40).endswith("pip install tensorrt-rtx-cu13")


@pytest.fixture
def a40_machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The full library, played by the other, in a machine with an A40. Gives the module that names devices."""
    cuda = pytest.importorskip("smc.exported.engines.cuda_memory")
    monkeypatch.setattr(Library, "load", lambda self: trt)
    monkeypatch.setattr(cuda, "devices", lambda: [cuda.Device(0, "NVIDIA A40", "8.6", 48 << 30)])
    monkeypatch.setattr(cuda, "driver_version", lambda: (13, 2))
    return cuda


def test_full_library_builds_for_the_gpu_at_hand(a40_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert full.refusal(A40) == full.refusal(TARGETS["rtx3090"]) == ""
    assert full.runs_here(A40)
    assert not full.runs_here(H200)
    assert full.refusal(H200) == "builds only on a machine with a GPU of sm 9.0, such as NVIDIA H200, which this one has not"

    def no_driver() -> None:
        raise NoTarget("this machine has no NVIDIA driver")

    monkeypatch.setattr(a40_machine, "devices", no_driver)
    assert full.refusal(A40).endswith("such as NVIDIA A40; here: this machine has no NVIDIA driver")
    assert not full.runs_here(A40)


def test_a_driver_of_an_older_cuda_generation_runs_nothing(a40_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a40_machine, "driver_version", lambda: (12, 8))
    assert not full.runs_here(A40)
    assert not rtx.runs_here(A40)
    assert rtx.refusal(A40) == ""
    assert re.search(r"A40; here: .* need a driver for CUDA 13, and this one is for CUDA 12\.8", full.refusal(A40))


def test_a_machine_whose_cuda_does_not_work_runs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cudart = pytest.importorskip("cuda.bindings.runtime")
    monkeypatch.setattr(cudart, "cudaDriverGetVersion", lambda: (cudart.cudaError_t.cudaSuccess, 13020))
    monkeypatch.setattr(cudart, "cudaGetDeviceCount", lambda: (cudart.cudaError_t.cudaErrorStubLibrary, 0))
    assert not rtx.runs_here(A40)


def measured(timings: bytes) -> Any:
    """A builder's configuration after a build."""
    return SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: timings))


def test_timings_are_kept_for_one_kind_of_gpu_driver_and_library(a40_machine: Any, tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(), decoder())
    notes: list[str] = []
    for serialized in (b"first", b"second"):
        full._keep_timings(trt, measured(serialized), asked, notes)
    assert notes == []
    (kept,) = asked.cache.iterdir()
    assert kept.read_bytes() == b"second"
    assert kept.name == f"NVIDIA-A40-sm8.6-driver13.2-tensorrt{trt.__version__}.timing"


def test_a_build_goes_on_without_its_timing_cache(a40_machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = job(tmp_path, encoder(), decoder())
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", Mock(side_effect=OSError("no space left on device")))
        full._keep_timings(trt, measured(b"whole"), asked, notes)
    assert notes == ["the timing cache is not kept: no space left on device"]
    assert not list(asked.cache.iterdir())

    module._timing_cache(trt, asked).mkdir()  # which no cache can be read from
    monkeypatch.setattr(a40_machine, "use_device", lambda index: None)
    monkeypatch.setattr(a40_machine, "free_memory", lambda: 1 << 30)
    config, notes = MagicMock(), []
    full._configure(trt, config, asked, notes)
    (note,) = notes
    assert note.startswith("the timing cache is not used: [Errno 21]")
    config.create_timing_cache.assert_called_once_with(b"")


def test_notes_of_a_build_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rtx, "_keep_timings", lambda trt, config, job, notes: notes.append("not kept"))
    reports: list[tuple[str, float]] = []
    rtx._build_stage(trt, "encoder", job(tmp_path, encoder(), decoder(), report=lambda *what: reports.append(what)))
    assert reports[-1] == ("not kept", 0.4)


def inputs(*shapes: tuple[int, ...], dtype: str = "FLOAT") -> list[Any]:
    return [SimpleNamespace(name=f"in{i}", shape=shape, dtype=SimpleNamespace(name=dtype)) for i, shape in enumerate(shapes, 1)]


def test_full_library_has_a_profile_for_each_shape_and_one_for_mixed_pairs(tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(), decoder(), max_batch=3)
    grids = inputs((-1, -1, -1, 8), (-1, -1, -1, 8))
    assert full._profiles(grids, "decoder", asked) == [
        dict.fromkeys(("in1", "in2"), ((1, 4, 6, 8), (1, 4, 6, 8), (3, 4, 6, 8))),
        dict.fromkeys(("in1", "in2"), ((1, 6, 4, 8), (1, 6, 4, 8), (3, 6, 4, 8))),
        dict.fromkeys(("in1", "in2"), ((1, 4, 4, 8), (1, 4, 6, 8), (3, 6, 6, 8))),
    ]
    images = inputs((-1, 3, -1, -1))
    assert full._profiles(images, "encoder", asked) == [
        {"in1": ((1, 3, 64, 96), (1, 3, 64, 96), (6, 3, 64, 96))},
        {"in1": ((1, 3, 96, 64), (1, 3, 96, 64), (6, 3, 96, 64))},
    ]


def test_tensorrt_rtx_has_one_profile(tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(), decoder())
    images = inputs((-1, -1, -1, 3), dtype="UINT8")
    assert rtx._profiles(images, "encoder", asked) == [{"in1": ((1, 64, 64, 3), (1, 64, 96, 3), (2, 96, 96, 3))}]


def test_static_dimensions_stay(tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(size=(64, 96)), decoder(), shapes=[(64, 96)], max_batch=4)
    rtx.write_plan(asked)
    batch_of_one = inputs((1, -1, -1, 3), dtype="UINT8")
    assert rtx._profiles(batch_of_one, "encoder", asked) == [{"in1": 3 * ((1, 64, 96, 3),)}]


def test_a_shape_that_the_graph_does_not_take(tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(size=(64, 96)), decoder())
    with pytest.raises(BackendFailed, match=r"input image is fixed at \?x64x96x3, and the plan is to take 1x64x64x3 to 2x96x96x3"):
        rtx.write_plan(asked)
    assert not list(asked.output.iterdir())


def test_a_batch_that_the_graph_does_not_take(tmp_path: Path) -> None:
    one = job(tmp_path, encoder(), decoder())
    several = dataclasses.replace(one, max_batch=4)
    single_pair = inputs((1, -1, -1, 8))
    assert rtx._profiles(single_pair, "decoder", one) == [{"in1": ((1, 4, 4, 8), (1, 4, 6, 8), (1, 6, 6, 8))}]
    with pytest.raises(BackendFailed, match=r"decoder: .*in1 is fixed at 1x\?x\?x8, and the plan is to take 1x4x4x8 to 4x6x6x8") as caught:
        rtx._profiles(single_pair, "decoder", several)
    assert "--max-batch" in caught.value.fix
    with pytest.raises(BackendFailed, match=r"encoder: .*in1 is fixed at 2x"):
        rtx._profiles(inputs((2, 3, -1, -1)), "encoder", one)


def test_features_as_tokens_in_a_row(tmp_path: Path) -> None:
    build = Builder()
    tensors = [build.input(f"features{view}", ["batch", f"tokens{view}", 8]) for view in "12"]
    build.output(build.op("Add", *(build.op("ReduceMean", tensor, np.array([1])) for tensor in tensors)))
    asked = job(tmp_path, encoder(), build.model(), shapes=[(64, 96), (96, 64), (64, 64)], max_batch=2)
    rtx.write_plan(asked)
    tokens = inputs((-1, -1, 8))
    assert rtx._profiles(tokens, "decoder", asked) == [{"in1": ((1, 16, 8), (1, 24, 8), (2, 24, 8))}]
    assert full._profiles(tokens, "decoder", asked)[0] == {"in1": ((1, 24, 8), (1, 24, 8), (2, 24, 8))}
    with pytest.raises(BackendFailed, match=r"fixed at \?x25x8, and the plan is to take 1x16x8 to 2x24x8"):
        rtx._profiles(inputs((-1, 25, 8)), "decoder", asked)


def test_layers_without_outputs_are_left_out(tmp_path: Path) -> None:
    """The condition of an If is such a layer."""

    def branches(build: Builder, tensor: str) -> str:
        condition = build.op("Greater", build.op("ReduceSum", tensor, keepdims=0), np.array(0, np.float32))
        bodies = {}
        for name, operation in (("then_branch", "Abs"), ("else_branch", "Neg")):
            node = helper.make_node(operation, [tensor], [name], name=operation)
            bodies[name] = helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, FLOAT, None)])
        return build.op("If", condition, **bodies)

    asked = job(tmp_path, encoder(), decoder(branches))
    rtx.write_plan(asked)
    layers = json.loads((asked.output / LAYERS).read_text())["decoder"]["layers"]
    assert "conditional_output" in {layer["type"] for layer in layers}
    assert all(layer["outputs"] for layer in layers)


def test_bfloat16_is_refused_early_where_the_gpu_has_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"tensorrt-rtx plans are hybrid or fp16 or fp32 for NVIDIA T4, not 'bf16'"):
        build_bundle(
            BuildRequest(gpu="t4", backend="tensorrt-rtx", precision="bf16", random_seed=0, model="small", out=tmp_path / "bundle")
        )
    assert not list(tmp_path.iterdir())
    for backend in (full, rtx):
        assert list(backend.precisions(T4)) == ["hybrid", "fp16", "fp32"]
        for target in (A40, H200, TARGETS["a100"], TARGETS["b200"], TARGETS["rtx5090"]):
            assert list(backend.precisions(target)) == ["hybrid", "fp16", "bf16", "fp32"]


def test_unknown_operation_names_the_node(tmp_path: Path) -> None:
    def determinant(build: Builder, tensor: str) -> str:
        return build.op("Unsqueeze", build.op("Det", tensor, name="volume"), np.array([2, 3]))

    asked = job(tmp_path, encoder(), decoder(determinant))
    with pytest.raises(BackendFailed, match=r"decoder\.onnx: TensorRT-RTX \S+ does not take node volume \(Det\)"):
        rtx.write_plan(asked)
    assert not (asked.output / "decoder.engine").exists()


def test_mixed_types_name_the_node_and_the_types(tmp_path: Path) -> None:
    model = decoder(lambda build, tensor: build.op("MatMul", tensor, weights(8, 8).astype(np.float32), name="product"))
    for tensor in model.graph.initializer:
        if tensor.data_type == FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    asked = job(tmp_path, encoder(), model)
    with pytest.raises(BackendFailed, match=r"node product \(MatMul\): .*`A` is of type Float and `B` is of type Half") as caught:
        rtx.write_plan(asked)
    assert "cudaError" not in str(caught.value)
    assert "/_src/" not in str(caught.value)


def test_a_node_in_a_function_names_the_function(tmp_path: Path) -> None:
    model = decoder()
    opsets = [helper.make_opsetid("", 23)]
    body = [helper.make_node("Det", ["x"], ["d"], name="volume"), helper.make_node("Identity", ["d"], ["y"])]
    model.functions.append(helper.make_function("local", "Geometry", ["x"], ["y"], body, opsets))
    model.opset_import.append(helper.make_opsetid("local", 1))
    model.graph.node.append(helper.make_node("Geometry", ["features1"], ["extra"], domain="local", name="geometry"))
    model.graph.output.append(helper.make_tensor_value_info("extra", FLOAT, None))
    with pytest.raises(BackendFailed, match=r"volume \(Det\), in geometry \(Geometry\)"):
        rtx.write_plan(job(tmp_path, encoder(), model))


def test_a_build_that_fails_says_why(tmp_path: Path) -> None:
    asked = job(
        tmp_path, encoder(), decoder(lambda build, tensor: build.op("Cast", build.op("Cast", tensor, to=BFLOAT16), to=FLOAT)), target=T4
    )
    with pytest.raises(BackendFailed, match=r"decoder\.onnx: TensorRT-RTX could not build the engine: .*sm75.*b16") as caught:
        rtx.write_plan(asked)
    assert "--verbose" in caught.value.fix
    assert not (asked.output / "decoder.engine").exists()


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    asked = job(tmp_path, encoder(), decoder())
    asked.graphs["encoder"].write_bytes(b"not a graph")
    with pytest.raises(BackendFailed, match=r"encoder\.onnx"):
        rtx.write_plan(asked)


def test_attention_in_float32_builds(tmp_path: Path) -> None:
    rtx.write_plan(job(tmp_path, encoder(), decoder(attention)))


def test_softmax_precision_is_refused_at_its_node(tmp_path: Path) -> None:
    """Passes leave it out for TensorRT; a graph that has it must not fail without a name."""
    asked = job(tmp_path, encoder(), decoder(lambda build, tensor: attention(build, tensor, softmax_precision=FLOAT)))
    with pytest.raises(BackendFailed, match=r"node attend \(Attention\)"):
        rtx.write_plan(asked)


def test_outputs_that_numpy_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match=r"encoder\.onnx: its output last_out0 is bfloat16"):
        rtx.write_plan(job(tmp_path, encoder(BFLOAT16), decoder()))


def test_out_of_memory_is_told_apart() -> None:
    failure = rtx._failure("decoder.onnx: no engine", ["[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)"])
    assert isinstance(failure, OutOfMemory)
    assert isinstance(rtx._failure("decoder.onnx: no engine", ["no implementation"]), BackendFailed)


def test_an_interrupt_stops_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []

    class Watched(module._Progress):  # type: ignore[misc, name-defined]
        def start(self, name: str, parent: str | None, steps: int) -> None:
            deadline = time.monotonic() + 1  # the build waits here until the main thread was interrupted
            while not self.cancelled and time.monotonic() < deadline:
                time.sleep(0.01)
            phases.append(name)
            super().start(name, parent, steps)

    reports: list[str] = []

    def interrupt(what: str, fraction: float) -> None:
        reports.append(what)
        if len(reports) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_Progress", Watched)
    asked = job(tmp_path, encoder(), decoder(), report=interrupt)
    with pytest.raises(KeyboardInterrupt):
        rtx.write_plan(asked)
    assert reports[1:] == ["stopping; TensorRT finishes its step first"]
    assert "Optimizing graph" not in phases  # one of the last, after several steps that could stop the build
    assert not list(asked.output.iterdir())


def test_progress_of_nested_phases() -> None:
    progress = module._Progress(trt)
    progress.start("build", None, 4)
    progress.start("tactics", "build", 2)
    assert progress.monitor.step_complete("tactics", 0)
    assert progress.fraction == pytest.approx(1 / 8)
    progress.finish("tactics")
    progress.step("build", 0)
    progress.start("tactics", "build", 10)  # again
    progress.step("tactics", 0)
    assert progress.fraction == pytest.approx((1 + 0.1) / 4)
    progress.cancelled = True
    assert not progress.monitor.step_complete("tactics", 1)


def test_standard_output_stays_clean(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """TensorRT's compiler prints a warning of its own for a bound that float16 rounds."""

    def clipped(build: Builder, tensor: str) -> str:
        low = build.op("Clip", build.op("Cast", tensor, to=HALF), np.array(1e-8, np.float16), name="clip")
        return build.op("Cast", low, to=FLOAT)

    rtx.write_plan(job(tmp_path, encoder(), decoder(clipped)))
    out, err = capfd.readouterr()
    assert out == ""
    assert "clip" in err


@pytest.fixture
def full_machine(a40_machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full library, played by the other in a machine with an A40: it builds, and has no GPU to run on."""
    pytest.importorskip("triton")
    monkeypatch.setattr(full, "_configure", lambda *what: rtx._configure(*what))
    monkeypatch.setattr(full, "_keep_timings", lambda *what: None)


def half_attention(build: Builder, tensor: str) -> str:
    """Of two heads of 32 channels, in float16."""
    tokens = build.op("Reshape", build.op("Cast", tensor, to=HALF), np.array([0, -1, 8]))
    packed = build.op("MatMul", tokens, weights(8, 3 * 64).astype(np.float16))
    heads = [build.op("Reshape", part, np.array([0, 0, 2, 32])) for part in build.split(packed, 3, -1)]
    operands = [build.op("Transpose", part, perm=[0, 2, 1, 3]) for part in heads]
    return build.op("Cast", build.op("Attention", *operands, name="attend"), to=FLOAT)


def summed_attention(build: Builder, tensor: str) -> str:
    """Of the decoder's own shape (batch, 1, 1, 8), so that it can stand in its middle."""
    tokens = build.op("ReduceMean", half_attention(build, tensor), np.array([1, 2]), keepdims=1)
    return build.op("MatMul", tokens, weights(32, 8))


made_up_gpu = made_up.gpu  # a fixture

REGISTER = "smc.plugins.flash_attention.tensorrt_plugin.register"


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (summed_attention, r"decoder\.onnx: TensorRT \S+ does not take node attend/plugin \(FlashAttention\)"),
        (attention, r"takes none of the graph's attentions \(attend: q, k and v are of type float32"),
    ],
)
def test_native_attention_is_kept_where_the_plugin_cannot_be_built(
    full_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, middle: Callable[[Builder, str], str], why: str
) -> None:
    registered: list[int] = []
    monkeypatch.setattr(REGISTER, registered.append)
    reports: list[str] = []
    asked = job(tmp_path, encoder(), decoder(middle), report=lambda what, fraction: reports.append(what))
    full.write_plan(asked)
    assert registered == [86, 86]
    layers = json.loads((asked.output / LAYERS).read_text())
    assert layers["decoder"]["attention"] == {"taken": "native", "milliseconds": {}, "why_not": ANY}
    assert re.search(why, layers["decoder"]["attention"]["why_not"])
    assert layers["encoder"]["attention"]["why_not"].endswith("takes none of the graph's attentions (it has none)")
    assert f"the decoder keeps TensorRT's own attention: {layers['decoder']['attention']['why_not']}" in reports
    assert {path.name for path in asked.output.iterdir()} == {"encoder.engine", "decoder.engine", LAYERS}


@pytest.mark.parametrize("error", [RuntimeError("at 3:5: unsupported"), KeyError("tile"), AssertionError()])
def test_native_attention_is_kept_whatever_befalls_the_plugin(
    full_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(REGISTER, Mock(side_effect=error))
    _, layers = full._build_stage(trt, "decoder", job(tmp_path, encoder(), decoder(summed_attention)))
    assert layers["attention"] == {"taken": "native", "milliseconds": {}, "why_not": str(error) or "AssertionError"}


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_native_attention_is_kept_without_the_plugins_library(full_machine: None, tmp_path: Path) -> None:
    _, layers = full._build_stage(trt, "encoder", job(tmp_path, encoder(), decoder()))
    assert layers["attention"]["why_not"].startswith("the FlashAttention plugin needs TensorRT")


def test_each_of_the_plugins_kernels_has_a_name_of_its_own() -> None:
    """Nodes that differ in an offset alone, and tactics of one node, are different kernels."""
    aot = pytest.importorskip("smc.plugins.flash_attention.aot", reason="needs triton")
    from smc.plugins.flash_attention.kernel import TILES
    from smc.plugins.flash_attention.specification import FlashAttention
    from smc.plugins.flash_attention.tensorrt_plugin import uniquely_named

    variants = [(FlashAttention(2, 32, 0.5, v_offset=offset), tile) for offset in (0, 64) for tile in TILES[-2:]]
    kernels = dict(uniquely_named(aot.compile_for(86, *variant)) for variant in variants)
    assert len(kernels) == 4
    for name, ptx in kernels.items():
        assert re.findall(r"\.entry (\w+)\(", ptx) == [name]
        assert set(re.findall(r"(\w+)_param_\d+", ptx)) == {name}


def test_an_old_gpu_gets_no_plugin(tmp_path: Path) -> None:
    with pytest.raises(BackendFailed, match=r"for sm 8\.0 and newer, and NVIDIA T4 is of sm 7\.5"):
        module._write_plugin_graph("decoder", job(tmp_path, encoder(), decoder(), target=T4), tmp_path)


@pytest.mark.parametrize(
    ("native", "plugin", "taken"), [(2.0, 1.0, "plugin"), (1.0, 2.0, "native"), (1.0, 1.0, "native"), (1.0, None, "native")]
)
def test_the_faster_attention_is_taken(
    full_machine: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: float, plugin: float | None, taken: str
) -> None:
    graphs: list[Counter[str]] = []
    shares: list[tuple[float, float]] = []

    def build(library: Any, stage: str, graph: Path, job: PlanJob, share: tuple[float, float]) -> tuple[str, dict[str, Any]]:
        model = onnx.load(graph)
        graphs.append(Counter(node.op_type for node in model.graph.node))
        shares.append(share)
        name = "plugin" if graphs[-1]["FlashAttention"] else "native"
        return name, {"engine": name}

    def measure(library: Any, stage: str, engine: str, job: PlanJob) -> float:
        time = {"native": native, "plugin": plugin}[engine]
        if time is None:
            raise BackendFailed("decoder: the engine did not run")
        return time

    monkeypatch.setattr(REGISTER, lambda sm: None)
    monkeypatch.setattr(full, "_build_graph", build)
    monkeypatch.setattr(full, "_time", measure)
    engine, layers = full._build_stage(trt, "decoder", job(tmp_path, encoder(), decoder(summed_attention)))
    assert engine == layers["engine"] == layers["attention"]["taken"] == taken
    assert layers["attention"]["milliseconds"] == {"native": native} | ({"plugin": plugin} if plugin else {})
    assert layers["attention"]["why_not"] == ("" if plugin else "decoder: the engine did not run")
    assert [(counts["Attention"], counts["FlashAttention"]) for counts in graphs] == [(1, 0), (0, 1)]
    assert shares == [(0.4, 0.7), (0.7, 1.0)]


@pytest.mark.parametrize("stage", ["encoder", "decoder"])
def test_engines_are_timed_as_the_runtime_runs_them(made_up_gpu: made_up.FakeGpu, tmp_path: Path, stage: str) -> None:
    milliseconds = full._time(made_up_gpu.trt, stage, stage.encode(), job(tmp_path, encoder(), decoder()))
    assert 0 < milliseconds < 1000
    assert made_up_gpu.executions == module._RUNS * [(stage, 0)]
    assert made_up_gpu.launches == module._RUNS - 1


def test_version_and_names() -> None:
    assert rtx.version() == trt.__version__
    assert (full.NAME, rtx.NAME) == ("tensorrt", "tensorrt-rtx")
    assert full._library is TENSORRT
    assert rtx.precisions(A40)[0] == "hybrid"
