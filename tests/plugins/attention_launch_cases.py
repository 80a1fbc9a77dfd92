"""Attention as launches, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.attention_launch_cases

prints, as JSON, the errors of each small case on the CPU.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from smc.plugins.flash_attention import reference
from smc.plugins.flash_attention.kernel import Tile
from smc.plugins.flash_attention.launches import TABLES, Attention, Heads, launches
from smc.plugins.flash_attention.specification import FlashAttention
from tests.plugins.small_cases import Case, Expected, errors, loaded, memory, on_cpu, places, stored


def contiguous(batch: int, heads: int, n: int, m: int, head_size: int = 32, **more: Any) -> Attention:
    """Operands (batch, rows, heads, head_size), but where `more` says otherwise."""
    queries, keys = (Heads(batch=rows * heads * head_size, row=heads * head_size, head=head_size) for rows in (n, m))
    made: dict[str, Any] = {"dtype": "float16", "scale": head_size**-0.5, "q": queries, "k": keys, "v": keys, "out": queries}
    return Attention(batch=batch, heads=heads, n=n, m=m, head_size=head_size, **made | more)


def packed(batch: int, heads: int, n: int, head_size: int = 32, **more: Any) -> Attention:
    """Operands that are each a third of rows of their own memory."""
    channels = heads * head_size
    parts = (Heads(batch=3 * n * channels, row=3 * channels, head=head_size, offset=part * channels) for part in range(3))
    return contiguous(batch, heads, n, n, head_size, **dict(zip("qkv", parts, strict=True)) | more)


HEADS_FIRST = Heads(batch=2 * 20 * 32, row=32, head=20 * 32)

SMALL: dict[str, Attention] = {
    "contiguous": contiguous(2, 2, 33, 45),
    "packed": packed(2, 2, 40),
    "the other view's keys": contiguous(2, 1, 20, 33, k=Heads(batch=-33 * 32, row=32, head=32, offset=33 * 32)),
    "into a concatenation": contiguous(2, 2, 20, 20, out=Heads(batch=20 * 160, row=160, head=32, offset=96)),
    "heads first": contiguous(2, 2, 20, 20, q=HEADS_FIRST, out=HEADS_FIRST),
    "rotated": contiguous(1, 2, 20, 33, tables="float32"),
    "rotated by halves": packed(2, 1, 20, tables="float16"),
    "float32": contiguous(1, 2, 20, 33, dtype="float32"),
    "float32, rotated": packed(1, 1, 33, dtype="float32", tables="float32"),
}  # fmt: skip


def case(operation: Attention, tile: Tile, sm: int) -> Case:
    rows = {"q": operation.n, "k": operation.m, "v": operation.m, "out": operation.n}
    found = {}
    for name, count in rows.items():
        heads: Heads = getattr(operation, name)
        shape = operation.batch, count, operation.heads, operation.head_size
        found[name] = places(shape, (heads.batch, heads.row, heads.head, 1), heads.offset)
    inputs = {name: memory([found[name]], operation.dtype, seed) for seed, name in enumerate("qkv")}
    q, k, v = (torch.from_numpy(loaded(inputs[name], operation.dtype)[found[name]]) for name in "qkv")
    tables: list[Any] = []
    if operation.tables is not None:
        random = np.random.default_rng(3)
        for count in (operation.n, operation.m):
            angles = 3 * random.standard_normal((count, operation.head_size // 2))
            tables += [stored(np.cos(angles), operation.tables), stored(np.sin(angles), operation.tables)]
        inputs |= dict(zip(TABLES, tables, strict=True))
    attributes = FlashAttention(operation.heads, operation.head_size, operation.scale)
    exact = reference.flash_attention(attributes, *(x.flatten(2) for x in (q, k, v)), *tables)
    plain = _plain(operation, q, k, v, *tables)
    out = Expected(operation.dtype, found["out"], exact.reshape(found["out"].shape), plain)
    return Case(launches(operation, tile, sm), inputs, {"out": out})


def _plain(operation: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *tables: Any) -> Any:
    """torch's attention of the same precision."""
    if tables:
        q, k = (_rotated(x, *tables[i : i + 2]) for x, i in ((q, 0), (k, 2)))
    operands = (x.to(getattr(torch, operation.dtype)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(*operands, scale=operation.scale).transpose(1, 2).double().numpy()


def _rotated(x: torch.Tensor, cos: Any, sin: Any) -> torch.Tensor:
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = (torch.from_numpy(table).float()[:, None] for table in (cos, sin))
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1)


if __name__ == "__main__":
    tile = Tile(32, 32, num_warps=4, num_stages=2)
    print(json.dumps({name: errors(case(operation, tile, 80), on_cpu) for name, operation in SMALL.items()}))
