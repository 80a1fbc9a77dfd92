"""One piece of working memory for all buffers of a program: two that are never needed at once may have the same place."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from smc.compiler.launch_program import ALIGNMENT, itemsize
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lanes import Slot
from smc.compiler.lowering.views import Buffer


@dataclass(frozen=True)
class Arena:
    """Where buffers start, in bytes, and how much memory that takes."""

    offsets: Mapping[Buffer, int]
    size: int


def pack(calls: Sequence[Call], slots: Sequence[Slot], kept: Collection[Buffer], fixed: Mapping[Buffer, int] | None = None) -> Arena:
    """Places for all buffers that calls compute, and for those that are `kept` from beginning to end: the inputs and outputs.

    Those of `fixed`, some of the kept ones, start at the bytes that it says.

    `slots` says when each call runs. Two calls of the side lane may share memory as any two may: their slots are wide enough.

    The largest get their places first, each the lowest that is free while it is needed: within a few percent of the least possible
    on these graphs, whose residual streams and feature maps are of few sizes.
    """
    lives: dict[Buffer, tuple[int, int]] = {buffer: (-1, len(calls)) for buffer in kept}
    for call, slot in zip(calls, slots, strict=True):
        for buffer in call.operands.values():
            if buffer.values is None:
                first, last = lives.get(buffer, (slot.first, slot.last))
                lives[buffer] = (min(first, slot.first), max(last, slot.last))
    offsets: dict[Buffer, int] = dict(fixed or {})
    for buffer in sorted((buffer for buffer in lives if buffer not in offsets), key=lambda buffer: -byte_size(buffer)):
        first, last = lives[buffer]
        taken = sorted(
            (offset, offset + byte_size(other)) for other, offset in offsets.items() if lives[other][0] <= last and first <= lives[other][1]
        )
        place = 0
        for start, end in taken:
            if place + byte_size(buffer) <= start:
                break
            place = max(place, end)
        offsets[buffer] = place
    return Arena(offsets, max((offset + byte_size(buffer) for buffer, offset in offsets.items()), default=0))


def byte_size(buffer: Buffer) -> int:
    """Bytes of a buffer, up to where the next one may start."""
    return -(-buffer.size * itemsize(buffer.dtype) // ALIGNMENT) * ALIGNMENT
