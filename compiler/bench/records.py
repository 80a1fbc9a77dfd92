"""What a run of `smc bench` found: the schema of its JSON, which docs/benchmarks.md describes."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

SCHEMA = 1

Clock = Literal["wall", "device"]
"""wall: `perf_counter` around one run, the device synchronised before and after. device: events of the GPU around several runs."""

Shape = tuple[int, int]
"""(H, W) of the network's input."""

IMAGE_IN, ENCODER, DECODERS, HEADS, DECODERS_AND_HEADS = "image in", "encoder", "decoders", "heads", "decoders and heads"
DECODERS_AND_DESCRIPTORS = "decoders and descriptors"
MATCHING, BLOCK_MATCHING, MATCHES_OUT, END_TO_END = "matching", "block matching", "matches out", "end to end"


class Figure(msgspec.Struct, frozen=True):
    """A time in seconds: median, smallest and largest of `count` samples, taken after a warm-up."""

    median: float
    min: float
    max: float
    count: int


class Timing(msgspec.Struct, frozen=True):
    """One stage's time for a whole batch of pairs. A stage "a/b" is a part of the stage "a"."""

    shape: Shape
    batch: int
    clock: Clock
    stage: str
    seconds: Figure


class Accuracy(msgspec.Struct, frozen=True):
    """Errors of the very program that was timed, for the last pair of a batch.

    Attributes:
        errors: output -> ||found - reference|| / ||reference||; 1e30 where it is not finite.
        matches, matches_reference, overlap: of the matches from the descriptors, shared / union; None but for a batch of one.
    """

    shape: Shape
    batch: int
    errors: dict[str, float]
    matches: int | None = None
    matches_reference: int | None = None
    overlap: float | None = None

    @property
    def worst(self) -> float:
        return max(self.errors.values())


class Memory(msgspec.Struct, frozen=True):
    """Memory in bytes after a batch, with all that ran before it in the process.

    Attributes:
        device: the fall of the GPU's free memory since its context was made, all libraries' own included; None without a GPU.
        engine: what the engine itself says; None where it does not.
        host_peak: the process's largest resident set.
    """

    shape: Shape
    batch: int
    device: int | None
    engine: int | None
    host_peak: int


class Result(msgspec.Struct):
    """What one process measured.

    Attributes:
        device: the GPU's name, or "cpu".
        versions: of the libraries at work.
        first_result: seconds that a torch model on the device took for its first pair, compilation included.
        notes: what was left out, and why.
        failure: why it ended early, or ""; what came before it counts.
    """

    device: str = ""
    versions: dict[str, str] = {}
    timings: list[Timing] = []
    accuracy: list[Accuracy] = []
    memory: list[Memory] = []
    first_result: float | None = None
    notes: list[str] = []
    failure: str = ""


class Contestant(msgspec.Struct):
    """A plan or a peer.

    Attributes:
        name: a short one, unique in the report.
        title: what it is.
        role: "subject" for the bundle under test, "peer", or "ablation" for what only the ablation asks for.
        load: times of fresh processes; the subject's only.
    """

    name: str
    title: str
    role: Literal["subject", "peer", "ablation"]
    result: Result
    load: dict[str, Figure] = {}

    def seconds(self, shape: Shape, batch: int, stage: str, *clocks: Clock) -> float | None:
        """The median of a stage by the first of `clocks` that has it."""
        for clock in clocks:
            for timing in self.result.timings:
                if (timing.shape, timing.batch, timing.clock, timing.stage) == (shape, batch, clock, stage):
                    return timing.seconds.median
        return None

    def stages(self, shape: Shape, batch: int, clock: Clock) -> dict[str, float]:
        """Stage -> median. Decoders and heads that were not timed as one are their sum."""
        found = {t.stage: t.seconds.median for t in self.result.timings if (t.shape, t.batch, t.clock) == (shape, batch, clock)}
        if DECODERS_AND_HEADS not in found and DECODERS in found and HEADS in found:
            found[DECODERS_AND_HEADS] = found[DECODERS] + found[HEADS]
        return found

    def network(self, shape: Shape, batch: int, clock: Clock) -> float | None:
        """Encoder, decoders and heads: the sum of two medians where the last two were timed as one, else of three."""
        stages = self.stages(shape, batch, clock)
        parts = [stages.get(ENCODER), stages.get(DECODERS_AND_HEADS)]
        return None if None in parts else sum(part for part in parts if part is not None)


class Rung(msgspec.Struct, frozen=True):
    """A step of the ablation, which keeps what the steps before it added.

    Attributes:
        technique: what this step adds.
        contestant: whose times these are.
        seconds: stage -> median, for one pair.
        clocks: stage -> the clock it was read from.
        total: the stages' sum; None where one is missing.
        why_not: why it was not measured, or "".
    """

    technique: str
    contestant: str
    seconds: dict[str, float]
    clocks: dict[str, Clock]
    total: float | None
    why_not: str = ""


class Report(msgspec.Struct):
    """Everything, and what somebody needs to repeat it."""

    schema: int
    created: str
    command: list[str]
    machine: dict[str, str]
    versions: dict[str, str]
    bundle: dict[str, Any]
    settings: dict[str, Any]
    contestants: list[Contestant]
    ablation: list[Rung] = []

    @property
    def subject(self) -> Contestant:
        return next(contestant for contestant in self.contestants if contestant.role == "subject")
