"""What a matrix product with its epilogue computes, as data.

For each group g:
    out_g (m, n) = residual_g + activation(rotate(a_g (m, k) @ weight_g (k, n) + bias_g))

Operands:
    a: row r of group g starts at element a_offset + g * a_group + r * a_row, its k elements are contiguous.
    weight: (groups, k, n) contiguous, or (k, n) for all groups if w_shared; of a's type.
    bias: (groups, n) contiguous, or (n) for all groups if bias_shared.
    residual: m rows of n elements a group, at r_offset, r_group and r_row as for a.
    cos, sin: (tokens, half) contiguous; row r of a group takes the tables' row r % tokens.
    out: m rows of n elements a group, at out_offset, out_group and out_row as for a.
    out_relu: max(out, 0), laid out as out and of its type.

Rotation: the first `columns` columns are heads of 2 * half channels, and in each head pair i, which is (x, y) at channels 2i and
2i + 1, becomes (x cos_i - y sin_i, x sin_i + y cos_i).

Scatter, for a transposed convolution whose stride s is its kernel's size: rows are pixels (b, y, x) of images `width` wide, the
n = s * s * c columns are (i, j, c), and out (and residual) is NHWC, s times as wide and high: element (row, column) goes to channel c
of pixel (b, s * y + i, s * x + j), and out_row (r_row) is the distance between that image's pixels.

Sums, bias, rotation, activation and residual are in float32; each output is rounded once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smc.plugins.launch import ITEMSIZES

Activation = Literal["none", "gelu", "relu"]


@dataclass(frozen=True)
class Rotary:
    """Rotation of the first `columns` columns by tables of `dtype` (tokens, half)."""

    columns: int
    tokens: int
    half: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Scatter:
    """Every row makes `scale` x `scale` pixels of an image; rows are pixels of images `width` wide."""

    scale: int
    width: int


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """One grouped matrix product.

    Attributes:
        groups, m, n, k: at least 1.
        dtype: of a and weight, as numpy names it: float16, bfloat16 or float32.
        a_row, a_group, a_offset: elements; a_group may be 0 or negative.
        w_shared: one weight for all groups.
        bias: its type; None without.
        bias_shared: one bias for all groups.
        rotary: rotation after the bias.
        activation: none, gelu (exact, by erf) or relu.
        residual: its type; None without. Added after the activation.
        r_row, r_group, r_offset: elements; r_group may be 0 or negative.
        out_dtype, out_row, out_group, out_offset: elements; groups must not overlap.
        out_relu: whether there is the second output.
        scatter: where the outputs go if not in rows.

    Raises:
        ValueError: operands start at no multiple of 16 bytes, or sizes do not fit one another.
    """

    groups: int
    m: int
    n: int
    k: int
    a_row: int
    out_row: int
    a_group: int = 0
    out_group: int = 0
    dtype: str = "float16"
    out_dtype: str = "float16"
    a_offset: int = 0
    out_offset: int = 0
    w_shared: bool = False
    bias: str | None = None
    bias_shared: bool = False
    rotary: Rotary | None = None
    activation: Activation = "none"
    residual: str | None = None
    r_row: int = 0
    r_group: int = 0
    r_offset: int = 0
    out_relu: bool = False
    scatter: Scatter | None = None

    def __post_init__(self) -> None:
        if min(self.groups, self.m, self.n, self.k) < 1:
            raise ValueError(f"groups, m, n, k are {self.groups}, {self.m}, {self.n}, {self.k}; each must be at least 1")
        offsets = (("a", self.a_offset, self.dtype), ("out", self.out_offset, self.out_dtype), ("residual", self.r_offset, self.residual))
        for name, offset, dtype in offsets:
            if dtype is not None and (offset < 0 or offset * ITEMSIZES[dtype] % 16):
                raise ValueError(f"{name} starts at element {offset}; it must start at a multiple of 16 bytes")
        if self.rotary is not None and not (self.rotary.columns <= self.n and self.rotary.columns % (2 * self.rotary.half) == 0):
            raise ValueError(f"{self.rotary.columns} columns to rotate of {self.n}, in heads of {2 * self.rotary.half}")
        if self.scatter is not None and (self.n % self.scatter.scale**2 or self.m % self.scatter.width):
            raise ValueError(f"{self.m} x {self.n} outputs cannot be scattered by {self.scatter}")
