"""FastNN-Lite's launches: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from smc.exported.errors import BadInput
from smc.plugins.launch import Address, Descriptor
from smc.plugins.matching.launches import INPUTS, OUTPUTS, default_tile, launches, operand_shapes, tiles, workspace
from smc.plugins.matching.specification import MAX_STARTS, Matching
from tests.plugins.interpreting import run_cases
from tests.plugins.matching_cases import CASES, RESULTS, Case, Maps, answer, ask, difference, maps

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

USUAL = Matching((384, 512), (384, 512))

# What is launched


@pytest.mark.parametrize(("shape", "size"), [((0, 5), 24), ((5, 1 << 15), 24), ((2100, 2100), 24), ((4, 4), 0), ((4, 4), 128)])
def test_what_does_not_fit_is_refused(shape: tuple[int, int], size: int) -> None:
    with pytest.raises(ValueError, match="fit"):
        Matching((4, 4), shape, size)


@pytest.mark.parametrize(
    ("shapes", "starts"),
    [(((384, 512), (512, 384)), 3072), (((1, 1), (2, 3)), 256), (((4, 4), (48, 1024)), 768), (((2000, 2000), (4, 4)), MAX_STARTS)],
)
def test_starting_points_at_once_are_those_of_the_usual_grid(shapes: Any, starts: int) -> None:
    assert Matching(*shapes).starts == starts


@pytest.mark.parametrize("sm", [86, 90])
def test_the_launches_use_the_operands_within_their_sizes(sm: int) -> None:
    op = Matching((384, 512), (288, 512))
    for tile in tiles(op, sm):
        memory = operand_shapes(op) | workspace(op, tile)
        assert {*INPUTS, *OUTPUTS} == set(operand_shapes(op))
        made = launches(op, tile, sm)
        assert len(made) == 44
        assert [launch.kernel.overlaps for launch in made] == [False] + [sm >= 90] * 43
        used = set()
        for value in (value for launch in made for value in launch.values):
            if isinstance(value, Address | Descriptor):
                used.add(value.operand)
                dtype, shape = memory[value.operand]
                assert value.dtype == dtype
                assert value.offset < np.prod(shape)
                assert value.offset * np.dtype(value.dtype).itemsize % 16 == 0
        assert used == set(memory)


# Under the interpreter


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    return run_cases("matching_cases")


@pytest.mark.parametrize("name", RESULTS)
def test_interpreted(interpreted: dict[str, str], name: str) -> None:
    assert interpreted[name] == ""


def test_every_interpreted_result_is_looked_at(interpreted: dict[str, str]) -> None:
    assert sorted(interpreted) == sorted(RESULTS)


# Ahead of time, with no GPU


@pytest.mark.parametrize("sm", [86, 90])
def test_all_kernels_compile(sm: int) -> None:
    kernels = {launch.kernel for launch in launches(USUAL, default_tile(USUAL, sm), sm)}
    assert len(kernels) == 8  # search and settle for either way, and four more
    for kernel in kernels:
        assert fits(compile_kernel(kernel, sm), sm)


@pytest.mark.parametrize("sm", [80, 89, 120])
def test_the_search_compiles(sm: int) -> None:
    search = launches(USUAL, default_tile(USUAL, sm), sm)[2]
    assert fits(compile_kernel(search.kernel, sm), sm)


# On a GPU


def on_the_gpu(op: Matching, given: Maps) -> Any:
    """A matcher of this machine's first GPU with maps in place, in memory that held NaN."""
    from smc.compiler.launch_program import assemble
    from smc.exported.engines import cuda_launch
    from smc.exported.engines import cuda_memory as cuda
    from smc.exported.engines.cuda_matching import CudaMatcher
    from tests.plugins.launching import sm_number

    device = cuda.devices()[0]
    cuda.use_device(device.index)
    sm = sm_number(device.sm)
    tile = default_tile(op, sm)
    plan, code = assemble(launches(op, tile, sm), operand_shapes(op) | workspace(op, tile), sm)
    program = plan.programs[0]
    pool, stream = cuda.device_pool(), cuda.Stream()
    arena = cuda.DeviceArray(pool, (program.arena_bytes,), np.uint8)
    poison = np.full(program.arena_bytes, 0xFF, np.uint8)
    stream.copy(arena.address, poison.ctypes.data, poison.nbytes)
    kernels = cuda_launch.Kernels(code, plan.kernels)
    matcher = CudaMatcher(program, kernels, {"arena": arena.address, "weights": 0}, stream, cuda.pinned_pool())
    for name, array in zip(("desc1", "desc2", "conf1", "conf2"), given, strict=True):
        stream.copy(arena.address + program.inputs[name].offset, array.ctypes.data, array.nbytes)
    stream.synchronize()
    return matcher, arena


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_small_maps_on_the_gpu(case: Case) -> None:
    given = maps(case)
    matcher, _arena = on_the_gpu(Matching(case.shape1, case.shape2, given[0].shape[2]), given)
    assert difference(ask(case, matcher), answer(case)) == ""


@pytest.mark.gpu
@pytest.mark.parametrize("fields", ["random", "copy"])
@pytest.mark.parametrize("shape1", [(384, 512), (512, 384)])
def test_real_sizes_on_the_gpu(shape1: tuple[int, int], fields: str) -> None:
    """Of the matches 0.999 are those of float32, whose sums the plain version takes in another order."""
    cases = [
        Case("", fields, shape1, (384, 512), (("subsample", 8),)),
        Case("", fields, shape1, (384, 512), (("subsample", 16),), both_ways=True),
        Case("", fields, shape1, (384, 512), (("subsample", 8), ("pixel_tol", 5.0))),
        Case("", fields, shape1, (384, 512), (("subsample", 6),)),
    ]
    matcher, _arena = on_the_gpu(Matching(shape1, (384, 512)), maps(cases[0]))
    for case in cases:
        found, wanted = (_pairs(each) for each in (ask(case, matcher), answer(case)))
        assert found == _pairs(ask(case, matcher))
        assert len(found & wanted) >= 0.999 * len(found | wanted)


@pytest.mark.gpu
def test_descriptors_that_are_not_finite_are_refused_on_the_gpu() -> None:
    case = Case("", "random", (60, 80), (40, 70))
    for place in range(2):
        given = maps(case)
        given[place][30, 40, 5] = np.nan
        matcher, _arena = on_the_gpu(Matching(case.shape1, case.shape2), given)
        with pytest.raises(BadInput, match="NaN or infinite"):
            matcher.fast_reciprocal_nn()


def _pairs(found: tuple[NDArray[Any], ...]) -> set[tuple[int, ...]]:
    return {tuple(row) for row in np.hstack(found[:2]).tolist()}
