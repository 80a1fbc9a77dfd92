"""Plans for ONNX Runtime: the graphs as they are, in float32, for any CPU."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.targets import Target

NAME = "onnxruntime"


def caveat(target: Target) -> str:
    return ""


def refusal(target: Target) -> str:
    return "" if target.sm is None else "runs on CPUs only"


def precisions(target: Target) -> Sequence[Precision]:
    return ("fp32",)


def version() -> str:
    return metadata.version("onnxruntime")


def ingredients(target: Target, tuning: Path | None) -> Sequence[str]:
    return ()


def runs_here(target: Target) -> bool:
    return target.sm is None


def write_plan(job: PlanJob) -> dict[str, str]:
    """The graphs themselves are the plan."""
    return {stage: path.name for stage, path in job.graphs.items()}
