"""The matrix product's kernels: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from smc.plugins.gemm.launches import Tile, default_tile, hopper_tile, launches, tiles
from smc.plugins.gemm.specification import Gemm, Rotary, Scatter
from smc.plugins.launch import Descriptor
from tests.plugins.gemm_cases import HOPPER, SMALL, errors, plain
from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.small_cases import gpu_sm

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits

# The specification


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"m": 0}, "groups, m, n, k are 1, 0, 32, 32"),
        ({"a_offset": 4}, "a starts at element 4"),
        ({"out_offset": -8}, "out starts at element -8"),
        ({"residual": "float32", "r_offset": 2}, "residual starts at element 2"),
        ({"rotary": Rotary(64, 8, 8)}, "64 columns to rotate of 32"),
        ({"rotary": Rotary(24, 8, 8)}, "24 columns to rotate of 32, in heads of 16"),
        ({"scatter": Scatter(3, 8)}, "32 x 32 outputs cannot be scattered"),
        ({"scatter": Scatter(2, 12)}, "32 x 32 outputs cannot be scattered"),
    ],
)
def test_what_cannot_be_is_refused(attributes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        plain(1, **{"m": 32, "n": 32, "k": 32} | attributes)


def test_tma_that_cannot_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 16 bytes"):
        launches(plain(1, 32, 33, 32), Tile(32, 32, 32, 4, 3, tma=True), 90)


@pytest.mark.parametrize(
    "tile",
    [
        hopper_tile(2, 64, 0, 3, False, 40, 4, 64),
        hopper_tile(3, 64, 0, 3, True, 40, 4, 64),
        hopper_tile(2, 64, 0, 3, True, warps=8),
    ],
    ids=["turns without a producer", "turns of three", "two consumers of eight warps"],
)
def test_tiles_that_the_hopper_kernel_cannot_do_are_refused(tile: Tile) -> None:
    with pytest.raises(ValueError, match="turns are for two consumers"):
        launches(plain(1, 256, 256, 256), tile, 90)


def test_rows_of_one_group_are_described_by_their_own_stride() -> None:
    (launch,) = launches(plain(1, 128, 128, 64, out_group=10401), hopper_tile(1, 64, 0, 3, True), 90)
    (out,) = (value for value in launch.values if isinstance(value, Descriptor) and value.operand == "out")
    assert out.strides == (128, 128, 1)


# The kernel's arithmetic, on the CPU


@pytest.fixture(scope="module")
def interpreted() -> dict[str, tuple[float, float]]:
    """Errors of the small cases."""
    return run_cases("gemm_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: dict[str, tuple[float, float]], name: str) -> None:
    ours, plainly = interpreted[name]
    assert ours <= 2 * plainly


def test_the_activation_is_far_finer_than_float16() -> None:
    near, far = run_cases("gelu_case")
    assert near < 7e-7
    assert far < 1e-30  # float64 itself is not 0 at -12


# Ahead of time, with no GPU

FULL = plain(2, 768, 2304, 768, bias="float16", rotary=Rotary(1536, 768, 32), residual="float32", out_relu=True)
SCATTERED = plain(2, 768, 4 * 192, 192, scatter=Scatter(2, 32), out_row=192, bias="float32", activation="gelu")


@pytest.mark.parametrize("sm", [80, 86, 89, 90])
@pytest.mark.parametrize(
    "op",
    [FULL, SCATTERED, replace(FULL, dtype="float32"), replace(FULL, dtype="bfloat16")],
    ids=["full", "scattered", "float32", "bfloat16"],
)
def test_the_default_tile_compiles_and_fits(op: Gemm, sm: int) -> None:
    (launch,) = launches(op, default_tile(op, sm), sm)
    assert fits(compile_kernel(launch.kernel, sm), sm)


@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_kernel_compiles_and_fits(name: str) -> None:
    _needs_gluon()
    (launch,) = launches(*HOPPER[name], 90)
    assert fits(compile_kernel(launch.kernel, 90), 90)


@pytest.mark.parametrize("name", ["two consumers", "turns"])
def test_the_hopper_kernel_takes_bfloat16(name: str) -> None:
    _needs_gluon()
    op, tile = HOPPER[name]
    (launch,) = launches(replace(op, dtype="bfloat16", out_dtype="bfloat16", residual=op.residual and "bfloat16"), tile, 90)
    assert fits(compile_kernel(launch.kernel, 90), 90)


@pytest.mark.parametrize("sm", [86, 90])
def test_there_are_tiles_to_time(sm: int) -> None:
    for op in (FULL, SCATTERED, plain(1, 5, 7, 3)):
        assert default_tile(op, sm) in tiles(op, sm)


# On a GPU


def _real() -> dict[str, Gemm]:
    rotary = Rotary(1536, 768, 32)
    return {
        "qkv": plain(2, 768, 2304, 768, bias="float16", rotary=rotary),
        "out": plain(1, 1536, 1024, 1024, bias="float16", residual="float16"),
        "up": plain(1, 1536, 4096, 1024, bias="float16", activation="gelu"),
        "other view": plain(2, 768, 1536, 768, a_group=-768 * 768, a_offset=768 * 768, rotary=replace(rotary, columns=768), bias="float16"),
        "odd": plain(2, 771, 1000, 328, bias="float32", residual="float32", out_dtype="float32"),
        "odder": plain(3, 201, 333, 77, bias="float32", activation="relu", out_relu=True),
        "transposed convolution": plain(2, 768, 16 * 96, 96, scatter=Scatter(4, 32), out_row=96, out_group=16 * 768 * 96, bias="float16"),
        "slices": plain(
            2, 700, 768, 1024, a_row=1536, a_group=768 * 1536, a_offset=256, out_row=1792, out_group=768 * 1792, out_offset=1024
        ),
    }  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("name", _real())
def test_real_sizes_on_the_gpu(name: str) -> None:
    op = _real()[name]
    ours, plainly = errors(op, default_tile(op, gpu_sm()), gpu_sm(), run_on_gpu, seed=1)
    assert ours <= 2 * plainly


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(8))
def test_tiles_on_the_gpu(index: int) -> None:
    op = _real()["qkv"]
    candidates = [tile for tile in tiles(op, gpu_sm()) if not tile.consumers]
    ours, plainly = errors(op, candidates[index * len(candidates) // 8], gpu_sm(), run_on_gpu, seed=2)
    assert ours <= 2 * plainly


@pytest.mark.gpu
@pytest.mark.parametrize("name", HOPPER)
def test_the_hopper_kernel(name: str) -> None:
    if gpu_sm() != 90:
        pytest.skip("for sm 9.0 alone")
    _needs_gluon()
    op, tile = HOPPER[name]
    # The tensor cores round each sum of 16 products towards 0: what a float32 output shows and a float16 one hides.
    truncated = op.k / 16 * 2.0**-24 if op.out_dtype == "float32" else 0.0
    for seed in range(2):
        ours, plainly = errors(op, tile, 90, run_on_gpu, seed)
        assert ours <= 2 * plainly + truncated


@pytest.mark.gpu
@pytest.mark.parametrize("name", SMALL)
def test_small_cases_on_the_gpu(name: str) -> None:
    op, tile = SMALL[name]
    ours, plainly = errors(op, replace(tile, block_m=64, block_n=64), gpu_sm(), run_on_gpu)
    assert ours <= 2 * plainly


def _needs_gluon() -> None:
    if not hasattr(pytest.importorskip("triton.experimental.gluon"), "aggregate"):
        pytest.skip("this Triton's Gluon is too old")
