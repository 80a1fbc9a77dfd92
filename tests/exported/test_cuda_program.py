from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smc.exported.engines.cuda_program import (
    Float32,
    Int32,
    KernelCode,
    Plan,
    Pointer,
    Program,
    Region,
    Resize,
    Step,
    TensorMap,
    decode_plan,
    encode_plan,
)
from smc.exported.errors import BundleDamaged, SmcError
from tests.bundles import FUZZ


def plan() -> Plan:
    """One program of two steps: everything that a plan can hold, used up to its last byte."""
    x, out = Region("arena", 0, "float16", (4, 64)), Region("arena", 512, "float32", (128,))
    arguments = (
        Pointer("arena", 512),
        Pointer("weights", 256),
        TensorMap("weights", 0, 6, 3, (16, 64), 2, (4, 64), (64, 1)),
        Int32(-7),
        Float32(0.5),
    )
    steps = (Step(0, (4, 2, 1), arguments, False, "first"), Step(1, (1, 1, 1), (), True, "second", lane=1, waits=(0,)))
    kernels = (KernelCode("first", 0, 100, 128, 4096), KernelCode("second", 100, 50, 256, 0))
    return Plan(kernels, (Program("encoder", {"x": x}, {"out": out}, 1024, steps),), 512, Resize(0, 1, rows=4, bytes=256))


def test_a_plan_survives_its_file() -> None:
    assert decode_plan(encode_plan(plan())) == plan()
    assert decode_plan(memoryview(encode_plan(plan()))) == plan()
    assert json.loads(encode_plan(plan()))["programs"][0]["steps"][0]["arguments"][0] == {
        "type": "pointer",
        "space": "arena",
        "offset": 512,
    }


Change = Callable[[Any], None]


def step(content: Any, number: int = 0) -> Any:
    return content["programs"][0]["steps"][number]


CHANGES: dict[str, Change] = {
    "an input beyond the arena": lambda p: p["programs"][0]["inputs"]["x"].update(offset=1024),
    "an input that ends outside": lambda p: p["programs"][0]["inputs"]["x"].update(shape=[4, 129]),
    "an output that ends outside": lambda p: p["programs"][0]["outputs"]["out"].update(offset=513),
    "an input in front of the arena": lambda p: p["programs"][0]["inputs"]["x"].update(offset=-2),
    "a smaller arena": lambda p: p["programs"][0].update(arena_bytes=1023),
    "no arena": lambda p: p["programs"][0].update(arena_bytes=-1),
    "fewer weights": lambda p: p.update(weights_bytes=255),
    "a pointer beyond the arena": lambda p: step(p)["arguments"][0].update(offset=1025),
    "an input among the weights": lambda p: p["programs"][0]["inputs"]["x"].update(space="weights", offset=0),
    "a negative size": lambda p: p["programs"][0]["outputs"]["out"].update(shape=[-1]),
    "a tensor map that goes backwards": lambda p: step(p)["arguments"][2].update(strides=[-64, 1]),
    "an empty tensor map": lambda p: step(p)["arguments"][2].update(shape=[0, 64]),
    "an integer of more than 32 bits": lambda p: step(p)["arguments"][3].update(value=1 << 31),
    "an empty grid": lambda p: step(p).update(grid=[4, 0, 1]),
    "a kernel in front of its file": lambda p: p["kernels"][0].update(offset=-8),
    "a kernel of no code": lambda p: p["kernels"][0].update(size=0),
    "a kernel of too many threads": lambda p: p["kernels"][0].update(threads=2048),
    "a pointer in front of it": lambda p: step(p)["arguments"][0].update(offset=-16),
    "a tensor map that ends outside": lambda p: step(p)["arguments"][2].update(shape=[5, 64]),
    "a tensor map of wider rows": lambda p: step(p)["arguments"][2].update(strides=[65, 1]),
    "a tensor map of another rank": lambda p: step(p)["arguments"][2].update(strides=[64]),
    "a space that is none": lambda p: step(p)["arguments"][0].update(space="stack"),
    "an argument that is none": lambda p: step(p)["arguments"][0].update(type="string"),
    "a kernel that is not there": lambda p: step(p).update(kernel=2),
    "a kernel before the first": lambda p: step(p).update(kernel=-1),
    "a lane that is not there": lambda p: step(p).update(lane=2),
    "a step that waits for itself": lambda p: step(p, 1).update(waits=[1]),
    "a step that waits for none": lambda p: step(p, 1).update(waits=[-1]),
    "a type that is none": lambda p: p["programs"][0]["inputs"]["x"].update(dtype="float17"),
    "resizing by a kernel that is not there": lambda p: p["resize"].update(across=2),
    "resizing by a kernel before the first": lambda p: p["resize"].update(down=-1),
    "resizing nothing at a time": lambda p: p["resize"].update(rows=0),
    "no programs": lambda p: p.pop("programs"),
    "a number for a name": lambda p: p["kernels"][0].update(name=1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_damaged_plans_are_refused(change: Change) -> None:
    content = json.loads(encode_plan(plan()))
    change(content)
    with pytest.raises(BundleDamaged, match=r"plan\.json"):
        decode_plan(json.dumps(content).encode())


NESTED = b'{"later": ' + 200_000 * b"[" + 200_000 * b"]" + b"}"


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"{}", b"\xff", b'{"kernels": []}', pytest.param(NESTED, id="nested too deep")])
def test_what_is_no_plan(data: bytes) -> None:
    with pytest.raises(BundleDamaged):
        decode_plan(data)


@FUZZ
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_changed_byte_never_leads_outside(position: int, value: int) -> None:
    """It is refused, or what it says still lies inside."""
    data = bytearray(encode_plan(plan()))
    data[position % len(data)] = value
    try:
        found = decode_plan(bytes(data))
    except SmcError:
        return
    for program in found.programs:
        sizes = {"arena": program.arena_bytes, "weights": found.weights_bytes}
        for region in (*program.inputs.values(), *program.outputs.values()):
            assert 0 <= region.offset <= sizes[region.space]
        for one in program.steps:
            for argument in one.arguments:
                if isinstance(argument, Pointer | TensorMap):
                    assert 0 <= argument.offset <= sizes[argument.space]


@FUZZ
@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=9))
def test_any_json_is_a_plan_or_damaged(content: Any) -> None:
    with pytest.raises(BundleDamaged):
        decode_plan(msgspec.json.encode({"kernels": content, "programs": content, "weights_bytes": content}))
