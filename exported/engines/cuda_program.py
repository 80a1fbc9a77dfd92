"""The launch program of a plan for the cuda engine: which kernels run in which order on which memory.

A plan is three files: `plan.json`, which is a `Plan`; `kernels.bin`, the kernels' cubins one after the other; and `weights.bin`, which
the engine copies to the GPU as it is. Everything in a program is fixed: a program is for one shape and one batch.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec

from smc.exported.errors import BundleDamaged

PLAN, KERNELS, WEIGHTS = "plan.json", "kernels.bin", "weights.bin"
"""The files of a plan."""

Space = Literal["arena", "weights"]
"""Where memory is: in the program's own working memory, or in the weights that all programs share."""


ITEMSIZES = {"uint8": 1, "float16": 2, "bfloat16": 2, "int32": 4, "float32": 4, "int64": 8}
"""Bytes of an element, by its type as numpy names it."""


class Region(msgspec.Struct, frozen=True):
    """A contiguous tensor in memory: bytes from the start of its space, element type as numpy names it."""

    space: Space
    offset: int
    dtype: str
    shape: tuple[int, ...]


class Pointer(msgspec.Struct, frozen=True, tag="pointer"):
    """A kernel's argument: an address."""

    space: Space
    offset: int


class TensorMap(msgspec.Struct, frozen=True, tag="tensor_map"):
    """A kernel's argument: a tensor map, then the shape as int32 and the strides as int64.

    Attributes:
        space, offset: where the tensor starts; a multiple of 16 bytes.
        element, swizzle, box: as `cuTensorMapEncodeTiled` takes them; box outermost first.
        itemsize: bytes of an element.
        shape: outermost first; strides: in elements, the last one 1.
    """

    space: Space
    offset: int
    element: int
    swizzle: int
    box: tuple[int, ...]
    itemsize: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Int32(msgspec.Struct, frozen=True, tag="int32"):
    """A kernel's argument: an integer."""

    value: Annotated[int, msgspec.Meta(ge=-(1 << 31), le=(1 << 31) - 1)]


class Float32(msgspec.Struct, frozen=True, tag="float32"):
    """A kernel's argument: a number."""

    value: float


Argument = Pointer | TensorMap | Int32 | Float32


class KernelCode(msgspec.Struct, frozen=True):
    """A kernel: its entry point, where its cubin lies in `kernels.bin`, threads a block, and bytes of dynamic shared memory a block."""

    name: str
    offset: int
    size: int
    threads: int
    shared_memory: int


class Step(msgspec.Struct, frozen=True):
    """One launch.

    Attributes:
        kernel: its place in the plan's list.
        grid: blocks along x, y and z.
        arguments: in the kernel's order.
        overlaps: whether it may start while the step before it ends (programmatic dependent launch); it waits for itself.
        label: what it computes, for profiles.
        lane: steps of one lane run one after the other, those of different lanes at once.
        waits: steps of other lanes, by number, that must have ended.
        part: which part of its stage it is for, "decoders" or "heads"; "" where a stage has no parts.
    """

    kernel: int
    grid: tuple[int, int, int]
    arguments: tuple[Argument, ...]
    overlaps: bool = False
    label: str = ""
    lane: int = 0
    waits: tuple[int, ...] = ()
    part: str = ""


class Program(msgspec.Struct, frozen=True):
    """A stage for one shape and batch.

    Attributes:
        stage: "encoder", "decoder", or what else an engine knows.
        inputs, outputs: name -> where it lies in the arena.
        arena_bytes: working memory, inputs and outputs among it.
        steps: the launches, in order.
    """

    stage: str
    inputs: dict[str, Region]
    outputs: dict[str, Region]
    arena_bytes: int
    steps: tuple[Step, ...]


class Resize(msgspec.Struct, frozen=True):
    """The kernels that bring images to the network's size, whose launches depend on each image: those of `plugins/resize`.

    Attributes:
        across, down: their places in the plan's list.
        rows, bytes: how many rows of the result, and how many neighbouring bytes of each, a block makes.
    """

    across: int
    down: int
    rows: Annotated[int, msgspec.Meta(ge=1)]
    bytes: Annotated[int, msgspec.Meta(ge=1)]


class Plan(msgspec.Struct, frozen=True):
    """`plan.json`: kernels and programs, the size of `weights.bin`, and what resizes images; None in plans of before it was known."""

    kernels: tuple[KernelCode, ...]
    programs: tuple[Program, ...]
    weights_bytes: int
    resize: Resize | None = None


def encode_plan(plan: Plan) -> bytes:
    return msgspec.json.encode(plan)


def decode_plan(data: bytes | memoryview) -> Plan:
    """Raises BundleDamaged: it is no plan, or points outside its memory."""
    try:
        plan = msgspec.json.decode(data, type=Plan)
        _check(plan)
    except (msgspec.DecodeError, msgspec.ValidationError, KeyError, ValueError, RecursionError) as error:
        raise BundleDamaged(f"{PLAN}: {error}") from error
    return plan


def _check(plan: Plan) -> None:
    """Raise BundleDamaged, or what a size or type that is none raises, unless a plan stays inside its memory."""
    for kernel in plan.kernels:
        if kernel.offset < 0 or kernel.size < 1 or not 1 <= kernel.threads <= 1024 or kernel.shared_memory < 0:
            raise BundleDamaged(f"{PLAN}: {kernel}")
    if plan.resize is not None and not all(0 <= kernel < len(plan.kernels) for kernel in (plan.resize.across, plan.resize.down)):
        raise BundleDamaged(f"{PLAN}: {plan.resize} of {len(plan.kernels)} kernels")
    for program in plan.programs:
        named = (*program.inputs.values(), *program.outputs.values())
        if any(region.space != "arena" or min(region.shape, default=1) < 0 for region in named):
            raise BundleDamaged(f"{PLAN}: an input or output of the {program.stage} is no tensor in its arena")
        sizes = {"arena": program.arena_bytes, "weights": plan.weights_bytes}
        places = [argument for step in program.steps for argument in step.arguments if isinstance(argument, Pointer | TensorMap)]
        for place in (*places, *named):
            if place.offset < 0 or _end(place) > sizes[place.space]:
                raise BundleDamaged(f"{PLAN}: bytes {place.offset} to {_end(place)} of {sizes[place.space]} bytes of {place.space}")
        for number, step in enumerate(program.steps):
            if min(step.grid) < 1:
                raise BundleDamaged(f"{PLAN}: step {number} has a grid of {step.grid}")
            if not 0 <= step.kernel < len(plan.kernels):
                raise BundleDamaged(f"{PLAN}: kernel {step.kernel} of {len(plan.kernels)}")
            if step.lane not in (0, 1) or any(not 0 <= other < number for other in step.waits):
                raise BundleDamaged(f"{PLAN}: step {number} is in lane {step.lane} and waits for {step.waits}")


def _end(place: Pointer | TensorMap | Region) -> int:
    """The end of the memory that is named, in bytes; of a pointer only the beginning is known."""
    match place:
        case Region():
            return place.offset + math.prod(place.shape) * ITEMSIZES[place.dtype]
        case TensorMap():
            if min((*place.shape, *place.box, place.itemsize), default=0) < 1 or min(place.strides, default=0) < 0:
                raise ValueError(f"a tensor of shape {place.shape}, strides {place.strides}, in blocks of {place.box}")
            last = sum((size - 1) * stride for size, stride in zip(place.shape, place.strides, strict=True))
            return place.offset + (last + 1) * place.itemsize
    return place.offset
