"""Attention as launches: under Triton's interpreter on the CPU, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.plugins.interpreting import run_cases
from tests.plugins.launching import run_on_gpu
from tests.plugins.small_cases import errors, gpu_sm, is_close

pytest.importorskip("triton")

from smc.plugins.compile import compile_kernel, fits
from smc.plugins.flash_attention.kernel import TILES
from smc.plugins.flash_attention.launches import Heads, HopperTile, default_tile, launches, tiles
from tests.plugins.attention_launch_cases import SMALL, case, contiguous, packed

hopper_tma = pytest.importorskip("triton.experimental.gluon.language.nvidia.hopper").tma

REAL = {
    "encoder": packed(2, 16, 768, 64),
    "encoder, rotated": packed(2, 16, 768, 64, tables="float32"),
    "cross": contiguous(2, 12, 700, 768, 64),
    "bfloat16": packed(1, 4, 333, 64, dtype="bfloat16"),
    "float32": packed(1, 4, 333, 64, dtype="float32"),
    "head size 128": contiguous(2, 3, 200, 300, 128),
}


@pytest.fixture(scope="module")
def interpreted() -> Any:
    return run_cases("attention_launch_cases")


@pytest.mark.parametrize("name", SMALL)
def test_interpreted(interpreted: Any, name: str) -> None:
    assert is_close(*interpreted[name]["out"])


@pytest.mark.parametrize(
    ("sm", "dtype", "head_size", "tables"),
    [
        (80, "float16", 64, None),
        (86, "float16", 64, "float32"),
        (86, "bfloat16", 128, "float32"),
        (86, "float32", 128, None),
        (89, "float16", 64, None),
        (90, "float16", 64, None),
        (90, "bfloat16", 64, "float16"),
        (90, "float32", 64, None),
    ],
)
def test_the_default_fits(sm: int, dtype: Any, head_size: int, tables: Any) -> None:
    operation = packed(2, 4, 768, head_size, dtype=dtype, tables=tables)
    (made,) = launches(operation, default_tile(operation, sm), sm)
    assert fits(compile_kernel(made.kernel, sm), sm)
    assert made.kernel.overlaps == (sm == 90)


def test_the_hopper_kernel_compiles() -> None:
    for operation in (packed(2, 16, 768, 64), packed(2, 3, 700, 64, dtype="bfloat16"), contiguous(1, 2, 65, 100, 32)):
        for tile in (tile for tile in tiles(operation, 90) if isinstance(tile, HopperTile)):
            (made,) = launches(operation, tile, 90)
            compiled = compile_kernel(made.kernel, 90)
            assert fits(compiled, 90)
            assert compiled.threads == 128 * (tile.groups + 1)


@pytest.mark.parametrize(
    "operation",
    [
        packed(2, 4, 768, 64, tables="float32"),
        packed(2, 4, 768, 64, dtype="float32"),
        packed(2, 4, 768, 128),
        contiguous(2, 1, 20, 33, k=Heads(batch=-33 * 32, row=32, head=32, offset=33 * 32)),
        contiguous(2, 1, 20, 33, k=Heads(batch=0, row=32, head=32)),
    ],
    ids=["rotation", "float32", "large heads", "backwards", "the same keys"],
)
def test_what_does_not_suit_the_hopper_kernel_is_refused(operation: Any) -> None:
    assert not any(isinstance(tile, HopperTile) for tile in tiles(operation, 90))
    with pytest.raises(ValueError, match=r"is for sm 9\.0"):
        launches(operation, HopperTile(3, 128, 3), 90)


@pytest.mark.parametrize(("n", "heads", "groups"), [(768, 16, 3), (768, 12, 3), (512, 16, 2), (1536, 16, 3)])
def test_the_default_fills_the_gpu(n: int, heads: int, groups: int) -> None:
    assert default_tile(packed(2, heads, n, 64), 90) == HopperTile(groups, 128, 3)


def test_strides_of_a_single_batch_do_not_matter() -> None:
    one = contiguous(1, 4, 768, 768, 64)
    assert isinstance(default_tile(replace(one, q=replace(one.q, batch=0)), 90), HopperTile)


def test_the_hopper_kernel_is_for_hopper() -> None:
    assert not any(isinstance(tile, HopperTile) for sm in (80, 86, 89, 100, 120) for tile in tiles(REAL["encoder"], sm))


def test_defaults_are_among_those_timed() -> None:
    for operation in REAL.values():
        for sm in (86, 90):
            assert default_tile(operation, sm) in tiles(operation, sm)


def test_one_kernel_serves_all_numbers_of_tokens() -> None:
    operations = [packed(batch, 16, n, 64) for batch, n in ((2, 768), (8, 512), (2, 1024))]
    for tile in (TILES[0], HopperTile(3, 128, 3)):
        assert len({launches(operation, tile, 90)[0].kernel for operation in operations}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_on_the_gpu(name: str) -> None:
    for tile in tiles(REAL[name], gpu_sm()):
        if isinstance(tile, HopperTile) and not hasattr(hopper_tma, "async_load"):
            continue  # a Triton older than 3.9 cannot compile it
        if REAL[name].dtype == "float32" or REAL[name].head_size == 64 or tile == default_tile(REAL[name], gpu_sm()):
            found = errors(case(REAL[name], tile, gpu_sm()), run_on_gpu)
            assert is_close(*found["out"]), (tile, found)


@pytest.mark.gpu
def test_small_cases_on_the_gpu() -> None:
    for operation in SMALL.values():
        found = errors(
            case(operation, TILES[1] if operation.dtype == "float16" else default_tile(operation, gpu_sm()), gpu_sm()), run_on_gpu
        )
        assert is_close(*found["out"]), (operation, found)
