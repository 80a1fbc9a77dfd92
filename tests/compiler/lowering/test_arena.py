from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

from smc.compiler.launch_program import ALIGNMENT
from smc.compiler.lowering.arena import Arena, byte_size, pack
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lanes import MAIN, Slot, assign
from smc.compiler.lowering.views import Buffer


def buffer(name: str, size: int, dtype: str = "float16") -> Buffer:
    return Buffer(name, dtype, size)


def call(reads: Sequence[Buffer], writes: Sequence[Buffer]) -> Call:
    operands = {f"in{i}": given for i, given in enumerate(reads)} | {f"out{i}": made for i, made in enumerate(writes)}
    return Call(None, operands, tuple(f"out{i}" for i in range(len(writes))), "call")


def in_order(calls: Sequence[Call]) -> list[Slot]:
    """All in one lane."""
    return [Slot(MAIN, (), number, number) for number in range(len(calls))]


def check(calls: Sequence[Call], slots: Sequence[Slot], kept: set[Buffer], fixed: dict[Buffer, int] | None = None) -> Arena:
    """Pack, and compare every two buffers that are alive at once."""
    arena = pack(calls, slots, kept, fixed)
    lives: dict[Buffer, tuple[int, int]] = {one: (-1, len(calls)) for one in kept}
    for given, slot in zip(calls, slots, strict=True):
        for one in given.operands.values():
            if one.values is None:
                first, last = lives.get(one, (slot.first, slot.last))
                lives[one] = min(first, slot.first), max(last, slot.last)
    assert arena.offsets.keys() == lives.keys()
    for one, other in itertools.combinations(lives, 2):
        if lives[one][0] <= lives[other][1] and lives[other][0] <= lives[one][1]:
            apart = (
                arena.offsets[one] + byte_size(one) <= arena.offsets[other] or arena.offsets[other] + byte_size(other) <= arena.offsets[one]
            )
            assert apart, f"{one.name} and {other.name} are alive at once"
    for one, offset in arena.offsets.items():
        assert offset % ALIGNMENT == 0
        assert offset >= 0
        assert offset + byte_size(one) <= arena.size
    return arena


def chain(length: int, size: int = 1000) -> tuple[list[Call], list[Buffer]]:
    buffers = [buffer(f"b{i}", size) for i in range(length + 1)]
    return [call([a], [b]) for a, b in itertools.pairwise(buffers)], buffers


def test_a_chain_takes_two_places_in_turn() -> None:
    calls, buffers = chain(9)
    arena = check(calls, in_order(calls), set())
    assert arena.size == 2 * byte_size(buffers[0])


def test_what_is_kept_shares_its_place_with_nothing() -> None:
    calls, buffers = chain(9)
    arena = check(calls, in_order(calls), {buffers[0], buffers[-1]})
    assert arena.size == 4 * byte_size(buffers[0])


def test_an_operand_and_a_result_of_one_call_lie_apart() -> None:
    one, other = buffer("one", 64), buffer("other", 64)
    check([call([one], [other])], in_order([call([one], [other])]), set())


def test_a_residual_stays_until_it_is_added() -> None:
    calls, buffers = chain(5)
    calls.append(call([buffers[0], buffers[-1]], [buffer("sum", 1000)]))
    arena = check(calls, in_order(calls), set())
    assert arena.size == 3 * byte_size(buffers[0])


def test_constants_take_no_memory() -> None:
    import numpy as np

    weight = Buffer("weight", "float32", 8, np.zeros(8, np.float32))
    one = buffer("one", 8)
    calls = [call([weight], [one])]
    assert pack(calls, in_order(calls), set()).offsets.keys() == {one}


def test_nothing_takes_nothing() -> None:
    assert pack([], [], set()).size == 0


def test_what_only_one_call_uses_has_a_place() -> None:
    """Memory that a call's launches need besides."""
    one, besides, other = buffer("one", 100), buffer("besides", 3000, "float32"), buffer("other", 100)
    calls = [call([], [one]), call([one, besides], [other]), call([other], [buffer("last", 100)])]
    assert check(calls, in_order(calls), set()).size >= byte_size(besides) + 2 * byte_size(one)


def test_calls_that_run_beside_others_keep_their_memory_meanwhile() -> None:
    """A branch that is shorter than the other runs beside it, at no certain time: what both use lies apart."""
    start = buffer("start", 1000)
    long, short = [start], [start]
    calls = [call([], [start])]
    for i in range(6):
        long.append(buffer(f"long{i}", 1000))
        calls.append(call([long[-2]], [long[-1]]))
    for i in range(3):
        short.append(buffer(f"short{i}", 1000))
        calls.append(call([short[-2]], [short[-1]]))
    calls.append(call([long[-1], short[-1]], [buffer("end", 1000)]))
    slots = assign(calls)
    arena = check(calls, slots, set())
    for one, other in itertools.product(long[1:], short[1:]):
        assert arena.offsets[one] != arena.offsets[other], f"{one.name} and {other.name}"


def test_random_programs() -> None:
    choose = random.Random(0)
    for _ in range(60):
        made = [buffer("input", choose.randint(1, 4000))]
        calls = []
        for number in range(choose.randint(1, 25)):
            reads = choose.sample(made, min(len(made), choose.randint(1, 3)))
            made.append(buffer(f"b{number}", choose.randint(1, 4000), choose.choice(["float16", "float32", "uint8"])))
            calls.append(call(reads, [made[-1]]))
        kept = {made[0], made[-1]}
        check(calls, in_order(calls), kept)
        arena = check(calls, assign(calls), kept)
        fixed = {made[-1]: arena.offsets[made[-1]]}
        assert check(calls[-1:], in_order(calls[-1:]), {made[-1]}, fixed).offsets[made[-1]] == fixed[made[-1]]
