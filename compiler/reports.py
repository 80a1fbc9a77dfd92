"""Reports that a build leaves in its bundle, for `smc inspect`. Needs none of the packages that a build does."""

from __future__ import annotations

from typing import TypeVar

import msgspec

from smc.exported.bundle import Bundle
from smc.exported.errors import BundleDamaged

T = TypeVar("T")

PASSES = "passes.json"
"""What the passes did to each stage's graph: a list of `StageReport`."""

LAYERS = "layers.json"
"""What TensorRT built, since an engine cannot be opened without its GPU: stage -> `StageLayers`."""


class PassSummary(msgspec.Struct, frozen=True):
    """What one pass did. `declined`: (node, why); `islands`: (node, why it stays in float32), of HybridCast."""

    name: str
    rewrites: int
    nodes_before: int
    nodes_after: int
    declined: list[tuple[str, str]]
    islands: list[tuple[str, str]]


class StageReport(msgspec.Struct, frozen=True):
    """What the passes did to a stage's graph."""

    stage: str
    passes: list[PassSummary]


class LayerOutput(msgspec.Struct, frozen=True):
    """A layer's output; None for a dynamic size."""

    type: str
    shape: list[int | None]


class Layer(msgspec.Struct, frozen=True):
    name: str
    type: str
    outputs: list[LayerOutput]


class LayerTotal(msgspec.Struct, frozen=True):
    """How many layers of a type compute in a precision."""

    type: str
    precision: str
    layers: int


class AttentionChoice(msgspec.Struct, frozen=True):
    """Which attention the engine has, "native" or "plugin", by which times; `why_not` if the plugin could not be built."""

    taken: str
    milliseconds: dict[str, float]
    why_not: str


class StageLayers(msgspec.Struct, frozen=True):
    """A stage's network before TensorRT fused it, and the sizes of its weights, engine and workspace."""

    layers: list[Layer]
    totals: list[LayerTotal]
    weight_bytes: int
    engine_bytes: int
    workspace_limit_bytes: int
    attention: AttentionChoice | None = None


def read_passes(bundle: Bundle) -> list[StageReport]:
    """Empty where the file was left out of a deployment. Raises BundleDamaged."""
    return _read(bundle, PASSES, list[StageReport]) if PASSES in bundle.files else []


def read_layers(bundle: Bundle) -> dict[str, StageLayers]:
    """Empty also for backends whose plans have no layers of their own. Raises BundleDamaged."""
    return _read(bundle, LAYERS, dict[str, StageLayers]) if LAYERS in bundle.files else {}


def _read(bundle: Bundle, name: str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(bundle.files[name], type=kind)
    except msgspec.DecodeError as error:
        raise BundleDamaged(f"{bundle.path / name}: not the report it should be ({error})") from error
