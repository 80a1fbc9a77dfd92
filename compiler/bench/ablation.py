"""The paper's ablation: its techniques, one added to the other, each timed stage by stage. Speedy MASt3R, section 4.3 and table 5."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from smc.compiler.bench import records
from smc.compiler.bench.records import Clock, Contestant, Rung, Shape


@dataclass(frozen=True)
class Step:
    """A step of the ladder: whose network, and whose matching ("block": the original's double loop in torch)."""

    technique: str
    contestant: str
    matching: Literal["block", "own"]


def steps(fp32: str, hybrid: str) -> list[Step]:
    """The ladder; `fp32` and `hybrid` are the contestants that run the plans of these precisions."""
    return [
        Step("original, TF32 as shipped", "eager-tf32", "block"),
        Step("original, strict float32", "eager-float32", "block"),
        Step("+ FlashMatch", "eager-float32-flash", "block"),
        Step("+ GraphFusion", fp32, "block"),
        Step("+ FastNN-Lite", fp32, "own"),
        Step("+ HybridCast", hybrid, "own"),
    ]


def ladder(steps: list[Step], contestants: Mapping[str, Contestant], shape: Shape, why_not: Mapping[str, str]) -> list[Rung]:
    """The steps with the times of one pair.

    A stage's time is the GPU's own where there is one; the original's matching, which returns to the host all the time, has wall
    time alone.

    Args:
        steps: the ladder.
        contestants: by name, those that were measured.
        shape: of the input.
        why_not: contestant -> why it was not measured.
    """
    return [_rung(step, contestants.get(step.contestant), shape, why_not.get(step.contestant, "not measured")) for step in steps]


def _rung(step: Step, contestant: Contestant | None, shape: Shape, why_not: str) -> Rung:
    if contestant is None:
        return Rung(step.technique, step.contestant, {}, {}, None, why_not)
    is_plan = contestant.seconds(shape, 1, records.DECODERS_AND_HEADS, "wall") is not None
    matching = records.BLOCK_MATCHING if is_plan and step.matching == "block" else records.MATCHING
    # A plan's heads run beside its decoders: they are one stage.
    decoding = (records.DECODERS_AND_HEADS,) if is_plan else (records.DECODERS, records.HEADS)
    seconds: dict[str, float] = {}
    clocks: dict[str, Clock] = {}
    for clock in ("device", "wall"):
        found = contestant.stages(shape, 1, clock)
        if records.ENCODER in found and records.ENCODER not in seconds:
            for stage in (records.ENCODER, *decoding):
                if stage in found:
                    seconds[stage], clocks[stage] = found[stage], clock
        if matching in found and records.MATCHING not in seconds:
            seconds[records.MATCHING], clocks[records.MATCHING] = found[matching], clock
    whole = all(stage in seconds for stage in (records.ENCODER, *decoding, records.MATCHING))
    failure = contestant.result.failure or ("" if whole else "a stage could not be timed")
    return Rung(step.technique, step.contestant, seconds, clocks, sum(seconds.values()) if whole else None, failure)
