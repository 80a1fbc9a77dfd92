"""Compiling the kernel ahead of time, for any NVIDIA GPU from sm 8.0 and with none present."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from smc.plugins.compile import build, shared_memory_limit
from smc.plugins.flash_attention.kernel import LOG2_E, Tile
from smc.plugins.flash_attention.specification import FlashAttention
from smc.plugins.launch import TYPES, Constant, Kernel

_TABLES = ("cos_q", "sin_q", "cos_k", "sin_k")
_STRIDES = tuple(f"{operand}_{stride}" for operand in ("q", "k", "v", "out") for stride in ("batch", "row", "head"))


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU and what its launch takes.

    Arguments, in order: the pointers q, k, v and, with rotation, cos_q, sin_q, cos_k, sin_k; the int32 values of `sizes`; the
    pointer out. The cubin takes two null pointers more (Triton's scratch memory, of which this kernel needs none); the PTX does
    not. Pointers must be multiples of 16 bytes. Blocks: `grid`.

    Attributes:
        name: the entry point in both.
        cubin, ptx: machine code for the one sm, and portable assembly.
        threads: of a block.
        shared_memory: bytes a block, dynamic; above 48 KiB the launch must raise the function's limit first.
        tile: how the kernel was cut.
    """

    name: str
    cubin: bytes
    ptx: str
    threads: int
    shared_memory: int
    tile: Tile


def compile_for(
    sm: int,
    operation: FlashAttention,
    tile: Tile,
    dtype: Literal["float16", "bfloat16"] = "float16",
    tables: Literal["float32", "float16"] | None = None,
) -> Compiled:
    """Compile the kernel for compute capability `sm` (86 is 8.6); `tables` is the type of cos and sin, None without rotation."""
    constants: dict[str, Constant] = {
        "SCALE": operation.scale * LOG2_E,
        "D": operation.head_size,
        "Q_OFFSET": operation.q_offset,
        "K_OFFSET": operation.k_offset,
        "V_OFFSET": operation.v_offset,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "OVERLAPS": False,
        "KV_SHIFT": 0,
    }
    types = dict.fromkeys(("q", "k", "v"), "*" + TYPES[dtype])
    if tables is None:
        constants |= dict.fromkeys(_TABLES)
    else:
        types |= dict.fromkeys(_TABLES, "*" + TYPES[tables])
    types |= dict.fromkeys(("n", "m", *_STRIDES), "i32")
    types["out"] = "*" + TYPES[dtype]
    kernel = Kernel(
        "smc.plugins.flash_attention.kernel:flash_attention",
        tuple(types.items()),
        tuple(constants.items()),
        frozenset(_STRIDES),
        tile.num_warps,
        tile.num_stages,
        tile.registers,
    )
    built = build(kernel, sm)
    ptx = _without_scratch_arguments(built.asm["ptx"], built.metadata.name)
    return Compiled(built.metadata.name, built.asm["cubin"], ptx, 32 * tile.num_warps, built.metadata.shared, tile)


def grid(operation: FlashAttention, tile: Tile, batch: Any, n: Any) -> tuple[Any, int, Any]:
    """Blocks along x, y and z. `batch` and `n` may be numbers, or symbols of a shape that is known later; so in `sizes`."""
    return (n + tile.block_m - 1) // tile.block_m, operation.num_heads, batch


def sizes(operation: FlashAttention, n: Any, m: Any, q_channels: Any, k_channels: Any, v_channels: Any) -> tuple[Any, ...]:
    """The kernel's int32 arguments for contiguous operands (B, n, q_channels), (B, m, k_channels) and (B, m, v_channels)."""
    operands = ((n, q_channels), (m, k_channels), (m, v_channels), (n, operation.num_heads * operation.head_size))
    strides = ((rows * channels, channels, operation.head_size) for rows, channels in operands)
    return (n, m, *(stride for operand in strides for stride in operand))


def fits(compiled: Compiled, sm: int) -> bool:
    """Whether a block of compute capability `sm` has the shared memory that the kernel needs."""
    return compiled.shared_memory <= shared_memory_limit(sm)


def _without_scratch_arguments(ptx: str, name: str) -> str:
    """Drop the last two parameters of an entry, which must be unused: a launcher that does not know Triton cannot pass them."""
    parameters = re.findall(rf"\.param [^\n]*\b({name}_param_\d+)", ptx)
    for parameter in parameters[-2:]:
        ptx, dropped = re.subn(rf",\s*\.param [^\n]*\b{parameter}\b", "", ptx)
        if dropped != 1 or re.search(rf"\b{parameter}\b", ptx):
            raise ValueError(f"{parameter} of {name} is not the unused scratch argument that it should be")
    return ptx
