"""What `match_files` reads and writes; tests/compiler/test_cli.py has the command."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from smc.compiler.match import MatchResult, match_files
from smc.exported.errors import UsageError


def match(image0: Path, image1: Path, bundle: Path, out: Path | None = None, viz: Path | None = None, **options: Any) -> MatchResult:
    return match_files(image0, image1, bundle, out=out, viz=viz, exif="apply", report=lambda description, fraction: None, **options)


@pytest.fixture
def pair(examples: Path) -> tuple[Path, Path]:
    return examples / "graf1.png", examples / "graf3.png"


def test_endings_may_be_in_capitals(tmp_path: Path, tiny_bundle: Path, pair: tuple[Path, Path]) -> None:
    out, viz = tmp_path / "X.NPZ", tmp_path / "X.PNG"
    result = match(*pair, tiny_bundle, out, viz)
    assert sorted(tmp_path.iterdir()) == [out, viz]
    with np.load(out) as arrays:
        np.testing.assert_array_equal(arrays["keypoints0"], result.matches.keypoints0)
    with Image.open(viz) as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize(("option", "name"), [("out", "x.npy"), ("viz", "x.gif")])
def test_other_endings_are_refused_before_anything_is_read(tmp_path: Path, option: str, name: str) -> None:
    absent = tmp_path / "absent"
    with pytest.raises(UsageError, match=f"--{option} .*{name}: a name that ends in"):
        match(absent, absent, absent, **{option: tmp_path / name})


def test_images_are_read_once_so_that_they_may_be_pipes(tmp_path: Path, tiny_bundle: Path, pair: tuple[Path, Path]) -> None:
    with Image.open(pair[0]) as image:
        small = image.resize((64, 48))
    data = io.BytesIO()
    small.save(data, "PNG")  # within what a pipe holds
    read, write = os.pipe()
    try:
        os.write(write, data.getvalue())
        os.close(write)
        match(Path(f"/dev/fd/{read}"), pair[1], tiny_bundle, viz=tmp_path / "x.png")
    finally:
        os.close(read)
    with Image.open(tmp_path / "x.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture)[-1, :64], np.full((64, 3), 255))  # below the small image it is white
        assert picture.height == 640
