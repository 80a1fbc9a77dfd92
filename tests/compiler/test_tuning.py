from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from smc.compiler import tuning
from smc.compiler.operations import default_tile
from smc.compiler.tuning import Tuned, Tuning, TuningFile, describe, read_tuning, shipped_tuning, tile_fields
from smc.exported.errors import BadInput
from smc.plugins.conv.specification import Conv, contiguous
from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.gemm.specification import Gemm
from smc.plugins.matching.specification import Matching


def product(m: int = 768, n: int = 1024, **changes: Any) -> Gemm:
    return Gemm(groups=1, m=m, n=n, k=256, a_row=256, out_row=n, **changes)


def convolution(height: int = 24, batch: int = 1) -> Conv:
    x = contiguous("float16", batch, height, 32, 64)
    return Conv(1, batch, height, 32, 64, 64, x, x)


def chosen(operation: Any) -> Any:
    """A tile that is not the default one."""
    return replace(default_tile(operation, 90), warps=1)


def file(*operations: Any, sm: int = 90, gpu: str = "h200") -> TuningFile:
    return TuningFile(gpu, sm, "2025-01-01", {}, {describe(one): Tuned(tile_fields(chosen(one)), 1.0) for one in operations})


def test_what_was_timed_is_used() -> None:
    assert Tuning(90, file(product())).tile(product()) == chosen(product())
    assert Tuning(90, file(convolution())).tile(convolution()) == chosen(convolution())


def test_what_is_not_known_gets_the_default() -> None:
    for known in (Tuning(90), Tuning(90, file()), Tuning(90, file(convolution()))):
        assert known.tile(product()) == default_tile(product(), 90)


@pytest.mark.parametrize("m", [193, 384, 1536, 3071])
def test_another_size_of_the_image_takes_the_tile_of_the_nearest(m: int) -> None:
    assert Tuning(90, file(product())).tile(product(m)) == chosen(product())


@pytest.mark.parametrize("m", [100, 4000])
def test_a_size_that_is_too_different_gets_the_default(m: int) -> None:
    assert Tuning(90, file(product())).tile(product(m)) == default_tile(product(m), 90)


def test_the_nearest_of_several_sizes() -> None:
    near, far = product(1000), product(400)
    known = file(near, far)
    known.tiles[describe(far)].tile["warps"] = 2
    assert Tuning(90, known).tile(product(900)) == chosen(near)
    assert Tuning(90, known).tile(product(450)).warps == 2


def test_an_exact_size_comes_before_a_similar_one() -> None:
    known = file(product(1000), product(1001))
    known.tiles[describe(product(1001))].tile["warps"] = 2
    assert Tuning(90, known).tile(product(1000)).warps == 1
    assert Tuning(90, known).tile(product(1001)).warps == 2


@pytest.mark.parametrize(
    "change",
    [
        {"n": 512},
        {"dtype": "float32"},
        {"bias": "float16"},
        {"activation": "gelu"},
        {"residual": "float16"},
        {"w_shared": True},
        {"out_relu": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_operation_is_not_similar(change: dict[str, Any]) -> None:
    assert Tuning(90, file(product())).tile(product(**change)) == default_tile(product(**change), 90)


def test_other_types_of_bias_residual_and_result_are_similar_if_nothing_else_is() -> None:
    given, wider = product(bias="float16", residual="float16"), product(bias="float32", residual="float32", out_dtype="float32")
    assert Tuning(90, file(given)).tile(wider) == chosen(given)
    known = file(given, replace(wider, m=1000))
    known.tiles[describe(replace(wider, m=1000))].tile["warps"] = 2
    assert Tuning(90, known).tile(wider).warps == 2
    assert Tuning(90, file(product())).tile(product(residual="float32")) == default_tile(product(), 90)


def test_a_batch_of_images_is_similar() -> None:
    assert Tuning(90, file(convolution())).tile(convolution(batch=2)) == chosen(convolution())
    assert Tuning(90, file(convolution())).tile(convolution(height=30)) == chosen(convolution())


def test_matching_of_other_shapes_is_similar() -> None:
    timed = Matching((384, 512), (384, 512))
    assert Tuning(90, file(timed)).tile(timed) == chosen(timed)
    assert Tuning(90, file(timed)).tile(Matching((288, 512), (512, 384))) == chosen(timed)
    for other in (Matching((96, 128), (96, 128)), Matching((384, 512), (384, 512), 16)):
        assert Tuning(90, file(timed)).tile(other) == default_tile(other, 90)


def test_where_operands_lie_does_not_matter() -> None:
    there = replace(product(), a_row=512, a_offset=256, out_offset=64)
    assert describe(there) == describe(product())
    assert Tuning(90, file(product())).tile(there) == chosen(product())


def test_the_order_of_elements_matters_for_elementwise_work() -> None:
    along, across = (Elementwise("copy", (64, 32), (View("float16", strides),), View("float16", (32, 1))) for strides in ((32, 1), (1, 64)))
    assert describe(along) != describe(across)


def test_a_file_for_another_compute_capability_is_no_use() -> None:
    assert Tuning(86, file(product())).tile(product()) == default_tile(product(), 86)
    assert Tuning(86, file(product())).digest == Tuning(86).digest


def test_the_digest_changes_with_what_is_known() -> None:
    assert len({Tuning(90).digest, Tuning(90, file()).digest, Tuning(90, file(product())).digest}) == 3


def test_a_project_file_of_the_gpu_or_of_its_compute_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from smc.compiler import tune

    monkeypatch.setattr(tuning, "SHIPPED", tmp_path)
    assert shipped_tuning("h200", 90).tile(product()) == default_tile(product(), 90)
    tune.write(file(product()), tmp_path / "h200.json")
    h100 = file(product(), gpu="h100")
    h100.tiles[describe(product())].tile["warps"] = 2
    tune.write(h100, tmp_path / "h100.json")
    tune.write(file(product(), sm=86, gpu="a40"), tmp_path / "a40.json")
    assert shipped_tuning("h200", 90).tile(product()).warps == 1
    assert shipped_tuning("h100", 90).tile(product()).warps == 2
    assert shipped_tuning("gh200", 90).tile(product()).warps == 2, "another GPU's of the same compute capability"
    assert shipped_tuning("rtx4090", 89).tile(product()) == default_tile(product(), 89)


def test_what_the_project_knows_can_be_read() -> None:
    for path in tuning.SHIPPED.glob("*.json"):
        known = read_tuning(path)
        assert known.gpu == path.stem
        for operation, tuned in known.tiles.items():
            assert tuned.microseconds > 0
            tuning._made(operation.partition(" ")[0], tuned)


@pytest.mark.parametrize(
    "content", ["", "{}", "[]", '{"gpu": 1}', '{"gpu": "h200", "sm": 90, "when": "", "made_with": {}, "tiles": {"a": {}}}']
)
def test_a_file_that_cannot_be_read(content: str, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_text(content)
    with pytest.raises(BadInput, match="no tuning file that can be read"):
        read_tuning(path)
    with pytest.raises(BadInput, match="no tuning file that can be read"):
        read_tuning(tmp_path / "absent.json")


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("operation", [product(), convolution(), Matching((48, 64), (48, 64))], ids=lambda one: type(one).__name__)
def test_numbers_that_cut_nothing(operation: Any, number: int) -> None:
    whole = tile_fields(default_tile(operation, 90))
    for name, value in whole.items():
        if type(value) is int and value > 0:
            known = TuningFile("h200", 90, "2025-01-01", {}, {describe(operation): Tuned({**whole, name: number}, 1.0)})
            with pytest.raises(BadInput, match=f"no tile of {type(operation).__name__} in .*{name} is {number}"):
                Tuning(90, known)


def test_zero_stands_for_none_where_it_is_the_default() -> None:
    tile = replace(chosen(product()), programs=0)
    known = TuningFile("h200", 90, "2025-01-01", {}, {describe(product()): Tuned(tile_fields(tile), 1.0)})
    assert Tuning(90, known).tile(product()) == tile


@pytest.mark.parametrize("size", ["0", "9" * 100, "9" * 5000, "000"])
def test_an_operation_of_no_size(size: str) -> None:
    key = describe(product()).replace("m=768", f"m={size}")
    known = TuningFile("h200", 90, "2025-01-01", {}, {key: Tuned(tile_fields(chosen(product())), 1.0)})
    with pytest.raises(BadInput, match="the tuning file has an impossible operation, Gemm"):
        Tuning(90, known)


def test_what_is_empty_is_similar_to_nothing() -> None:
    full, empty = (Elementwise("copy", (rows, 32), (View("float16", (32, 1)),), View("float16", (32, 1))) for rows in (64, 0))
    assert Tuning(90, file(full)).tile(empty) == default_tile(empty, 90)


@pytest.mark.parametrize(
    "tile",
    [{}, {"block_m": "many"}, {"kind": "Tile"}, {"kind": "ConvTileOfTomorrow"}, {"kind": "launches"}, {"kind": "Address"}, {"kind": 7}],
)
def test_a_tile_that_is_none(tile: dict[str, Any]) -> None:
    known = TuningFile("h200", 90, "2025-01-01", {}, {describe(product()): Tuned(tile, 1.0)})
    with pytest.raises(BadInput, match="no tile of Gemm"):
        Tuning(90, known).tile(product())


def test_a_tile_survives_its_file(tmp_path: Path) -> None:
    from smc.compiler import tune

    tune.write(file(product(), convolution()), tmp_path / "tuning.json")
    assert json.loads((tmp_path / "tuning.json").read_text())["sm"] == 90
    read = Tuning(90, read_tuning(tmp_path / "tuning.json"))
    assert (read.tile(product()), read.tile(convolution())) == (chosen(product()), chosen(convolution()))
