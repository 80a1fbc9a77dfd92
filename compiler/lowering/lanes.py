"""Which calls run beside others: the longest chain in one lane, all that it does not wait for soon in a second one.

Kernels of the chain that are too small for the whole GPU then leave room that the others fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smc.compiler.lowering.context import Call
from smc.compiler.lowering.views import Buffer

MAIN, SIDE = 0, 1


@dataclass(frozen=True)
class Slot:
    """When a call runs.

    Attributes:
        lane: calls of one lane run in their order.
        waits: calls of the other lane that must have ended, by number.
        first, last: it runs after call `first` of the main lane has begun and before call `last` of it ends; its own number there.
    """

    lane: int
    waits: tuple[int, ...]
    first: int
    last: int


def assign(calls: Sequence[Call]) -> list[Slot]:
    """A slot for each call, which come in an order that they could run in."""
    needs = _needs(calls)
    main = _longest_chain(needs)
    lanes = [MAIN if number in main else SIDE for number in range(len(calls))]
    waits = _waits(needs, lanes)
    slots = []
    started = -1
    for number, lane in enumerate(lanes):
        if lane == MAIN:
            slots.append(Slot(lane, waits[number], number, number))
            continue
        started = max((started, *waits[number]))
        slots.append(Slot(lane, waits[number], started, len(calls)))
    ends = len(calls)
    for number in reversed(range(len(calls))):
        if lanes[number] == SIDE:
            waiting = [other for other in range(number + 1, len(calls)) if number in waits[other]]
            ends = min([ends, *waiting])
            slots[number] = Slot(SIDE, slots[number].waits, slots[number].first, ends)
    return slots


def _needs(calls: Sequence[Call]) -> list[set[int]]:
    """For each call the calls before it whose results it reads, or whose memory it writes again."""
    writers: dict[Buffer, set[int]] = {}
    readers: dict[Buffer, set[int]] = {}
    needs = []
    for number, call in enumerate(calls):
        found: set[int] = set()
        for name, buffer in call.operands.items():
            found |= writers.get(buffer, set())
            if name in call.writes:
                found |= readers.get(buffer, set())
        for name, buffer in call.operands.items():
            (writers if name in call.writes else readers).setdefault(buffer, set()).add(number)
        needs.append(found - {number})
    return needs


def _longest_chain(needs: Sequence[set[int]]) -> set[int]:
    """The calls of the longest path through the graph of what needs what."""
    length: list[int] = []
    for before in needs:
        length.append(1 + max((length[other] for other in before), default=0))
    chain: set[int] = set()
    number = max(range(len(needs)), key=lambda number: length[number], default=None)
    while number is not None:
        chain.add(number)
        number = max(needs[number], key=lambda other: length[other], default=None)
    return chain


def _waits(needs: Sequence[set[int]], lanes: Sequence[int]) -> list[tuple[int, ...]]:
    """The last call of the other lane that each needs, where no earlier call of its own lane has waited for that already."""
    seen = {MAIN: -1, SIDE: -1}
    waits: list[tuple[int, ...]] = []
    for number, before in enumerate(needs):
        lane = lanes[number]
        latest = max((other for other in before if lanes[other] != lane), default=-1)
        if latest > seen[lane]:
            seen[lane] = latest
            waits.append((latest,))
        else:
            waits.append(())
    return waits
