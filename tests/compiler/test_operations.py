"""What every family of operations offers to the compiler."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from smc.compiler.operations import FAMILIES, default_tile, launches, tile_type, tiles, workspace
from smc.compiler.tuning import tile_fields
from smc.plugins.conv.specification import Conv, contiguous
from smc.plugins.descriptor_head.specification import DescriptorHead
from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.flash_attention.launches import Attention, Heads
from smc.plugins.gemm.specification import Gemm
from smc.plugins.launch import Address, Descriptor
from smc.plugins.layer_norm.specification import LayerNorm
from smc.plugins.matching.specification import Matching
from smc.plugins.patches.specification import Patches
from smc.plugins.point_head.specification import PointHead
from smc.plugins.reduction.specification import Reduction
from smc.plugins.upsample.specification import Upsample

HEADS = Heads(batch=24 * 64, row=64, head=32)
MAP = contiguous("float16", 2, 12, 16, 64)
ROW = View("float16", (1,))

EXAMPLES: dict[type, Any] = {
    Gemm: Gemm(groups=1, m=96, n=128, k=64, a_row=64, out_row=128),
    Attention: Attention(batch=2, heads=2, n=24, m=24, head_size=32, scale=0.2, dtype="float16", q=HEADS, k=HEADS, v=HEADS, out=HEADS),
    LayerNorm: LayerNorm(
        groups=1, rows=48, channels=64, dtype="float16", out_dtype="float16", x_row=64, x_group=0, out_row=64, out_group=0, eps=1e-6
    ),
    Conv: Conv(1, 2, 12, 16, 64, 64, MAP, MAP),
    Upsample: Upsample(1, 2, 12, 16, 24, 32, 64, MAP, contiguous("float16", 2, 24, 32, 64)),
    PointHead: PointHead(1, 2, 12, 16, 64, 64, MAP, pts3d_group=3 * 384, conf_group=384),
    DescriptorHead: DescriptorHead(
        groups=1, batch=2, h=3, w=4, channels=24, patch=16, dtype="float16", f_row=6400, f_group=0, confidence=0.0
    ),
    Patches: Patches(batch=2, height=48, width=64, channels=3, patch=16, layout="nhwc", dtype="uint8", out_dtype="float16"),
    Elementwise: Elementwise("add", (1000,), (ROW, ROW), ROW),
    Reduction: Reduction(function="l2", rows=48, columns=24, dtype="float16", out_dtype="float32", x_row=24),
    Matching: Matching((48, 64), (64, 48)),
}

SMS = (80, 86, 89, 90, 120)


def test_every_family_has_an_example() -> None:
    assert EXAMPLES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("operation", EXAMPLES.values(), ids=lambda operation: type(operation).__name__)
@pytest.mark.parametrize("sm", SMS)
def test_the_default_tile_launches_everywhere(operation: Any, sm: int) -> None:
    tile = default_tile(operation, sm)
    made = launches(operation, tile, sm)
    assert made
    for launch in made:
        assert min(launch.grid) >= 1
        assert len(launch.values) == len(launch.kernel.types)
        assert sm >= 90 or not any(isinstance(value, Descriptor) for value in launch.values)
    # The first kernel of matching reads what is copied to the GPU just before it.
    overlapping = made[1:] if isinstance(operation, Matching) else made
    assert {launch.kernel.overlaps for launch in overlapping} == {sm >= 90}


@pytest.mark.parametrize("operation", EXAMPLES.values(), ids=lambda operation: type(operation).__name__)
@pytest.mark.parametrize("sm", SMS)
def test_every_tile_launches_or_says_why_not(operation: Any, sm: int) -> None:
    found = tiles(operation, sm)
    assert found
    assert len(found) == len(set(found))
    ran = 0
    for tile in found:
        besides = workspace(operation, tile)
        assert all(math.prod(shape) > 0 for _, shape in besides.values())
        try:
            made = launches(operation, tile, sm)
        except ValueError:
            continue
        ran += 1
        named = {value.operand for launch in made for value in launch.values if isinstance(value, Address | Descriptor)}
        assert besides.keys() <= named
    assert ran


@pytest.mark.parametrize("operation", EXAMPLES.values(), ids=lambda operation: type(operation).__name__)
def test_tiles_are_named_so_that_files_can_hold_them(operation: Any) -> None:
    for sm in SMS:
        for tile in (default_tile(operation, sm), *tiles(operation, sm)):
            fields = tile_fields(tile)
            assert tile_type(type(operation).__name__, fields.pop("kind"))(**fields) == tile
            assert all(value is None or isinstance(value, int | str | bool) for value in dataclasses.asdict(tile).values())


@pytest.mark.parametrize(("operation", "kind"), [("Gemm", "Address"), ("Gemm", "launches"), ("Gemm", "NoTile"), ("Nothing", "Tile")])
def test_what_is_no_tile(operation: str, kind: str) -> None:
    with pytest.raises(KeyError):
        tile_type(operation, kind)
