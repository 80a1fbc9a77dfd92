"""What `smc inspect` shows of a bundle beyond its manifest: what the passes did, and what the plan consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smc.compiler.reports import StageLayers, StageReport, read_layers, read_passes
from smc.exported.bundle import Bundle
from smc.exported.errors import BundleMismatch, NoTarget


@dataclass(frozen=True)
class Contents:
    """What is known of a bundle's plan.

    Attributes:
        passes: what the passes did to each stage's graph.
        layers: stage -> its layers, before TensorRT fused them; empty for backends that have no layers of their own.
        engine: stage -> what TensorRT's inspector says of the engine on this machine's GPU; None where it cannot be opened.
        why_not: the reason for that.
    """

    passes: list[StageReport]
    layers: dict[str, StageLayers]
    engine: dict[str, Any] | None = None
    why_not: str = ""


def inspect_contents(bundle: Bundle) -> Contents:
    """Read what the build wrote, and ask the engine itself where its GPU is. Raises BundleDamaged."""
    passes, layers = read_passes(bundle), read_layers(bundle)
    if not layers:
        return Contents(passes, layers)
    try:
        from smc.exported.engines.tensorrt import engine_layers

        return Contents(passes, layers, engine_layers(bundle.files, bundle.manifest))
    except (NoTarget, BundleMismatch) as why:
        return Contents(passes, layers, why_not=str(why))
