from __future__ import annotations

from smc.compiler.lowering.parts import DECODERS, HEADS, parts
from smc.compiler.lowering.views import Buffer, View, contiguous
from tests.compiler.lowering.test_arena import buffer, call


def outputs(**buffers: Buffer) -> dict[str, View]:
    return {name: contiguous(one, (one.size,)) for name, one in buffers.items()}


def test_the_heads_are_what_only_points_or_only_descriptors_come_from() -> None:
    x, first, middle, last, merged, dpt, points, joined, desc = (
        buffer(name, 8) for name in ("x", "first", "middle", "last", "merged", "dpt", "points", "joined", "desc")
    )
    calls = [
        call([x], [first]),
        call([first], [dpt]),  # reads an early level, and lies between the decoders' calls
        call([first], [middle]),
        call([middle], [last]),
        call([dpt, last], [merged]),
        call([x], [joined]),  # the features' share of a concatenation
        call([last], [joined]),
        call([joined], [desc]),
        call([merged], [points]),
    ]
    found = parts(calls, outputs(pts3d1=points, conf1=points, desc1=desc, desc_conf1=desc))
    assert found == [DECODERS, HEADS, DECODERS, DECODERS, HEADS, HEADS, HEADS, HEADS, HEADS]


def test_a_call_with_results_for_both_is_the_decoders() -> None:
    x, tokens, copy, points, desc = (buffer(name, 8) for name in ("x", "tokens", "copy", "points", "desc"))
    calls = [call([x], [tokens, copy]), call([tokens], [points]), call([copy], [desc])]
    assert parts(calls, outputs(pts3d2=points, desc2=desc)) == [DECODERS, HEADS, HEADS]


def test_a_stage_without_both_heads_has_no_parts() -> None:
    x, y = buffer("x", 8), buffer("y", 8)
    for name in ("features", "desc1", "pts3d1"):
        assert parts([call([x], [y])], outputs(**{name: y})) == [""]
    assert parts([], outputs(pts3d1=y, desc1=x)) == []
