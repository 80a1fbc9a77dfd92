"""What a backend is asked to build."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from smc.compiler.targets import Target

Precision = Literal["fp32", "hybrid", "fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class PlanJob:
    """One plan to build.

    Attributes:
        graphs: "encoder" and "decoder" -> the typed ONNX graph, with its weights in a file beside it.
        target: the machine that the plan is for.
        shapes: (H, W) of the images that the plan must take; a pair may mix them.
        max_batch: the most images, and pairs, at once.
        output: the directory that takes the plan's files.
        cache: the directory, of this user, for what backends remember between builds; made when first used.
        report: told what is being done and which fraction of the plan is done, from 0 to 1.
        verbose: whether the backend's own log goes to stderr.
        tuning, kernels: see `BuildRequest`.
    """

    graphs: Mapping[str, Path]
    target: Target
    shapes: Sequence[tuple[int, int]]
    max_batch: int
    output: Path
    cache: Path
    report: Callable[[str, float], None] = lambda description, fraction: None
    verbose: bool = False
    tuning: Path | None = None
    kernels: Path | None = None
