"""From launches to a launch program: operands get their places in memory, kernels their machine code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from smc.compiler.kernel_cache import KernelCache
from smc.exported.engines.cuda_program import (
    ITEMSIZES,
    Argument,
    Float32,
    Int32,
    KernelCode,
    Plan,
    Pointer,
    Program,
    Region,
    Space,
    Step,
    TensorMap,
)
from smc.plugins.compile import Compiled
from smc.plugins.launch import Address, Descriptor, Kernel, Launch

ALIGNMENT = 256
"""Bytes that operands are aligned to in the arena: two cache lines, and more than tensor maps ask for."""

Place = tuple[Space, int]
"""Where an operand starts: its space, and bytes from there."""


class KernelTable:
    """The kernels of a plan: each once, its machine code in one piece of bytes."""

    def __init__(self, sm: int, cache: KernelCache | None = None) -> None:
        self.codes: list[KernelCode] = []
        self.code = bytearray()
        self._sm, self._cache = sm, cache or KernelCache(None)
        self._numbers: dict[Kernel, int] = {}
        self._compiled: dict[Kernel, Compiled | ValueError] = {}

    def compile(self, kernels: Sequence[Kernel]) -> None:
        """Compile those that are new, in parallel. One that does not compile raises when it is asked for.

        Raises:
            BackendFailed: see `KernelCache.try_all`.
        """
        new = list(dict.fromkeys(kernel for kernel in kernels if kernel not in self._compiled))
        self._compiled.update(zip(new, self._cache.try_all(new, self._sm), strict=True))

    def compiled(self, kernel: Kernel) -> Compiled:
        """Raises ValueError: it does not compile."""
        if kernel not in self._compiled:
            self.compile([kernel])
        built = self._compiled[kernel]
        if isinstance(built, ValueError):
            raise built
        return built

    def number(self, kernel: Kernel) -> int:
        """The kernel's place in `codes`; it is put there when first asked for."""
        if kernel not in self._numbers:
            built = self.compiled(kernel)
            self._numbers[kernel] = len(self.codes)
            self.codes.append(KernelCode(built.name, len(self.code), len(built.cubin), built.threads, built.shared_memory))
            self.code += built.cubin
        return self._numbers[kernel]

    def step(
        self, launch: Launch, places: Mapping[str, Place], label: str = "", lane: int = 0, waits: tuple[int, ...] = (), part: str = ""
    ) -> Step:
        """A launch with its operands in their places; the rest is the step's. `launch.kernel` is compiled if it was not."""
        built = self.compiled(launch.kernel)
        descriptors = iter(built.descriptors)
        arguments: list[Argument] = []
        for value in launch.values:
            match value:
                case Address():
                    arguments.append(Pointer(*_place(value, places)))
                case Descriptor():
                    tile = next(descriptors)
                    size = itemsize(value.dtype)
                    space, offset = _place(value, places)
                    arguments.append(TensorMap(space, offset, tile.element, tile.swizzle, tile.box, size, value.shape, value.strides))
                case int():
                    if not -(1 << 31) <= value < 1 << 31:
                        raise ValueError(
                            f"{label or launch.kernel.function}: {value:,} does not fit 32 bits; use fewer or smaller images at once"
                        )
                    arguments.append(Int32(value))
                case float():
                    arguments.append(Float32(value))
        return Step(self.number(launch.kernel), launch.grid, tuple(arguments), launch.kernel.overlaps, label, lane, waits, part)


def assemble(
    launches: Sequence[Launch], operands: Mapping[str, tuple[str, tuple[int, ...]]], sm: int, cache: KernelCache | None = None
) -> tuple[Plan, bytes]:
    """A plan of one program whose operands lie side by side in the arena, and its `kernels.bin`.

    Args:
        launches: in order.
        operands: name -> (dtype, shape); each is both an input and an output of the program.
        sm: compute capability, 90 for 9.0.
        cache: of machine code.

    Raises:
        ValueError: a kernel does not compile.
    """
    regions: dict[str, Region] = {}
    end = 0
    for name, (dtype, shape) in operands.items():
        regions[name] = Region("arena", end, dtype, shape)
        end += -(-math.prod(shape) * itemsize(dtype) // ALIGNMENT) * ALIGNMENT
    table = KernelTable(sm, cache)
    table.compile([launch.kernel for launch in launches])
    places: dict[str, Place] = {name: ("arena", region.offset) for name, region in regions.items()}
    steps = tuple(table.step(launch, places) for launch in launches)
    program = Program("operation", regions, regions, end, steps)
    return Plan(tuple(table.codes), (program,), 0), bytes(table.code)


def itemsize(dtype: str) -> int:
    """Bytes of an element of a type that plans have, by its name. Raises KeyError: they do not have it."""
    return ITEMSIZES[dtype]


def _place(value: Address | Descriptor, places: Mapping[str, Place]) -> tuple[Any, int]:
    space, offset = places[value.operand]
    return space, offset + value.offset * itemsize(value.dtype)
