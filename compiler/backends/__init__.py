"""Build sides of the backends: one module each, listed in order of preference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from smc.compiler.backends import cuda, onnxruntime, tensorrt
from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.targets import Target
from smc.exported.errors import NoTarget, UsageError


class Backend(Protocol):
    """What a build side offers."""

    NAME: str

    def caveat(self, target: Target) -> str:
        """What a user should know before relying on it for `target`, or ""."""

    def refusal(self, target: Target) -> str:
        """Why plans for `target` cannot be built by this backend on this machine, or "" if they can."""

    def precisions(self, target: Target) -> Sequence[Precision]:
        """What `--precision` may be for `target`, the default first."""

    def version(self) -> str:
        """Version of the library that the plan is for."""

    def ingredients(self, target: Target, tuning: Path | None) -> Sequence[str]:
        """What else a plan depends on, as text that changes with it. Raises BadInput: the tuning file cannot be read."""

    def runs_here(self, target: Target) -> bool:
        """Whether this machine can run a plan for `target`."""

    def write_plan(self, job: PlanJob) -> dict[str, str]:
        """Write the plan's files from the typed graphs; returns the file of each stage."""


BACKENDS: Sequence[Backend] = (tensorrt.full, tensorrt.rtx, cuda, onnxruntime)


def choose_backend(target: Target, name: str | None = None) -> Backend:
    """The backend of that name, or the first that can build for the target.

    Raises:
        UsageError: there is no backend of that name.
        NoTarget: it, or none, can build for the target; the message gives each one's reason.
    """
    asked = [backend for backend in BACKENDS if name in (None, backend.NAME)]
    if not asked:
        raise UsageError(f"unknown backend {name!r}, known: {', '.join(backend.NAME for backend in BACKENDS)}")
    refusals = {backend.NAME: backend.refusal(target) for backend in asked}
    for backend in asked:
        if not refusals[backend.NAME]:
            return backend
    reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
    raise NoTarget(f"nothing here can build for {target.title} ({reasons})", fix="smc targets shows what can be built")
