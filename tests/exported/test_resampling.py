"""Pillow's resize, done with these weights, is Pillow's own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smc.exported import resampling as resampling_module
from smc.exported.resampling import Filter, is_down_first, resampling
from smc.plugins.resize import reference


def pixels(seed: int, height: int, width: int) -> np.ndarray:
    """Noise, half of it as strong as can be, so that filters overshoot both ends."""
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.where(random.random((height, width, 1)) < 0.5, (values > 127) * np.uint8(255), values)


def resized(source: np.ndarray, size: tuple[int, int], crop: tuple[int, int, int, int], kind: Filter) -> np.ndarray:
    """As an engine does it: only what the crop needs."""
    left, top, right, bottom = crop
    columns, rows = resampling(source.shape[1], size[0], left, right, kind), resampling(source.shape[0], size[1], top, bottom, kind)
    begin, end = rows.source
    if is_down_first(source.shape[1::-1], size):
        return reference.across(reference.down(source[begin:end], rows.first - begin, rows.weights), columns.first, columns.weights)
    between = reference.across(source[begin:end], columns.first, columns.weights)
    return reference.down(between, rows.first - begin, rows.weights)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.05, 4), st.floats(0.9, 1.1), st.data())
def test_it_is_pillows(width: int, height: int, scale: float, stretch: float, data: st.DataObject) -> None:
    size = max(2, round(width * scale)), max(2, round(height * scale * stretch))
    left, right = sorted(data.draw(st.lists(st.integers(0, size[0]), min_size=2, max_size=2, unique=True)))
    top, bottom = sorted(data.draw(st.lists(st.integers(0, size[1]), min_size=2, max_size=2, unique=True)))
    kind: Filter = data.draw(st.sampled_from(("lanczos", "bicubic")))
    source = pixels(width * height, height, width)
    wanted = Image.fromarray(source).resize(size, Image.Resampling[kind.upper()]).crop((left, top, right, bottom))
    np.testing.assert_array_equal(resized(source, size, (left, top, right, bottom), kind), np.asarray(wanted))


@pytest.mark.parametrize(
    ("size", "to"),
    [
        ((640, 480), (512, 384)),
        ((4000, 3000), (512, 384)),
        ((1920, 1080), (512, 288)),
        ((333, 500), (341, 512)),
        ((7, 5), (512, 366)),
        ((1179, 2556), (236, 512)),
    ],
)
def test_sizes_that_are_common(size: tuple[int, int], to: tuple[int, int]) -> None:
    source = pixels(1, size[1], size[0])
    kind: Filter = "lanczos" if size > to else "bicubic"
    wanted = np.asarray(Image.fromarray(source).resize(to, Image.Resampling[kind.upper()]))
    np.testing.assert_array_equal(resized(source, to, (0, 0, *to), kind), wanted)


@pytest.mark.parametrize("version", [12, 13])
def test_tall_images_are_resized_down_first_from_pillow_13_on(monkeypatch: pytest.MonkeyPatch, version: int) -> None:
    monkeypatch.setattr(resampling_module, "_PILLOW", version)
    assert is_down_first((1179, 2556), (236, 512)) == (version == 13)
    for size, to in (((3000, 4000), (384, 512)), ((4000, 3000), (512, 384)), ((1000, 1990), (257, 512)), ((100, 200), (120, 240))):
        assert not is_down_first(size, to)


def test_only_what_a_crop_needs_is_read() -> None:
    whole, part = resampling(3000, 384, 0, 384, "lanczos"), resampling(3000, 384, 100, 200, "lanczos")
    assert whole.source == (0, 3000)
    begin, end = part.source
    assert 100 * 3000 / 384 - 30 < begin < 100 * 3000 / 384 < 200 * 3000 / 384 < end < 200 * 3000 / 384 + 30


def test_weights_are_made_once_and_kept_as_they_are() -> None:
    made = resampling(640, 512, 0, 512, "lanczos")
    assert resampling(640, 512, 0, 512, "lanczos") is made
    with pytest.raises(ValueError, match="read-only"):
        made.weights[0, 0] = 1
    np.testing.assert_allclose(made.weights.sum(axis=0), 1 << 22, atol=len(made.weights))
