"""Matrix products for the kernels, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.gemm_cases

prints, as JSON, each small case's errors on the CPU: the kernel's and a plain computation's of the same precision.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.gemm import reference
from smc.plugins.gemm.launches import Tile, hopper_tile, launches
from smc.plugins.gemm.specification import Gemm, Rotary, Scatter
from smc.plugins.launch import Launch
from tests.plugins.launching import interpret

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Launch, Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]

GAP = 8
"""Elements beyond each operand's last, which must stay as they are in outputs."""


def plain(groups: int, m: int, n: int, k: int, **more: Any) -> Gemm:
    """Contiguous operands but where `more` says otherwise."""
    made: dict[str, Any] = {"a_row": k, "a_group": m * k, "out_row": n, "out_group": m * n, "r_row": n, "r_group": m * n} | more
    return Gemm(groups=groups, m=m, n=n, k=k, **made)


SMALL: dict[str, tuple[Gemm, Tile]] = {
    "one tile": (plain(1, 32, 32, 32), Tile(32, 32, 32, 4, 2)),
    "odd sizes": (plain(2, 37, 45, 50), Tile(32, 32, 32, 4, 2)),
    "one row": (plain(1, 1, 33, 17), Tile(32, 32, 32, 4, 2)),
    "other view's rows": (plain(2, 40, 32, 64, a_group=-40 * 64, a_offset=40 * 64), Tile(32, 32, 32, 4, 2)),
    "the same rows": (plain(3, 20, 40, 32, a_group=0), Tile(32, 32, 32, 4, 2)),
    "slices": (
        plain(2, 33, 24, 40, a_row=64, a_group=40 * 64, a_offset=16, out_row=48, out_group=33 * 48, out_offset=24),
        Tile(32, 32, 32, 4, 2),
    ),
    "shared weight": (plain(2, 33, 40, 32, w_shared=True, bias="float32", bias_shared=True), Tile(32, 32, 32, 4, 2)),
    "bias gelu": (plain(2, 33, 40, 32, bias="float16", activation="gelu"), Tile(32, 32, 32, 4, 2, swath=1)),
    "relu residual": (
        plain(2, 33, 40, 32, activation="relu", residual="float16", r_row=48, r_offset=16, out_dtype="float32"),
        Tile(32, 32, 32, 4, 2),
    ),
    "two outputs": (plain(2, 33, 40, 32, bias="float32", residual="float32", out_relu=True), Tile(32, 32, 32, 4, 2)),
    "rotary": (plain(2, 42, 96, 32, bias="float16", rotary=Rotary(64, 21, 16)), Tile(32, 32, 32, 4, 2)),
    "rotary across a tile": (plain(1, 40, 96, 32, rotary=Rotary(48, 20, 8, "float16"), residual="float16"), Tile(32, 64, 32, 4, 2)),
    "scatter": (
        plain(2, 24, 4 * 12, 24, bias="float32", scatter=Scatter(2, 6), out_row=12, r_row=12, residual="float16"),
        Tile(32, 32, 32, 4, 2),
    ),
    "scatter into a slice": (
        plain(1, 30, 16 * 8, 40, scatter=Scatter(4, 5), out_row=24, out_offset=8, out_group=0), Tile(32, 64, 32, 4, 2)
    ),
    "float32 gelu": (plain(1, 37, 40, 50, dtype="float32", out_dtype="float32", activation="gelu"), Tile(32, 32, 32, 4, 2)),
    "float32": (plain(2, 37, 40, 50, dtype="float32", out_dtype="float32", bias="float32"), Tile(32, 32, 32, 4, 2)),
    "tma": (plain(2, 37, 40, 48, bias="float16"), Tile(32, 32, 32, 4, 2, tma=True)),
    "tma other view's rows": (plain(2, 40, 32, 64, a_group=-40 * 64, a_offset=40 * 64), Tile(32, 32, 32, 4, 2, tma=True)),
    "tma the same rows": (plain(3, 40, 32, 64, a_group=0, w_shared=True), Tile(32, 32, 32, 4, 2, tma=True)),
}  # fmt: skip


HOPPER: dict[str, tuple[Gemm, Tile]] = {
    "one consumer": (plain(1, 768, 768, 768), hopper_tile(1, 128, 0, 4, True)),
    "two consumers": (plain(2, 768, 768, 768, bias="float16", residual="float16"), hopper_tile(2, 64, 32, 6, True)),
    "three consumers": (plain(1, 1536, 3072, 1024, bias="float16", rotary=Rotary(2048, 768, 32)), hopper_tile(3, 128, 64, 4, False)),
    "wide": (plain(1, 1536, 4096, 1024, bias="float16", activation="gelu"), hopper_tile(3, 256, 0, 3, False)),
    "several tiles a program": (plain(2, 768, 4096, 512, bias="float32", activation="gelu"), hopper_tile(2, 256, 0, 3, True, 50)),
    "three, several tiles": (plain(2, 768, 2048, 320, residual="float32"), hopper_tile(3, 128, 32, 4, False, 29)),
    "fewer steps than stages": (plain(2, 300, 512, 96, activation="relu"), hopper_tile(2, 128, 0, 5, True, 7)),
    "three, fewer steps": (plain(2, 300, 512, 96, activation="relu"), hopper_tile(3, 64, 0, 6, False, 5)),
    "odd": (plain(3, 771, 1000, 328, bias="float32", residual="float32", out_dtype="float32"), hopper_tile(2, 128, 64, 4, True)),
    "float32 rows": (plain(2, 768, 768, 768, bias="float16", residual="float32", out_dtype="float32"), hopper_tile(2, 64, 32, 6, True)),
    "float32 rows, one consumer": (
        plain(2, 700, 768, 3072, bias="float16", residual="float32", out_dtype="float32"),
        hopper_tile(1, 128, 0, 3, True),
    ),
    "float32 rows, several tiles": (
        plain(2, 768, 768, 192, bias="float16", residual="float32", out_dtype="float32"),
        hopper_tile(2, 128, 0, 4, True, 29),
    ),
    "rotary across a piece": (
        plain(1, 400, 360, 192, rotary=Rotary(48, 100, 8, "float16"), residual="float16"),
        hopper_tile(2, 128, 0, 4, True),
    ),
    "other view's rows": (
        plain(2, 768, 1536, 768, a_group=-768 * 768, a_offset=768 * 768, rotary=Rotary(768, 768, 32), bias="float16"),
        hopper_tile(3, 64, 32, 5, False),
    ),
    "eight warps": (plain(1, 1536, 4096, 1024, bias="float16", activation="gelu"), hopper_tile(1, 128, 64, 4, True, 132, 8)),
    "eight warps with a residual": (plain(2, 700, 768, 768, bias="float16", residual="float16"), hopper_tile(1, 128, 0, 4, True, 0, 8)),
    "turns": (plain(1, 1536, 4096, 1024, bias="float16", activation="gelu"), hopper_tile(2, 128, 0, 5, True, 132, 4, 128)),
    "wide turns": (plain(1, 1536, 3072, 1024, bias="float16", rotary=Rotary(2048, 768, 32)), hopper_tile(2, 256, 0, 4, True, 132, 4, 64)),
    "turns of two parts": (
        plain(2, 768, 3840, 768, bias="float16", rotary=Rotary(2304, 768, 32)),
        hopper_tile(2, 128, 64, 4, True, 132, 4, 128),
    ),
    "long turns": (plain(2, 768, 768, 3072, bias="float16", residual="float16"), hopper_tile(2, 128, 0, 5, True, 29, 4, 128)),
    "turns with fewer steps than stages": (plain(2, 300, 512, 96, activation="relu"), hopper_tile(2, 64, 0, 5, True, 7, 4, 64)),
    "turns of one step": (plain(2, 300, 512, 64, bias="float32"), hopper_tile(2, 64, 0, 3, True, 3, 4, 64)),
    "a turn for one": (plain(1, 100, 128, 512, residual="float32", out_dtype="float32"), hopper_tile(2, 128, 0, 4, True, 132, 4, 128)),
    "odd turns": (
        plain(3, 771, 1000, 328, bias="float32", residual="float32", out_dtype="float32"),
        hopper_tile(2, 64, 32, 4, True, 40, 4, 128),
    ),
    "one without producer": (plain(2, 500, 384, 768, bias="float16", residual="float16"), hopper_tile(1, 128, 0, 3, False)),
    "two without producer": (plain(2, 768, 1536, 768, bias="float16", rotary=Rotary(768, 768, 32)), hopper_tile(2, 128, 0, 3, False)),
    "three with a residual": (plain(2, 700, 768, 768, bias="float16", residual="float16"), hopper_tile(3, 64, 32, 4, False)),
    "the same rows": (plain(3, 200, 320, 256, a_group=0, w_shared=True), hopper_tile(1, 64, 0, 6, True)),
    "scatter": (
        plain(2, 768, 16 * 96, 96, bias="float16", scatter=Scatter(4, 32), out_row=96, out_group=16 * 768 * 96),
        hopper_tile(2, 64, 32, 2, True),
    ),
    "two outputs": (plain(2, 333, 400, 320, bias="float32", residual="float16", out_relu=True), hopper_tile(2, 64, 0, 6, True)),
    "slices": (
        plain(2, 700, 768, 1024, a_row=1536, a_group=768 * 1536, a_offset=256, out_row=1792, out_group=768 * 1792, out_offset=1024),
        hopper_tile(3, 128, 0, 4, False),
    ),
}
"""For the kernel of sm 9.0, on a GPU."""


def operands(op: Gemm, seed: int = 0) -> Arrays:
    """Fresh random operands, as flat arrays; outputs are NaN."""
    random = np.random.default_rng(seed)

    def normal(count: int, dtype: str, scale: float = 1.0) -> NDArray[Any]:
        return (scale * random.standard_normal(count)).astype(dtype)

    made = {
        "a": normal(_end(op.a_offset, op.a_group, op.a_row, op) + op.k + GAP, op.dtype),
        "weight": normal((1 if op.w_shared else op.groups) * op.k * op.n, op.dtype, op.k**-0.5),
    }
    if op.bias is not None:
        made["bias"] = normal((1 if op.bias_shared else op.groups) * op.n, op.bias)
    if op.rotary is not None:
        angles = 3 * random.standard_normal((op.rotary.tokens, op.rotary.half))
        made |= {"cos": np.cos(angles).astype(op.rotary.dtype).ravel(), "sin": np.sin(angles).astype(op.rotary.dtype).ravel()}
    if op.residual is not None:
        made["residual"] = normal(int(reference.positions(op, op.r_offset, op.r_group, op.r_row).max()) + 1 + GAP, op.residual)
    for name in ("out", "out_relu") if op.out_relu else ("out",):
        count = int(reference.positions(op, op.out_offset, op.out_group, op.out_row).max()) + 1 + GAP
        made[name] = np.full(count, np.nan, op.out_dtype)
    return made


def _end(offset: int, group: int, row: int, op: Gemm) -> int:
    return offset + max(0, (op.groups - 1) * group) + (op.m - 1) * row


def errors(op: Gemm, tile: Tile, sm: int, run: Run, seed: int = 0) -> tuple[float, float]:
    """Errors relative to float64, ||out - exact|| / ||exact||: the kernel's, and that of float32 arithmetic rounded once.

    Elements of the outputs' arrays that no output is must be untouched; the second output must be the first's positive part.
    """
    given = operands(op, seed)
    exact = reference.gemm(op, given)
    (launch,) = launches(op, tile, sm)
    results = run(launch, {name: array.copy() for name, array in given.items()})
    places = reference.positions(op, op.out_offset, op.out_group, op.out_row)
    for name in ("out", "out_relu") if op.out_relu else ("out",):
        rest = results[name].copy()
        rest[places] = np.nan
        assert np.isnan(rest.astype(np.float32)).all(), f"{name} is written where nothing belongs"
    ours = results["out"][places].astype(np.float64)
    if op.out_relu:
        np.testing.assert_array_equal(results["out_relu"][places], np.maximum(results["out"][places], 0))
    narrow = {name: array.astype(np.float32) for name, array in given.items()}
    product = np.stack([_product(op, narrow, g) for g in range(op.groups)])
    # What follows the product adds no error to speak of in float32, so the peer's rounding error is the product's and the store's.
    theirs = reference.gemm(replace(op, bias=None, rotary=None, activation="none", residual=None), given)
    peer = exact + (product - theirs)
    stored = peer.astype(op.out_dtype).astype(np.float64)
    return _relative(ours, exact), _relative(stored, exact)


def _product(op: Gemm, given: Arrays, group: int) -> NDArray[np.float32]:
    start = op.a_offset + group * op.a_group
    a = np.lib.stride_tricks.as_strided(given["a"][start:], (op.m, op.k), (4 * op.a_row, 4))
    return a @ given["weight"].reshape(-1, op.k, op.n)[0 if op.w_shared else group]


def _relative(x: NDArray[np.float64], exact: NDArray[np.float64]) -> float:
    return float(np.linalg.norm(x - exact) / np.linalg.norm(exact))


def interpreted(launch: Launch, arrays: Mapping[str, NDArray[Any]]) -> Mapping[str, NDArray[Any]]:
    interpret(launch, arrays)
    return arrays


if __name__ == "__main__":
    # sm 8.6: under the interpreter no launch overlaps another.
    print(json.dumps({name: errors(op, tile, 86, interpreted) for name, (op, tile) in SMALL.items()}))
