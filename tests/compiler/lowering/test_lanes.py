from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from smc.compiler.lowering.arena import byte_size, pack
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lanes import MAIN, SIDE, Slot, assign
from smc.compiler.lowering.views import Buffer
from tests.compiler.lowering.test_arena import buffer, call


def needs(calls: Sequence[Call]) -> list[set[int]]:
    """Which calls each must come after: those that write what it reads or writes, or read what it writes."""
    found = []
    for number, one in enumerate(calls):
        before = set()
        for other_number, other in enumerate(calls[:number]):
            shared = set(one.operands.values()) & set(other.operands.values())
            if any(_writes(one, given) or _writes(other, given) for given in shared):
                before.add(other_number)
        found.append(before)
    return found


def _writes(one: Call, given: Buffer) -> bool:
    return any(one.operands[name] is given for name in one.writes)


def ends_before(slots: Sequence[Slot]) -> list[set[int]]:
    """What has ended when a call starts, by the order of its lane and by what the lanes wait for."""
    ended: list[set[int]] = []
    last = {MAIN: -1, SIDE: -1}
    for number, slot in enumerate(slots):
        done = set()
        for other in (last[slot.lane], *slot.waits):
            if other >= 0:
                done |= ended[other] | {other}
        assert all(slots[other].lane != slot.lane for other in slot.waits)
        ended.append(done)
        last[slot.lane] = number
    return ended


def check(calls: Sequence[Call], slots: Sequence[Slot]) -> None:
    ended = ends_before(slots)
    for number, before in enumerate(needs(calls)):
        assert before <= ended[number], f"{number} must come after {before - ended[number]}"
    for number, slot in enumerate(slots):
        if slot.lane == MAIN:
            assert (slot.first, slot.last) == (number, number)
        else:
            # It starts no earlier than the call of the main lane that it waits for, and has ended where that lane waits for it.
            assert all(slot.first >= other for other in slot.waits)
            waiting = [other for other, theirs in enumerate(slots) if theirs.lane == MAIN and number in ended[other]]
            assert slot.last <= min(waiting, default=len(slots))
            assert slot.first <= slot.last


def check_memory(calls: Sequence[Call], slots: Sequence[Slot]) -> None:
    """That buffers share memory only where everything that uses the one has ended before anything uses the other."""
    ended = ends_before(slots)
    arena = pack(calls, slots, set())
    users = {one: [number for number, given in enumerate(calls) if one in given.operands.values()] for one in arena.offsets}
    for one, other in itertools.combinations(arena.offsets, 2):
        first, second = arena.offsets[one], arena.offsets[other]
        if first < second + byte_size(other) and second < first + byte_size(one):
            assert any(all(early in ended[late] for early in users[a] for late in users[b]) for a, b in ((one, other), (other, one))), (
                f"{one.name} and {other.name}"
            )


def test_a_chain_is_in_one_lane() -> None:
    one, two, three = (buffer(name, 8) for name in ("one", "two", "three"))
    slots = assign([call([one], [two]), call([two], [three])])
    assert [slot.lane for slot in slots] == [MAIN, MAIN]
    assert [slot.waits for slot in slots] == [(), ()]


def test_the_shorter_branch_is_beside_the_longer_one() -> None:
    b = [buffer(f"b{i}", 8) for i in range(6)]
    calls = [call([], [b[0]]), call([b[0]], [b[1]]), call([b[0]], [b[2]]), call([b[2]], [b[3]]), call([b[1], b[3]], [b[4]])]
    slots = assign(calls)
    assert [slot.lane for slot in slots] == [MAIN, SIDE, MAIN, MAIN, MAIN]
    assert slots[1].waits == (0,)
    assert slots[4].waits == (1,)
    check(calls, slots)


def test_no_calls() -> None:
    assert assign([]) == []


def test_random_programs_wait_for_what_they_need() -> None:
    choose = random.Random(1)
    side = 0
    for _ in range(150):
        made = [buffer("input", 8)]
        calls = []
        for number in range(choose.randint(1, 20)):
            reads = choose.sample(made, min(len(made), choose.randint(1, 3)))
            if choose.random() < 0.15 and len(made) > 1:  # one buffer may be written in parts, by several calls
                writes = choose.choice(made[1:])
            else:
                writes = buffer(f"b{number}", 8)
                made.append(writes)
            calls.append(call([read for read in reads if read is not writes], [writes]))
        slots = assign(calls)
        check(calls, slots)
        check_memory(calls, slots)
        side += sum(slot.lane == SIDE for slot in slots)
    assert side > 100
