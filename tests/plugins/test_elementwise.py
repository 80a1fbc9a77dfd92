"""The kernels of Elementwise and of Reduction: interpreted, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from smc.plugins.elementwise.launches import Tile, collapsed, default_tile, launches, tiles
from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.reduction import launches as reduction_launches
from tests.plugins.elementwise_cases import REDUCTIONS, SMALL, case, copy, packed, reduced, reduction_case
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.small_cases import errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

LARGE = (2, 3, 384, 512)
REAL = {
    "to channels first": copy(LARGE, View("float16", (384 * 512 * 3, 1, 512 * 3, 3)), packed("float32", LARGE)),
    "to channels last": copy((2, 768, 1024), View("float16", (768 * 1024, 1, 768)), packed("float16", (2, 768, 1024))),
    "into a concatenation": copy((1536, 1024), packed("float16", (1536, 1024)), View("float16", (1792, 1), 768)),
    "bfloat16": copy((1000, 100), packed("bfloat16", (1000, 100)), packed("float32", (1000, 100))),
    "to bfloat16": copy((1000, 100), packed("float32", (1000, 100)), packed("bfloat16", (1000, 100))),
    "residual": Elementwise("add", (1536, 1024), 2 * (packed("float16", (1536, 1024)),), packed("float16", (1536, 1024))),
}
SUMS = {"descriptors": reduced("l2", 20000, 24, dtype="float32"), "rows": reduced("sum", 100, 3000)}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("add", (3,), (View("float32", (1,)),), View("float32", (1,))), "add of 1 operands"),
        (("copy", (3,), (View("float32", (1, 1)),), View("float32", (1,))), "strides of another rank"),
        (("div", (3,), 2 * (View("int32", (1,)),), View("int32", (1,))), "div of integers"),
    ],
)
def test_what_cannot_be_is_refused(given: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Elementwise(*given)


def test_more_dimensions_than_the_kernel_takes_are_refused() -> None:
    shape = (2,) * 7
    operation = copy(shape, View("float32", tuple(reversed(packed("float32", shape).strides))), packed("float32", shape))
    with pytest.raises(ValueError, match="7 dimensions"):
        launches(operation, Tile(32, 1), 80)


def test_a_stride_beyond_int32_is_refused() -> None:
    with pytest.raises(ValueError, match="no int32"):
        launches(copy((2, 3), View("float16", (1 << 31, 1)), packed("float16", (2, 3))), Tile(32, 1), 80)


def test_nothing_is_launched_for_no_elements() -> None:
    assert launches(copy((2, 0), packed("float16", (2, 0)), packed("float16", (2, 0))), Tile(32, 1), 80) == []


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((2, 3, 4), ((12, 4, 1), (12, 4, 1)), ((24,), ((1,), (1,)))),
        ((2, 3, 4), ((24, 8, 1), (12, 4, 1)), ((6, 4), ((8, 1), (4, 1)))),
        ((2, 3, 4), ((0, 4, 1), (12, 4, 1)), ((2, 12), ((0, 1), (12, 1)))),
        ((2, 3, 4), ((1, 2, 6), (1, 2, 6)), ((24,), ((1,), (1,)))),
        ((1, 3, 1), ((7, 1, 9), (3, 1, 1)), ((3,), ((1,), (1,)))),
        ((3, 4), ((-4, -1), (4, 1)), ((12,), ((-1,), (1,)))),
        ((1,), ((1,), (1,)), ((), ((), ()))),
    ],
)
def test_dimensions_that_lie_one_in_the_other_become_one(shape: Any, strides: Any, expected: Any) -> None:
    assert collapsed(shape, strides) == expected


@pytest.mark.parametrize(("name", "tile"), [("to channels last", Tile(4096, 8)), ("into a concatenation", Tile(2048, 4))])
def test_what_lies_crosswise_is_cut_into_squares(name: str, tile: Tile) -> None:
    assert default_tile(REAL[name], 90) == tile
    constants = dict(launches(REAL[name], tile, 90)[0].kernel.constants)
    assert (constants["ROWS"], constants["COLUMNS"]) == ((64, 64) if name == "to channels last" else (2, 1024))
    assert constants["x4" if name == "to channels last" else "x5"] == 1


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run_cases("elementwise_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: Any, name: str) -> None:
    assert is_close(*interpreted[0][name]["out"])


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions_interpreted(interpreted: Any, name: str) -> None:
    assert is_close(*interpreted[1][name]["out"])


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_compiles_for_any_gpu(sm: int) -> None:
    made = [launch for operation in REAL.values() for launch in launches(operation, default_tile(operation, sm), sm)]
    made += [
        launch for operation in SUMS.values() for launch in reduction_launches.launches(operation, reduction_launches.Tile(1024, 4), sm)
    ]
    for launch in made:
        assert fits(compile_kernel(launch.kernel, sm), sm)
        assert launch.kernel.overlaps == (sm == 90)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_on_the_gpu(name: str) -> None:
    for tile in tiles(REAL[name], gpu_sm()):
        found = errors(case(REAL[name], tile, gpu_sm()), run_on_gpu)
        assert is_close(*found["out"]), (tile, found)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SUMS)
def test_reductions_on_the_gpu(name: str) -> None:
    for tile in reduction_launches.tiles(SUMS[name], gpu_sm()):
        found = errors(reduction_case(SUMS[name], tile, gpu_sm()), run_on_gpu)
        assert is_close(*found["out"]), (tile, found)


@pytest.mark.gpu
def test_small_cases_on_the_gpu() -> None:
    cases = {name: case(operation, tile, gpu_sm()) for name, (operation, tile) in SMALL.items()}
    cases |= {f"reduced {name}": reduction_case(operation, tile, gpu_sm()) for name, (operation, tile) in REDUCTIONS.items()}
    for name, made in cases.items():
        found = errors(made, run_on_gpu)
        assert is_close(*found["out"]), (name, found)
