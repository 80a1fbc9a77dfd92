"""The operation as a plugin of the full TensorRT, its kernel compiled ahead of time into the engine. Not run on hardware.

Written against NVIDIA's documentation of `tensorrt.plugin` (TensorRT 11.3, Python API: register, autotune, aot_impl) and its sample
quickly_deployable_plugins. In the words of that sample, "the plugin computation is already part of the engine": an engine that holds
these plugins needs neither Python nor Triton to run, and nothing registered. An ONNX node finds its plugin by its operation's name
and by two attributes beside the operation's own, which TensorRT's parser reads: plugin_namespace = "smc" and aot = 1. The model
must not carry the function of `onnx_function`, which the parser would take instead.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# No `from __future__ import annotations`: TensorRT reads the annotations as classes.

import functools
import hashlib
import re

from smc.plugins.flash_attention.aot import Compiled, compile_for, fits, grid, sizes
from smc.plugins.flash_attention.kernel import TILES
from smc.plugins.flash_attention.specification import DOMAIN, NAME, ROTARY_NAME, FlashAttention


def uniquely_named(built: Compiled) -> tuple[str, str]:
    """A kernel's name and PTX with a name of its own: TensorRT tells the kernels of an engine apart by their names alone."""
    name = f"{built.name}_{hashlib.sha256(built.ptx.encode()).hexdigest()[:16]}"
    return name, re.sub(rf"\b{built.name}(?=\(|_param_)", name, built.ptx)


@functools.cache
def register(sm: int) -> None:
    """Register both operations with TensorRT for building engines for compute capability `sm` (90 is 9.0).

    Again for the same one does nothing; TensorRT has no way to register for another in the same process.
    TensorRT's builder times each of TILES that fits the GPU and keeps the fastest; tactic i is TILES[i - 1].

    Raises:
        ImportError: TensorRT is not installed, or is older than its ahead-of-time plugins (10.8).
        ValueError: it has been registered for another compute capability.
    """
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as missing:
        raise ImportError("the FlashAttention plugin needs TensorRT: pip install 'tensorrt>=11'") from missing

    Kernel = tuple[bytes, bytes, trtp.KernelLaunchParams, trtp.SymIntExprs]  # noqa: N806
    types = {trt.float16: "float16", trt.bfloat16: "bfloat16", trt.float32: "float32"}
    compiled = functools.cache(functools.partial(compile_for, sm))

    def tactics(operation: FlashAttention, tables: str | None) -> list[int]:
        return [i for i, tile in enumerate(TILES, 1) if fits(compiled(operation, tile, tables=tables), sm)]

    def kernel(operation: FlashAttention, q, k, v, tables, tactic: int) -> Kernel:
        built = compiled(operation, TILES[tactic - 1], dtype=types[q.dtype], tables=tables)
        launch = trtp.KernelLaunchParams()
        launch.grid_x, launch.grid_y, launch.grid_z = grid(operation, built.tile, q.shape_expr[0], q.shape_expr[1])
        launch.block_x = built.threads
        launch.shared_mem = built.shared_memory
        channels = (x.shape_expr[2] for x in (q, k, v))
        numbers = sizes(operation, q.shape_expr[1], k.shape_expr[1], *channels)
        arguments = trtp.SymIntExprs.from_tuple([trtp.SymInt32(number) for number in numbers])
        name, ptx = uniquely_named(built)
        return name.encode(), ptx.encode(), launch, arguments

    def output(q, num_heads: int, head_size: int):
        return trtp.from_shape_expr((q.shape_expr[0], q.shape_expr[1], num_heads * head_size), dtype=q.dtype)

    @trtp.register(f"{DOMAIN}::{NAME}")
    def describe(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc,
        num_heads: int, head_size: int, scale: float, q_offset: int, k_offset: int, v_offset: int,
    ) -> trtp.TensorDesc:  # fmt: skip
        return output(q, num_heads, head_size)

    @trtp.autotune(f"{DOMAIN}::{NAME}")
    def choices(q, k, v, num_heads, head_size, scale, q_offset, k_offset, v_offset, outputs):
        operation = FlashAttention(num_heads, head_size, scale, q_offset, k_offset, v_offset)
        return [trtp.AutoTuneCombination(", ".join(4 * ["FP16|BF16"]), "LINEAR", tactics(operation, None))]

    @trtp.aot_impl(f"{DOMAIN}::{NAME}")
    def implement(q, k, v, num_heads, head_size, scale, q_offset, k_offset, v_offset, outputs, tactic) -> Kernel:
        operation = FlashAttention(num_heads, head_size, scale, q_offset, k_offset, v_offset)
        return kernel(operation, q, k, v, None, tactic)

    @trtp.register(f"{DOMAIN}::{ROTARY_NAME}")
    def describe_rotary(
        q: trtp.TensorDesc, k: trtp.TensorDesc, v: trtp.TensorDesc,
        cos_q: trtp.TensorDesc, sin_q: trtp.TensorDesc, cos_k: trtp.TensorDesc, sin_k: trtp.TensorDesc,
        num_heads: int, head_size: int, scale: float, q_offset: int, k_offset: int, v_offset: int,
    ) -> trtp.TensorDesc:  # fmt: skip
        return output(q, num_heads, head_size)

    @trtp.autotune(f"{DOMAIN}::{ROTARY_NAME}")
    def choices_rotary(
        q, k, v, cos_q, sin_q, cos_k, sin_k, num_heads, head_size, scale, q_offset, k_offset, v_offset, outputs
    ):  # fmt: skip
        operation = FlashAttention(num_heads, head_size, scale, q_offset, k_offset, v_offset)
        return [
            trtp.AutoTuneCombination(", ".join([*3 * [data], *4 * [table], data]), "LINEAR", tactics(operation, name))
            for data in ("FP16", "BF16")
            for table, name in (("FP32", "float32"), ("FP16", "float16"))
        ]

    @trtp.aot_impl(f"{DOMAIN}::{ROTARY_NAME}")
    def implement_rotary(
        q, k, v, cos_q, sin_q, cos_k, sin_k, num_heads, head_size, scale, q_offset, k_offset, v_offset, outputs, tactic
    ) -> Kernel:  # fmt: skip
        operation = FlashAttention(num_heads, head_size, scale, q_offset, k_offset, v_offset)
        return kernel(operation, q, k, v, types[cos_q.dtype], tactic)
