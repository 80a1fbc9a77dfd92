"""Triton kernels to machine code, ahead of time and for any NVIDIA GPU from sm 8.0, with none present."""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from smc.plugins.launch import Kernel

_SHARED_MEMORY = {80: 163, 87: 163, 90: 227, 100: 227, 103: 227, 110: 227}
"""KiB that one block may have (CUDA C++ Programming Guide, technical specifications per compute capability); 99 elsewhere."""


@dataclass(frozen=True)
class TileBlock:
    """How a tensor descriptor's blocks lie in shared memory, as `cuTensorMapEncodeTiled` takes it.

    Attributes:
        element: CUtensorMapDataType.
        swizzle: CUtensorMapSwizzle.
        box: elements of a block along each dimension, outermost first.
    """

    element: int
    swizzle: int
    box: tuple[int, ...]


@dataclass(frozen=True)
class Compiled:
    """Machine code for one GPU and what its launch takes.

    The function's parameters are those of `Kernel.types` in order, then two null pointers (Triton's scratch memory, of which nothing
    here needs any). A descriptor is a tensor map (128 bytes, by value), its shape as int32 and its strides as int64.

    Attributes:
        name: the entry point.
        cubin: machine code.
        threads: of a block.
        shared_memory: bytes a block, dynamic; above 48 KiB the launch must raise the function's limit first.
        descriptors: one for each descriptor argument, in order.
    """

    name: str
    cubin: bytes
    threads: int
    shared_memory: int
    descriptors: tuple[TileBlock, ...]


def compile_kernel(kernel: Kernel, sm: int) -> Compiled:
    """Compile for compute capability `sm` (86 is 8.6). Raises ValueError as `build` does."""
    built = build(kernel, sm)
    threads = re.search(r"\.reqntid (\d+)", built.asm["ptx"])
    if threads is None:
        raise ValueError(f"{kernel.function}: its code does not say how many threads it needs")
    descriptors = tuple(_tile_block(described) for described in getattr(built.metadata, "tensordesc_meta", None) or ())
    return Compiled(built.metadata.name, built.asm["cubin"], int(threads[1]), built.metadata.shared, descriptors)


def build(kernel: Kernel, sm: int) -> Any:
    """What Triton makes of a kernel: every stage of its code in `asm`, and `metadata`.

    Raises:
        ValueError: it does not compile for this GPU, or needs scratch memory.
    """
    function = _function(kernel.function)
    types, constants = dict(kernel.types), dict(kernel.constants)
    names = function.arg_names
    if [name for name in names if name in types] != list(types) or {*types, *constants} != set(names):
        raise ValueError(f"{kernel.function} takes {', '.join(names)}; found {', '.join(types)} and constants {', '.join(constants)}")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name in kernel.aligned or types.get(name, "").startswith("*")
    }
    source = (_gluon_source if function.is_gluon() else ASTSource)(
        function, {name: types.get(name, "constexpr") for name in names}, constants, aligned
    )
    options = {
        "num_warps": kernel.warps,
        "num_stages": kernel.stages,
        "maxnreg": kernel.registers,
        "enable_fp_fusion": True,
        "launch_pdl": kernel.overlaps,
        "ptx_version": 80 if sm < 90 else 87,
    }
    with (
        warnings.catch_warnings(),
        triton.knobs.compilation.scope(),
        triton.knobs.cache.scope(),
        tempfile.TemporaryDirectory(prefix="speedy-mast3r-") as folder,
    ):
        warnings.simplefilter("ignore", UserWarning)
        triton.knobs.compilation.disable_line_info = True  # most of a large kernel's cubin otherwise
        triton.knobs.cache.dir = folder  # it keeps every stage of the code, gigabytes in the end; what is needed again, callers keep
        try:
            built = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)
        except Exception as error:  # Triton's own errors have no common class
            raise ValueError(f"{kernel.function} does not compile for sm {sm / 10}: {error}") from error
    metadata = built.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size:
        raise ValueError(f"{kernel.function} needs scratch memory, which its launch does not provide")
    return built


def is_gluon(kernel: Kernel) -> bool:
    """Whether a kernel is written in Gluon, below Triton's own level."""
    return bool(_function(kernel.function).is_gluon())


def fits(compiled: Compiled, sm: int) -> bool:
    """Whether a block of compute capability `sm` has the shared memory that the kernel needs."""
    return compiled.shared_memory <= shared_memory_limit(sm)


def shared_memory_limit(sm: int) -> int:
    """Bytes of shared memory that one block may have."""
    return 1024 * _SHARED_MEMORY.get(sm, 99)


def fingerprint(kernel: Kernel, sm: int) -> str:
    """A key for the machine code of a kernel: everything that it depends on but the version of Triton, which is `compiler_version`."""
    options = (sorted(kernel.aligned), kernel.warps, kernel.stages, kernel.registers, kernel.overlaps)
    return hashlib.sha256(repr((kernel_sources(), sm, kernel.function, kernel.types, kernel.constants, options)).encode()).hexdigest()


def compiler_version() -> str:
    """Of Triton."""
    return str(triton.__version__)


@cache
def kernel_sources() -> str:
    """A digest of the sources of all kernels: they call one another, so that any change makes all of them new."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*/*.py")):
        text = path.read_bytes()
        if b"triton.jit" in text or b"gluon.jit" in text:
            digest.update(path.as_posix().rpartition("plugins/")[2].encode() + b"\0" + text)
    digest.update(Path(__file__).read_bytes())  # how they are compiled
    return digest.hexdigest()


@cache
def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _gluon_source(function: Any, signature: dict[str, str], constants: dict[str, Any], aligned: dict[Any, Any]) -> Any:
    """A Gluon function's source. A descriptor's type names the layout of its blocks in shared memory: the default one for their shape."""
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.language import str_to_ty

    def with_layout(kind: str) -> str:
        match = re.fullmatch(r"tensordesc<(\w+)\[(.+)\]>", kind)
        if match is None:
            return kind
        layout = NVMMASharedLayout.get_default_for([int(size) for size in match[2].split(",")], str_to_ty(match[1], None))
        return f"tensordesc<{match[1]}[{match[2]}],{layout!r}>"

    return GluonASTSource(function, {name: with_layout(kind) for name, kind in signature.items()}, constants, aligned)


def _tile_block(metadata: dict[str, Any]) -> TileBlock:
    # Triton numbers bfloat16 and the 64-bit types otherwise on the device than cuda.h does.
    element = {8: 10, 9: 8, 10: 9}.get(metadata["elem_type"], metadata["elem_type"])
    return TileBlock(element, metadata["swizzle"], tuple(metadata["block_size"]))
