"""The operations that launch programs are made of: for each kind of attributes, the module of `plugins` that launches it."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from smc.plugins.conv import launches as conv
from smc.plugins.conv.specification import Conv
from smc.plugins.descriptor_head import launches as descriptor_head
from smc.plugins.descriptor_head.specification import DescriptorHead
from smc.plugins.elementwise import launches as elementwise
from smc.plugins.elementwise.specification import Elementwise
from smc.plugins.flash_attention import launches as attention
from smc.plugins.flash_attention.launches import Attention
from smc.plugins.gemm import launches as gemm
from smc.plugins.gemm.specification import Gemm
from smc.plugins.launch import Launch
from smc.plugins.layer_norm import launches as layer_norm
from smc.plugins.layer_norm.specification import LayerNorm
from smc.plugins.matching import launches as matching
from smc.plugins.matching.specification import Matching
from smc.plugins.patches import launches as patches
from smc.plugins.patches.specification import Patches
from smc.plugins.point_head import launches as point_head
from smc.plugins.point_head.specification import PointHead
from smc.plugins.reduction import launches as reduction
from smc.plugins.reduction.specification import Reduction
from smc.plugins.upsample import launches as upsample
from smc.plugins.upsample.specification import Upsample

FAMILIES: dict[type, ModuleType] = {
    Gemm: gemm,
    Attention: attention,
    LayerNorm: layer_norm,
    Conv: conv,
    Upsample: upsample,
    PointHead: point_head,
    DescriptorHead: descriptor_head,
    Patches: patches,
    Elementwise: elementwise,
    Reduction: reduction,
    Matching: matching,
}


def tiles(operation: Any, sm: int) -> list[Any]:
    """The ways to cut an operation that are worth timing on compute capability `sm` (90 is 9.0)."""
    return FAMILIES[type(operation)].tiles(operation, sm)


def default_tile(operation: Any, sm: int) -> Any:
    """The way to cut an operation where nothing was timed."""
    return FAMILIES[type(operation)].default_tile(operation, sm)


def launches(operation: Any, tile: Any, sm: int) -> list[Launch]:
    """The launches that do an operation."""
    return FAMILIES[type(operation)].launches(operation, tile, sm)


def tile_type(operation_name: str, kind: str) -> type:
    """The class `kind` of tiles, such as "Tile", of an operation, by its name. Raises KeyError: there is none."""
    module = next((module for kind, module in FAMILIES.items() if kind.__name__ == operation_name), None)
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and kind.endswith("Tile") and dataclasses.is_dataclass(found)):
        raise KeyError(f"{operation_name} has no {kind}")
    return found


def workspace(operation: Any, tile: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Memory that the launches need beside the operands, while they run: name -> (dtype, shape)."""
    needs = getattr(FAMILIES[type(operation)], "workspace", None)
    return {} if needs is None else needs(operation, tile)
