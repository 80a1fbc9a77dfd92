"""What the kernels of the small operations have to pass alike: under Triton's interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest

from smc.compiler.operations import default_tile, launches, tiles
from tests.plugins import descriptor_head_cases, layer_norm_cases, patches_cases
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.small_cases import Errors, errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

FAMILIES = {"descriptor_head": descriptor_head_cases, "layer_norm": layer_norm_cases, "patches": patches_cases}
SMALL = [(family, name) for family, cases in FAMILIES.items() for name in cases.SMALL]
REAL = [(family, name) for family, cases in FAMILIES.items() for name in cases.REAL]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Errors]]:
    return {family: run_cases(f"{family}_cases") for family in FAMILIES}


@pytest.mark.parametrize(("family", "name"), SMALL)
def test_interpreted(interpreted: dict[str, dict[str, Errors]], family: str, name: str) -> None:
    found = interpreted[family][name]
    assert found
    assert all(is_close(*error) for error in found.values())


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
@pytest.mark.parametrize("cases", FAMILIES.values(), ids=FAMILIES)
def test_compiles_for_any_gpu(cases: ModuleType, sm: int) -> None:
    for operation in cases.REAL.values():
        (made,) = launches(operation, default_tile(operation, sm), sm)
        assert fits(compile_kernel(made.kernel, sm), sm)
        assert made.kernel.overlaps == (sm == 90)


@pytest.mark.parametrize(("family", "name"), REAL)
def test_defaults_are_among_those_timed(family: str, name: str) -> None:
    operation = FAMILIES[family].REAL[name]
    candidates = tiles(operation, 90)
    assert default_tile(operation, 90) in candidates
    assert len(set(candidates)) == len(candidates)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "name"), REAL)
def test_on_the_gpu(family: str, name: str) -> None:
    cases: Any = FAMILIES[family]
    for tile in tiles(cases.REAL[name], gpu_sm()):
        found = errors(cases.case(cases.REAL[name], tile, gpu_sm()), run_on_gpu)
        assert all(is_close(*error) for error in found.values()), (tile, found)


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "name"), SMALL)
def test_small_cases_on_the_gpu(family: str, name: str) -> None:
    cases: Any = FAMILIES[family]
    operation, tile = cases.SMALL[name]
    found = errors(cases.case(operation, tile, gpu_sm()), run_on_gpu)
    assert all(is_close(*error) for error in found.values()), found
