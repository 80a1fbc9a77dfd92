from __future__ import annotations

import numpy as np
import pytest

from smc.compiler.launch_program import ALIGNMENT, KernelTable, Place, assemble, itemsize
from smc.exported.engines import cuda_program
from smc.exported.engines.cuda_program import Float32, Int32, Pointer, Step, TensorMap, decode_plan, encode_plan
from smc.plugins import launch as plugin_launch
from smc.plugins.launch import Address, Descriptor, Launch, Value, launch
from tests.compiler.lowering.compiling import MadeUpKernels


def copying(rows: int = 4, offset: int = 8, block: int = 64) -> Launch:
    values: dict[str, Value] = {
        "x": Descriptor("x", "bfloat16", (rows, 64), (64, 1), (16, 32), offset=2 * offset),
        "out": Address("out", "float32", offset),
        "count": rows,
        "scale": 0.5,
    }
    return launch("smc.plugins.made_up.kernel:copying", (rows, 2, 1), values, {"BLOCK": block}, warps=4, stages=1, overlaps=True)


def table() -> KernelTable:
    return KernelTable(90, MadeUpKernels())


def test_a_step_has_its_operands_in_their_places() -> None:
    step = table().step(copying(), {"x": ("weights", 1024), "out": ("arena", 256)}, "what it is for", 1, (0,))
    assert step == Step(
        kernel=0,
        grid=(4, 2, 1),
        arguments=(
            TensorMap("weights", 1024 + 16 * 2, 6, 3, (16, 32), 2, (4, 64), (64, 1)),
            Pointer("arena", 256 + 8 * 4),
            Int32(4),
            Float32(0.5),
        ),
        overlaps=True,
        label="what it is for",
        lane=1,
        waits=(0,),
    )


def test_numbers_that_wrap_are_refused() -> None:
    places: dict[str, Place] = {"x": ("weights", 0), "out": ("arena", 0)}
    assert table().step(copying((1 << 31) - 1), places).arguments[2] == Int32((1 << 31) - 1)
    with pytest.raises(ValueError, match="2,147,483,648 does not fit 32 bits"):
        table().step(copying(1 << 31), places)


def test_equal_kernels_are_compiled_and_stored_once() -> None:
    kernels = table()
    places: dict[str, Place] = {"x": ("weights", 0), "out": ("arena", 0)}
    steps = [kernels.step(one, places) for one in (copying(4), copying(5, 16), copying(4, block=32))]
    assert [step.kernel for step in steps] == [0, 0, 1]
    first, second = kernels.codes
    assert (first.offset, second.offset) == (0, first.size)
    assert len(kernels.code) == first.size + second.size
    assert (first.name, first.threads) == ("copying", 128)


def test_what_is_compiled_and_not_used_is_not_stored() -> None:
    kernels = table()
    kernels.compile([copying().kernel, copying(block=32).kernel])
    kernels.step(copying(block=32), {"x": ("weights", 0), "out": ("arena", 0)})
    assert len(kernels.codes) == 1


def test_operands_of_one_operation_lie_side_by_side() -> None:
    operands = {"x": ("bfloat16", (4, 65)), "out": ("float32", (3,)), "other": ("uint8", ())}
    plan, code = assemble([copying()], operands, 90, MadeUpKernels())
    (program,) = plan.programs
    assert program.inputs == program.outputs
    assert [(region.offset, region.dtype, region.shape) for region in program.inputs.values()] == [
        (0, "bfloat16", (4, 65)),
        (3 * ALIGNMENT, "float32", (3,)),
        (4 * ALIGNMENT, "uint8", ()),
    ]
    assert program.arena_bytes == 5 * ALIGNMENT
    assert len(code) == sum(kernel.size for kernel in plan.kernels)


def test_a_plan_survives_its_file() -> None:
    plan, _ = assemble([copying()], {"x": ("bfloat16", (8, 64)), "out": ("float32", (64,))}, 90, MadeUpKernels())
    assert decode_plan(encode_plan(plan)) == plan


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float16", 2), ("float32", 4), ("uint8", 1), ("int64", 8)])
def test_sizes_of_types(dtype: str, size: int) -> None:
    assert itemsize(dtype) == size


def test_kernels_and_plans_have_the_same_types() -> None:
    """Neither folder may import the other's table."""
    assert plugin_launch.TYPES.keys() == cuda_program.ITEMSIZES.keys()
    assert plugin_launch.ITEMSIZES.items() <= cuda_program.ITEMSIZES.items()


def test_a_number_of_another_kind_is_no_argument() -> None:
    with pytest.raises(TypeError, match="compile-time"):
        launch("made_up", (1, 1, 1), {"flag": True}, {}, warps=1, stages=1)
    with pytest.raises(TypeError, match="no run-time argument"):
        launch("made_up", (1, 1, 1), {"count": np.int64(3)}, {}, warps=1, stages=1)  # type: ignore[dict-item]
