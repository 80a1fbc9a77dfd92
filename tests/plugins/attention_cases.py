"""Attention cases for the kernel, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.attention_cases

prints, as JSON, each small case's error on the CPU and that of torch's attention of the same precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from smc.plugins.flash_attention import reference
from smc.plugins.flash_attention.kernel import Tile, attend
from smc.plugins.flash_attention.specification import FlashAttention

Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NO_TABLES = (None, None, None, None)


@dataclass(frozen=True)
class Case:
    n: int
    m: int
    batch: int = 1
    heads: int = 2
    head_size: int = 64
    dtype: torch.dtype = torch.float16
    layout: str = "bnhd"
    """bnhd: (B, N, H, D), packed: one (B, N, 3, H, D), bhnd: (B, H, N, D) seen as (B, N, H, D)."""
    tables: torch.dtype | None = None
    values: str = "normal"
    """normal, large: scores of hundreds, dominated: one key takes all the weight of every row."""

    @property
    def name(self) -> str:
        parts = [f"{self.batch}x{self.heads}x{self.n}x{self.m}x{self.head_size}", str(self.dtype)[6:], self.layout, self.values]
        return "-".join([*parts, *([f"rotated_{str(self.tables)[6:]}"] if self.tables else [])])


# float16 alone: Triton 3.9's interpreter multiplies bfloat16 matrices as the integers it keeps them in.
SMALL = [
    Case(1, 1, heads=1),
    Case(33, 33, layout="packed", head_size=32),
    Case(17, 70, tables=torch.float32),
    Case(65, 65, batch=2, layout="packed", tables=torch.float16),
    Case(64, 128, layout="bhnd"),
    Case(70, 31, heads=1, head_size=128, layout="bhnd", tables=torch.float32),
    Case(40, 96, heads=1, head_size=32, tables=torch.float32),
    Case(20, 100, values="large"),
    Case(20, 100, values="dominated"),
]


def operands(case: Case, device: str) -> tuple[Operands, tuple[torch.Tensor | None, ...]]:
    """q (B, N, H, D), k and v (B, M, H, D) as views of the layout, and the tables."""
    torch.manual_seed(case.n * 1000 + case.m)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device)

    if case.layout == "packed":
        q, k, v = normal(case.batch, case.n, 3, case.heads, case.head_size).to(case.dtype).unbind(2)
    elif case.layout == "bhnd":
        q, k, v = (normal(case.batch, case.heads, rows, case.head_size).to(case.dtype).transpose(1, 2) for rows in (case.n, case.m, case.m))
    else:
        q, k, v = (normal(case.batch, rows, case.heads, case.head_size).to(case.dtype) for rows in (case.n, case.m, case.m))
    if case.values == "large":
        q *= 20
        k *= 20
    elif case.values == "dominated":
        q.copy_(q.abs() + 1)
        k.copy_(-k.abs())
        k[:, case.m // 2] = 20
    if case.tables is None:
        return (q, k, v), NO_TABLES
    angles = [3 * normal(rows, case.head_size // 2) for rows in (case.n, case.m)]
    return (q, k, v), tuple(table.to(case.tables) for angle in angles for table in (angle.cos(), angle.sin()))


def errors(case: Case, device: str, tile: Tile) -> tuple[float, float]:
    """Errors relative to float64, ||out - exact|| / ||exact||: the kernel's, and torch's attention of the same precision."""
    (q, k, v), tables = operands(case, device)
    scale = case.head_size**-0.5
    operation = FlashAttention(case.heads, case.head_size, scale)
    exact = torch.from_numpy(
        reference.flash_attention(
            operation, *(_float64(x.flatten(2)) for x in (q, k, v)), *(t if t is None else _float64(t) for t in tables)
        )
    )
    out = torch.full((case.batch, case.n, case.heads * case.head_size), float("nan"), device=device, dtype=case.dtype)
    attend(q, k, v, out, scale, tile, tables)

    if case.tables is not None:
        q, k = rotate(q, *tables[:2]), rotate(k, *tables[2:])
    peer = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2).flatten(2)
    ours, theirs = (float((x.double().cpu() - exact).norm() / exact.norm()) for x in (out, peer))
    return ours, theirs


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, N, H, D) rotated in float32 and rounded to its type."""
    x1, x2 = x.float().chunk(2, dim=-1)
    cos, sin = cos.float()[:, None], sin.float()[:, None]
    return torch.cat([x1 * cos - x2 * sin, x1 * sin + x2 * cos], dim=-1).to(x.dtype)


def _float64(x: torch.Tensor) -> object:
    return x.double().cpu().numpy()


if __name__ == "__main__":
    print(json.dumps({case.name: errors(case, "cpu", Tile(32, 32, num_warps=4, num_stages=2)) for case in SMALL}))
