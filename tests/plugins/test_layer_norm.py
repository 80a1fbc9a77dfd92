"""LayerNorm's kernel: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from smc.plugins.layer_norm import reference
from smc.plugins.layer_norm.launches import Tile, default_tile, launches, tiles
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.layer_norm_cases import BOTH, SMALL, case, contiguous
from tests.plugins.small_cases import errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

REAL = {
    "encoder": contiguous(1, 1536, 1024, **BOTH),
    "decoder": contiguous(2, 768, 768, scale="float32", bias="float32"),
    "one row": contiguous(1, 1, 768),
    "float32": contiguous(2, 100, 768, **BOTH, dtype="float32", out_dtype="float32"),
    "bfloat16": contiguous(2, 100, 1024, scale="bfloat16", bias="bfloat16", dtype="bfloat16", out_dtype="bfloat16"),
    "into a concatenation": contiguous(2, 99, 768, **BOTH, out_row=1792, out_group=99 * 1792, out_offset=1024),
}


def test_the_reference_is_torchs() -> None:
    x, scale, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 32), (32,), (32,)))
    expected = F.layer_norm(x, (32,), scale, bias, 1e-5)
    np.testing.assert_allclose(reference.layer_norm(x, scale, bias, 1e-5), expected, rtol=1e-12, atol=1e-13)


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run_cases("layer_norm_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: Any, name: str) -> None:
    assert all(is_close(*error) for error in interpreted[name].values())


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
def test_compiles_for_any_gpu(sm: int) -> None:
    for operation in (REAL["encoder"], REAL["bfloat16"]):
        (made,) = launches(operation, default_tile(operation, sm), sm)
        assert fits(compile_kernel(made.kernel, sm), sm)
        assert made.kernel.overlaps == (sm == 90)


def test_one_kernel_serves_all_numbers_of_rows() -> None:
    kernels = {launches(contiguous(1, rows, 1024, **BOTH), Tile(1, 4), 90)[0].kernel for rows in (768, 1536, 3072)}
    assert len(kernels) == 1


def test_defaults_are_among_those_timed() -> None:
    for operation in REAL.values():
        candidates = tiles(operation, 90)
        assert default_tile(operation, 90) in candidates
        assert len(set(candidates)) == len(candidates)


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_on_the_gpu(name: str) -> None:
    for tile in (default_tile(REAL[name], gpu_sm()), Tile(4, 4)):
        found = errors(case(REAL[name], tile, gpu_sm()), run_on_gpu)
        assert all(is_close(*error) for error in found.values()), (tile, found)


@pytest.mark.gpu
def test_small_cases_on_the_gpu() -> None:
    for operation, tile in SMALL.values():
        found = errors(case(operation, tile, gpu_sm()), run_on_gpu)
        assert all(is_close(*error) for error in found.values()), (operation, found)
