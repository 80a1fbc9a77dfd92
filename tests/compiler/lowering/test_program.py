"""Programs of small graphs, whose kernels are made up: places, labels, workspaces, the matcher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from smc.compiler.launch_program import KernelTable, itemsize
from smc.compiler.lowering.lower import lower
from smc.compiler.lowering.program import ProgramWriter
from smc.compiler.lowering.weight_file import WeightFile
from smc.compiler.operations import default_tile, launches, tiles, workspace
from smc.compiler.tuning import Tuned, Tuning, TuningFile, describe, tile_fields
from smc.exported.engines.cuda_program import Float32, Int32, Plan, Pointer, Program, Step, TensorMap, decode_plan, encode_plan
from smc.passes.prepare import prepare
from smc.plugins.compile import Compiled
from smc.plugins.conv.specification import Conv
from smc.plugins.launch import Kernel
from smc.plugins.matching.specification import Matching
from tests.compiler.lowering.compiling import MadeUpKernels
from tests.passes.graphs import Builder, normal, weights

SMS = (80, 86, 89, 90, 120)


def network(dtype: type = np.float16) -> onnx.ModelProto:
    """A product with an epilogue, a convolution on its map, an enlargement, a norm and a sum."""
    b = Builder()
    x = b.input("x", [2, 12, 64], dtype)
    y = b.op("Gelu", b.op("Add", b.op("MatMul", x, weights(64, 64).astype(dtype), name="first"), weights(64).astype(dtype)))
    y = b.op("LayerNormalization", b.op("Add", y, x), normal(64).astype(dtype), name="norm")
    maps = b.op("Reshape", b.op("Transpose", y, perm=[0, 2, 1]), np.array([2, 64, 3, 4]))
    maps = b.op("Conv", maps, weights(32, 64, 3, 3).astype(dtype), weights(32).astype(dtype), pads=[1] * 4, name="conv")
    wide = b.op(
        "Resize", maps, "", np.array([1, 1, 2, 2], np.float32), mode="linear", coordinate_transformation_mode="align_corners", name="up"
    )
    b.output(b.op("Transpose", wide, perm=[0, 2, 3, 1]), dtype)
    return b.model()


def made(model: onnx.ModelProto, directory: Path, sm: int, tuning: Tuning | None = None) -> tuple[Plan, Program, bytes]:
    table = KernelTable(sm, MadeUpKernels())
    with WeightFile(directory / "weights.bin") as file:
        program = ProgramWriter(table, file, tuning or Tuning(sm)).write("stage", lower(prepare(model)))
    return Plan(tuple(table.codes), (program,), file.size), program, (directory / "weights.bin").read_bytes()


@pytest.mark.parametrize("sm", SMS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_everything_lies_inside_its_space(sm: int, dtype: type, tmp_path: Path) -> None:
    plan, program, stored = made(network(dtype), tmp_path, sm)
    assert len(stored) == plan.weights_bytes
    sizes = {"arena": program.arena_bytes, "weights": plan.weights_bytes}
    for step in program.steps:
        assert min(step.grid) >= 1
        assert 0 <= step.kernel < len(plan.kernels)
        for argument in step.arguments:
            match argument:
                case Pointer():
                    assert argument.offset % 16 == 0
                    assert 0 <= argument.offset < sizes[argument.space]
                case TensorMap():
                    assert argument.offset % 16 == 0
                    reach = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.strides, strict=True)) + 1
                    assert argument.offset + reach * argument.itemsize <= sizes[argument.space]
                case Int32(value):
                    assert -(1 << 31) <= value < 1 << 31
                case Float32():
                    pass
    assert any(isinstance(argument, TensorMap) for step in program.steps for argument in step.arguments) == (sm >= 90)
    assert decode_plan(encode_plan(plan)) == plan


def test_inputs_outputs_and_labels(tmp_path: Path) -> None:
    _, program, _ = made(network(), tmp_path, 80)
    (x,), (out,) = program.inputs.values(), program.outputs.values()
    assert (x.dtype, x.shape) == ("float16", (2, 12, 64))
    assert (out.dtype, out.shape) == ("float16", (2, 6, 8, 32))
    for region in (x, out):
        assert region.space == "arena"
        assert region.offset % 256 == 0
        assert region.offset + math.prod(region.shape) * itemsize(region.dtype) <= program.arena_bytes
    labels = list(dict.fromkeys(step.label for step in program.steps))
    assert labels == ["Gemm first", "LayerNorm norm", "Conv conv", "Upsample up"]


def test_a_graph_gives_the_same_plan_every_time(tmp_path: Path) -> None:
    """Its outputs are of one size, so that only their order says which lies where."""
    b = Builder()
    x = b.input("x", [2, 12, 64], np.float16)
    for seed in range(6):
        b.output(b.op("MatMul", x, weights(64, 64, seed=seed).astype(np.float16)), np.float16)
    model = b.model()
    plans = [made(model, tmp_path, 80)[0] for _ in range(4)]
    assert all(plan == plans[0] for plan in plans)


def test_equal_kernels_are_there_once(tmp_path: Path) -> None:
    """Two layers of the same sizes: other weights, the same machine code."""
    b = Builder()
    x = b.input("x", [2, 12, 64], np.float16)
    for seed in range(2):
        x = b.op("MatMul", x, weights(64, 64, seed=seed).astype(np.float16))
    b.output(x, np.float16)
    plan, program, _ = made(b.model(), tmp_path, 80)
    assert len(plan.kernels) == 1
    assert [step.kernel for step in program.steps] == [0, 0]
    assert program.steps[0].arguments != program.steps[1].arguments


def test_only_newer_gpus_overlap_kernels(tmp_path: Path) -> None:
    for sm in SMS:
        _, program, _ = made(network(), tmp_path, sm)
        assert {step.overlaps for step in program.steps} == {sm >= 90}


def splitting(model: onnx.ModelProto) -> Tuning:
    """One whose tile for the convolution needs memory besides the operands."""
    (operation,) = (call.operation for call in lower(prepare(model)).calls if isinstance(call.operation, Conv))
    tile = next(tile for tile in tiles(operation, 90) if workspace(operation, tile))
    return tuned(operation, tile)


def tuned(operation: Any, tile: Any) -> Tuning:
    return Tuning(90, TuningFile("h200", 90, "2025-01-01", {}, {describe(operation): Tuned(tile_fields(tile), 1.0)}))


def arena_offsets(step: Step) -> set[int]:
    return {value.offset for value in step.arguments if isinstance(value, Pointer | TensorMap) and value.space == "arena"}


def test_memory_besides_the_operands_lies_in_the_arena(tmp_path: Path) -> None:
    """A convolution whose sum is cut in parts: its first launch writes there what its second one reads."""
    plan, program, _ = made(network(), tmp_path, 90, splitting(network()))
    decode_plan(encode_plan(plan))
    first, second = (step for step in program.steps if step.label.startswith("Conv"))
    parts = arena_offsets(first) & arena_offsets(second)
    taken = {region.offset for region in (program.inputs | program.outputs).values()}
    assert parts - taken


def test_a_tile_that_does_not_go_with_an_operation_is_not_used(tmp_path: Path) -> None:
    """A tuning may know a similar operation only, whose tile this one cannot take."""
    b = Builder()
    b.output(b.op("MatMul", b.input("x", [2, 12, 64], np.float16), weights(64, 65).astype(np.float16)), np.float16)
    (call,) = lower(prepare(b.model())).calls
    tile = dataclasses.replace(default_tile(call.operation, 90), tma=True)
    _, program, _ = made(b.model(), tmp_path, 90, tuned(call.operation, tile))
    assert not any(isinstance(argument, TensorMap) for argument in program.steps[0].arguments)


def decoder_of_maps() -> onnx.ModelProto:
    """Descriptors and confidences of two views of 64x48 and 48x64, as they come in."""
    b = Builder()
    for i, (height, width) in enumerate(((48, 64), (64, 48)), 1):
        b.input(f"d{i}", [1, height, width, 24])
        b.input(f"c{i}", [1, height, width])
    for i in (1, 2):
        for name, tensor in ((f"desc{i}", f"d{i}"), (f"desc_conf{i}", f"c{i}")):
            b.op("Relu", tensor)
            b.nodes[-1].output[0] = name
            b.output(name)
    return b.model()


def test_the_matcher_reads_what_the_decoder_left(tmp_path: Path) -> None:
    table = KernelTable(90, MadeUpKernels())
    with WeightFile(tmp_path / "weights.bin") as file:
        writer = ProgramWriter(table, file, Tuning(90))
        decoder = writer.write("decoder", lower(prepare(decoder_of_maps())))
        matcher = writer.write_matcher(decoder)
    assert matcher.stage == "matcher"
    assert matcher.arena_bytes > decoder.arena_bytes
    for name, output in (("desc1", "desc1"), ("desc2", "desc2"), ("conf1", "desc_conf1"), ("conf2", "desc_conf2")):
        region, source = matcher.inputs[name], decoder.outputs[output]
        assert (region.offset, region.shape, region.dtype) == (source.offset, source.shape[1:], source.dtype)
    own = [region for name, region in (matcher.inputs | matcher.outputs).items() if name not in ("desc1", "desc2", "conf1", "conf2")]
    assert own
    assert all(region.offset >= decoder.arena_bytes for region in own)
    decode_plan(encode_plan(Plan(tuple(table.codes), (decoder, matcher), file.size)))


@pytest.mark.parametrize("trouble", ["no kernel", "too much shared memory"])
def test_matching_gets_the_default_tile_where_the_timed_one_does_not_run(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = Matching((48, 64), (64, 48), 24)
    default = default_tile(operation, 90)
    timed = dataclasses.replace(default, warps=2 * default.warps)
    unfit = {launch.kernel for launch in launches(operation, timed, 90)} - {launch.kernel for launch in launches(operation, default, 90)}

    class Kernels(MadeUpKernels):
        def try_all(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
            return [
                self._made(kernel, code) if kernel in unfit else code
                for kernel, code in zip(kernels, super().try_all(kernels, sm), strict=True)
            ]

        def _made(self, kernel: Kernel, code: Compiled | ValueError) -> Compiled | ValueError:
            assert isinstance(code, Compiled)
            return ValueError("no") if trouble == "no kernel" else dataclasses.replace(code, shared_memory=1 << 20)

    programs = []
    for tuning in (tuned(operation, timed), Tuning(90)):
        with WeightFile(tmp_path / "weights.bin") as file:
            writer = ProgramWriter(KernelTable(90, Kernels()), file, tuning)
            programs.append(writer.write_matcher(writer.write("decoder", lower(prepare(decoder_of_maps())))))
    assert programs[0] == programs[1]
