"""What `smc inspect` shows of a bundle beyond its manifest: what the passes did, and what the plan consists of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from smc.compiler.backends.tensorrt import LAYERS
from smc.compiler.build import PASSES
from smc.compiler.optimize import StageReport
from smc.exported.bundle import Bundle
from smc.exported.errors import BundleMismatch, NoTarget


@dataclass(frozen=True)
class Contents:
    """What is known of a bundle's plan.

    Attributes:
        passes: what the passes did to each stage's graph.
        layers: stage -> layers, their totals, and the bytes of weights and engine, as `layers.json` has them; empty for
            backends that have no layers of their own.
        engine: stage -> what TensorRT's inspector says of the engine on this machine's GPU; None where it cannot be opened.
        why_not: the reason for that.
    """

    passes: list[StageReport]
    layers: dict[str, Any]
    engine: dict[str, Any] | None = None
    why_not: str = ""


def inspect_contents(bundle: Bundle) -> Contents:
    """Read what the build wrote, and ask the engine itself where its GPU is."""
    passes = msgspec.json.decode(bundle.files[PASSES], type=list[StageReport])
    if LAYERS not in bundle.files:
        return Contents(passes, {})
    layers = msgspec.json.decode(bundle.files[LAYERS])
    try:
        from smc.exported.engines.tensorrt import engine_layers

        return Contents(passes, layers, engine_layers(bundle.files, bundle.manifest))
    except (NoTarget, BundleMismatch) as why:
        return Contents(passes, layers, why_not=str(why))
