"""LayerNorms for the kernel, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.layer_norm_cases

prints, as JSON, the errors of each small case on the CPU.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.plugins.layer_norm import reference
from smc.plugins.layer_norm.launches import Tile, launches
from smc.plugins.layer_norm.specification import LayerNorm
from tests.plugins.small_cases import Case, Expected, errors, loaded, memory, on_cpu, places


def contiguous(groups: int, rows: int, channels: int, **more: Any) -> LayerNorm:
    """Contiguous operands, but where `more` says otherwise."""
    made: dict[str, Any] = {
        "dtype": "float16",
        "out_dtype": "float16",
        "x_row": channels,
        "x_group": rows * channels,
        "out_row": channels,
        "out_group": rows * channels,
        "eps": 1e-6,
    }
    return LayerNorm(groups=groups, rows=rows, channels=channels, **made | more)


BOTH = {"scale": "float16", "bias": "float16"}

SMALL: dict[str, tuple[LayerNorm, Tile]] = {
    "plain": (contiguous(1, 5, 64), Tile(1, 1)),
    "odd channels": (contiguous(1, 5, 50, **BOTH), Tile(2, 1)),
    "odd rows": (contiguous(2, 7, 48, **BOTH), Tile(4, 4)),
    "shared": (contiguous(3, 4, 32, scale="float32", bias="float16", shared=True), Tile(1, 4)),
    "scale alone": (contiguous(2, 3, 32, scale="float32"), Tile(1, 4)),
    "bias alone": (contiguous(2, 3, 32, bias="float32"), Tile(1, 4)),
    "one channel": (contiguous(1, 3, 1, bias="float32"), Tile(1, 1)),
    "slices": (
        contiguous(2, 5, 40, **BOTH, x_row=48, x_group=5 * 48, x_offset=8, out_row=96, out_group=5 * 96, out_offset=48), Tile(2, 1)
    ),
    "other group's rows": (contiguous(2, 5, 32, **BOTH, x_group=-5 * 32, x_offset=5 * 32), Tile(2, 1)),
    "same rows": (contiguous(2, 5, 32, **BOTH, x_group=0), Tile(2, 1)),
    "to float32": (contiguous(1, 5, 32, **BOTH, out_dtype="float32"), Tile(1, 1)),
    "from float32": (contiguous(1, 5, 32, **BOTH, dtype="float32", eps=0.1), Tile(1, 1)),
}  # fmt: skip

MEAN = 30.0
"""Of x: where the variance is small beside the mean, E[x^2] - E[x]^2 loses it."""

REAL: dict[str, LayerNorm] = {
    "encoder": contiguous(1, 1536, 1024, **BOTH),
    "decoder": contiguous(2, 768, 768, scale="float32", bias="float32"),
    "one row": contiguous(1, 1, 768),
    "float32": contiguous(2, 100, 768, **BOTH, dtype="float32", out_dtype="float32"),
    "bfloat16": contiguous(2, 100, 1024, scale="bfloat16", bias="bfloat16", dtype="bfloat16", out_dtype="bfloat16"),
    "into a concatenation": contiguous(2, 99, 768, **BOTH, out_row=1792, out_group=99 * 1792, out_offset=1024),
}
"""Of sizes of the public model."""


def case(operation: LayerNorm, tile: Tile, sm: int) -> Case:
    shape = operation.groups, operation.rows, operation.channels
    read = places(shape, (operation.x_group, operation.x_row, 1), operation.x_offset)
    inputs = {"x": memory([read], operation.dtype)}
    if operation.dtype != "bfloat16":  # whose few digits the mean would take
        inputs["x"] += np.asarray(MEAN, operation.dtype)
    x = loaded(inputs["x"], operation.dtype)[read]
    weights: list[NDArray[Any] | None] = []
    for seed, (name, dtype) in enumerate((("scale", operation.scale), ("bias", operation.bias)), 1):
        if dtype is None:
            weights.append(None)
        else:
            groups = 1 if operation.shared else operation.groups
            inputs[name] = memory([places((groups, operation.channels), (operation.channels, 1))], dtype, seed)
            weights.append(loaded(inputs[name], dtype).reshape(groups, operation.channels))
    out = Expected(
        operation.out_dtype,
        places(shape, (operation.out_group, operation.out_row, 1), operation.out_offset),
        reference.layer_norm(x, *weights, operation.eps),
        _plain(x.astype(np.float32), *weights, operation.eps),
    )
    return Case(launches(operation, tile, sm), inputs, {"out": out})


def _plain(x: NDArray[np.float32], scale: NDArray[Any] | None, bias: NDArray[Any] | None, eps: float) -> NDArray[np.float32]:
    centred = x - x.mean(axis=-1, keepdims=True)
    out = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + np.float32(eps))
    if scale is not None:
        out = out * scale[:, None].astype(np.float32)
    return out if bias is None else out + bias[:, None].astype(np.float32)


if __name__ == "__main__":
    print(json.dumps({name: errors(case(operation, tile, 80), on_cpu) for name, (operation, tile) in SMALL.items()}))
