"""Compiling the kernel ahead of time, for any NVIDIA GPU from sm 8.0 and with none present."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smc.plugins.flash_attention.kernel import LOG2_E, Tile, flash_attention
from smc.plugins.flash_attention.specification import FlashAttention

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_TABLES = ("cos_q", "sin_q", "cos_k", "sin_k")
_SIZES = ("n", "m", "q_batch", "q_row", "q_head", "k_batch", "k_row", "k_head", "v_batch", "v_row", "v_head")
_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
"""KiB that one block may have (CUDA C++ Programming Guide, technical specifications per compute capability); 99 elsewhere."""


@dataclass(frozen=True)
class Compiled:
    """A kernel for one GPU and what its launch takes.

    Arguments, in order: the pointers q, k, v and, with rotation, cos_q, sin_q, cos_k, sin_k; the int32 values of `sizes`; the
    pointer out. The cubin takes two null pointers more (Triton's scratch memory, of which this kernel needs none); the PTX does
    not. Pointers must be multiples of 16 bytes. Blocks: `grid`.

    Attributes:
        name: the entry point in both.
        cubin, ptx: machine code for the one sm, and portable assembly; the PTX is the oldest version that holds the sm.
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
    constants: dict[str, Any] = {
        "SCALE": operation.scale * LOG2_E,
        "D": operation.head_size,
        "Q_OFFSET": operation.q_offset,
        "K_OFFSET": operation.k_offset,
        "V_OFFSET": operation.v_offset,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    if tables is None:
        constants |= dict.fromkeys(_TABLES)
    pointers = dict.fromkeys(("q", "k", "v", "out"), "*" + _TYPES[dtype])
    if tables is not None:
        pointers |= dict.fromkeys(_TABLES, "*" + _TYPES[tables])
    types = pointers | dict.fromkeys(_SIZES, "i32")
    names = flash_attention.arg_names
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types and name not in ("n", "m")}
    source = ASTSource(flash_attention, {name: types.get(name, "constexpr") for name in names}, constants, aligned)
    options = {
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "maxnreg": tile.registers,
        "ptx_version": 80 if sm <= 90 else 87,
        "enable_fp_fusion": True,
    }
    built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
    if built.metadata.global_scratch_size or built.metadata.profile_scratch_size:
        raise ValueError("the kernel needs scratch memory, which its launch does not provide")
    ptx = _without_scratch_arguments(built.asm["ptx"], built.metadata.name)
    return Compiled(built.metadata.name, built.asm["cubin"], ptx, 32 * tile.num_warps, built.metadata.shared, tile)


def grid(operation: FlashAttention, tile: Tile, batch: Any, n: Any) -> tuple[Any, int, Any]:
    """Blocks along x, y and z. `batch` and `n` may be numbers, or symbols of a shape that is known later; so in `sizes`."""
    return (n + tile.block_m - 1) // tile.block_m, operation.num_heads, batch


def sizes(operation: FlashAttention, n: Any, m: Any, q_channels: Any, k_channels: Any, v_channels: Any) -> tuple[Any, ...]:
    """The kernel's int32 arguments for contiguous operands (B, n, q_channels), (B, m, k_channels) and (B, m, v_channels)."""
    strides = ((rows * channels, channels, operation.head_size) for rows, channels in ((n, q_channels), (m, k_channels), (m, v_channels)))
    return (n, m, *(stride for operand in strides for stride in operand))


def fits(compiled: Compiled, sm: int) -> bool:
    """Whether a block of compute capability `sm` has the shared memory that the kernel needs."""
    return compiled.shared_memory <= 1024 * _SHARED_MEMORY.get(sm, 99)


def _without_scratch_arguments(ptx: str, name: str) -> str:
    """Drop the last two parameters of an entry, which must be unused: a launcher that does not know Triton cannot pass them."""
    parameters = re.findall(rf"\.param [^\n]*\b({name}_param_\d+)", ptx)
    for parameter in parameters[-2:]:
        ptx, dropped = re.subn(rf",\s*\.param [^\n]*\b{parameter}\b", "", ptx)
        if dropped != 1 or re.search(rf"\b{parameter}\b", ptx):
            raise ValueError(f"{parameter} of {name} is not the unused scratch argument that it should be")
    return ptx
