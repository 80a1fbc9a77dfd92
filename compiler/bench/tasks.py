"""What the processes of a benchmark are told to do. Each contestant is measured in a process of its own."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from smc.compiler.bench.records import Shape

Device = Literal["cuda", "cpu"]


class Work(msgspec.Struct, frozen=True):
    """What to measure.

    Attributes:
        shapes, batches: every batch in every shape.
        seed: of the images.
        repeat: samples a figure, at most.
        references: a folder for float32 outputs, None where nothing is to be compared.
        record: write them, instead of comparing with them.
    """

    shapes: list[Shape]
    batches: list[int]
    seed: int
    repeat: int
    references: str | None
    record: bool = False


class PlanTask(msgspec.Struct, frozen=True, tag="plan"):
    """Measure a bundle. `block_matching`: also time the original's matching on the plan's descriptors, in torch on the same device."""

    bundle: str
    work: Work
    block_matching: bool = False


class OnnxRuntimeTask(msgspec.Struct, frozen=True, tag="onnxruntime"):
    """Measure ONNX Runtime on the float32 graphs of a bundle for CPUs, on the GPU or the CPU."""

    bundle: str
    work: Work
    on: Device


class TorchTask(msgspec.Struct, frozen=True, tag="torch"):
    """Measure the torch model in one of its variants. `weights`: a file that `WeightsTask` wrote."""

    config: dict[str, Any]
    weights: str
    variant: str
    work: Work
    on: Device


class WeightsTask(msgspec.Struct, frozen=True, tag="weights"):
    """Write the weights of a checkpoint, which must have this sha256, or random ones; once for all processes that need them."""

    config: dict[str, Any]
    checkpoint: str | None
    sha256: str | None
    seed: int | None
    out: str


Task = PlanTask | OnnxRuntimeTask | TorchTask | WeightsTask
