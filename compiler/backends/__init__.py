"""Build sides of the backends: one module each, listed in order of preference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from smc.compiler.backends import onnxruntime
from smc.compiler.targets import Target
from smc.exported.errors import NoTarget

if TYPE_CHECKING:
    from smc.compiler.bundle_writer import Staging
    from smc.compiler.export import Graphs
    from smc.exported.manifest import Tolerance


class Backend(Protocol):
    """What a build-side module offers."""

    NAME: str
    TOLERANCE: Tolerance

    def refusal(self, target: Target) -> str:
        """Why plans for `target` cannot be built or run by this backend, or "" if they can."""

    def version(self) -> str:
        """Version of the library that the plan is for."""

    def write_plan(self, graphs: Graphs, staging: Staging) -> dict[str, str]:
        """Write the plan's files; returns the file of each stage."""


BACKENDS: Sequence[Backend] = (onnxruntime,)


def choose_backend(target: Target) -> Backend:
    """The first backend that can build for the target.

    Raises:
        NoTarget: none can; the message gives each one's reason.
    """
    refusals = {backend.NAME: backend.refusal(target) for backend in BACKENDS}
    for backend in BACKENDS:
        if not refusals[backend.NAME]:
            return backend
    reasons = "; ".join(f"{name}: {why}" for name, why in refusals.items())
    raise NoTarget(f"nothing here can build for {target.title} ({reasons})", fix="smc targets shows what can be built")
