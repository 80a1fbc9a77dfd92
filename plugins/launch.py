"""Launches of Triton kernels as data: what to compile, with which arguments and on which grid.

An operation's folder makes them, the compiler binds their operands to memory and writes them into a plan, and tests run them on
a GPU or under Triton's interpreter. Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Constant = int | float | bool | str | None

TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "uint8": "u8", "int32": "i32", "int64": "i64"}
"""Names of element types, as numpy has them, in Triton's signatures."""

ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4}
"""Bytes of an element of the types that products and convolutions take."""


@dataclass(frozen=True)
class Address:
    """A pointer argument: `offset` elements into an operand. Both together must be a multiple of 16 bytes.

    Attributes:
        operand: the operand's name in the operation, such as "weight".
        dtype: element type, as numpy names it.
        offset: elements; not negative.
    """

    operand: str
    dtype: str
    offset: int = 0


@dataclass(frozen=True)
class Descriptor:
    """A tensor descriptor argument (TMA, sm 9.0 and newer): blocks of a strided tensor, zeros outside it.

    Attributes:
        operand, dtype, offset: as for `Address`.
        shape: of the whole tensor, outermost first, at most five dimensions.
        strides: in elements; all but the last, which is 1, are multiples of 16 bytes.
        block: what one load or store moves, of as many dimensions.
    """

    operand: str
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    offset: int = 0


Value = Address | Descriptor | int | float


@dataclass(frozen=True)
class Kernel:
    """A Triton function and everything that its machine code depends on, but for the GPU.

    Attributes:
        function: where it is, as "smc.plugins.gemm.kernel:gemm".
        types: its run-time arguments in order, name -> type in Triton's signature ("*fp16", "i32", "fp32", "tensordesc<fp16[64, 64]>").
        constants: its compile-time arguments.
        aligned: integer arguments that are multiples of 16. Pointers always are, in bytes.
        warps: of 32 threads a block.
        stages: of software pipelining.
        registers: the most a thread may use; None for the compiler's choice.
        overlaps: whether it may start while the kernel before it ends (programmatic dependent launch, sm 9.0 and newer). It then
            waits (`gdc_wait`) before it touches any memory but weights, and in every program before it ends.
    """

    function: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    aligned: frozenset[str]
    warps: int
    stages: int
    registers: int | None = None
    overlaps: bool = False


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its grid, and the values of `kernel.types` in order."""

    kernel: Kernel
    grid: tuple[int, int, int]
    values: tuple[Value, ...]


def launch(
    function: str,
    grid: tuple[int, int, int],
    values: Mapping[str, Value],
    constants: Mapping[str, Constant],
    *,
    warps: int,
    stages: int,
    registers: int | None = None,
    overlaps: bool = False,
) -> Launch:
    """A launch from its arguments by name.

    Args:
        function: where the Triton function is.
        grid: blocks along x, y and z.
        values: run-time arguments, in the function's order. Integers are int32, floats float32.
        constants: compile-time arguments; None for a pointer that is not given.
        warps, stages, registers, overlaps: see `Kernel`.
    """
    types = tuple((name, _type(value)) for name, value in values.items())
    aligned = frozenset(name for name, value in values.items() if type(value) is int and value % 16 == 0)
    kernel = Kernel(function, types, tuple(sorted(constants.items())), aligned, warps, stages, registers, overlaps)
    return Launch(kernel, grid, tuple(values.values()))


def _type(value: Any) -> str:
    match value:
        case Address():
            return "*" + TYPES[value.dtype]
        case Descriptor():
            return f"tensordesc<{TYPES[value.dtype]}[{', '.join(map(str, value.block))}]>"
        case bool():
            raise TypeError("a Boolean is a compile-time argument")
        case int():
            return "i32"
        case float():
            return "fp32"
    raise TypeError(f"{value!r} is no run-time argument")
