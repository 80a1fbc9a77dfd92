"""Resize's kernels give the reference's bytes, all of them."""

from __future__ import annotations

import pytest

from smc.plugins.resize.kernels import ACROSS, DOWN
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.resize_cases import REAL, SMALL, wrong

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits


@pytest.fixture(scope="module")
def interpreted() -> dict[str, int]:
    return run_cases("resize_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: dict[str, int], name: str) -> None:
    assert interpreted[name] == 0


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 120])
def test_compiles_for_any_gpu(sm: int) -> None:
    for kernel in (ACROSS, DOWN):
        assert fits(compile_kernel(kernel, sm), sm)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_the_gpu(name: str) -> None:
    assert wrong(SMALL[name], run_on_gpu) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_on_the_gpu(name: str) -> None:
    assert wrong(REAL[name], run_on_gpu) == 0
