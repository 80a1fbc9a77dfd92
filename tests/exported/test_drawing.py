"""The picture of matches."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from smc.exported.drawing import GAP, draw_matches
from smc.exported.matcher import Matches

GREY = (90, 90, 90)


def grey_images(size0: tuple[int, int], size1: tuple[int, int]) -> tuple[Image.Image, Image.Image]:
    return Image.new("RGB", size0, GREY), Image.new("RGB", size1, GREY)


def matches_of(rows: list[tuple[float, float, float, float]], confidence: list[float] | None = None) -> Matches:
    """Matches of rows x0, y0, x1, y1."""
    keypoints = np.array(rows, np.float32).reshape(-1, 4)
    given = np.array(confidence if confidence is not None else [1.0] * len(rows), np.float32)
    return Matches(keypoints[:, :2], keypoints[:, 2:], given, (100, 80), (100, 80), "apply")


def drawn(picture: Image.Image, bare: Image.Image) -> NDArray[np.bool_]:
    """(H, W): where a picture differs from one without matches."""
    return np.asarray((np.asarray(picture) != np.asarray(bare)).any(axis=2))


@pytest.mark.parametrize(("size0", "size1"), [((100, 80), (100, 80)), ((100, 80), (60, 120)), ((1, 1), (3, 2)), ((40, 1300), (50, 10))])
def test_images_lie_side_by_side(size0: tuple[int, int], size1: tuple[int, int]) -> None:
    picture = draw_matches(*grey_images(size0, size1), matches_of([]))
    pixels = np.asarray(picture)
    assert picture.mode == "RGB"
    assert pixels.shape == (max(size0[1], size1[1]), size0[0] + GAP + size1[0], 3)
    grey = (pixels == GREY).all(axis=2)
    assert grey[: size0[1], : size0[0]].all()
    assert grey[: size1[1], size0[0] + GAP :].all()
    assert grey.sum() == size0[0] * size0[1] + size1[0] * size1[1]
    assert (pixels[~grey] == 255).all()


def test_a_line_runs_from_point_to_point() -> None:
    images = grey_images((100, 80), (100, 80))
    where = drawn(draw_matches(*images, matches_of([(20, 10, 70, 60)])), draw_matches(*images, matches_of([])))
    for fraction in np.linspace(0, 1, 11):
        x, y = 20 + fraction * (70 + 100 + GAP - 20), 10 + fraction * 50
        assert where[round(y) - 1 : round(y) + 2, round(x) - 1 : round(x) + 2].any(), (x, y)
    rows, cols = np.nonzero(where)
    assert (rows.min(), rows.max(), cols.min(), cols.max()) == (10 - 2, 60 + 2, 20 - 2, 70 + 100 + GAP + 2)


def test_only_the_most_confident_are_drawn() -> None:
    images = grey_images((100, 80), (100, 80))
    rows = [(5.0, float(y), 5.0, float(y)) for y in (10, 30, 50, 70)]
    bare = draw_matches(*images, matches_of([]))
    confidence = [2.0, 9.0, 1.0, 5.0]
    for limit, wanted in ((0, set()), (1, {30}), (2, {30, 70}), (4, {10, 30, 50, 70}), (150, {10, 30, 50, 70})):
        where = drawn(draw_matches(*images, matches_of(rows, confidence), limit), bare)
        assert {y for y in (10, 30, 50, 70) if where[y].any()} == wanted


def test_the_hue_runs_with_the_position_in_the_first_image() -> None:
    images = grey_images((100, 80), (100, 80))
    picture = draw_matches(*images, matches_of([(x, y, x, y) for x, y in ((2.0, 10.0), (50.0, 40.0), (97.0, 70.0))]))
    hues = []
    for x, y in ((2, 10), (50, 40), (97, 70)):
        red, green, blue = picture.getpixel((x + 10, y))  # type: ignore[misc]
        hues.append(colorsys.rgb_to_hsv(red / 255, green / 255, blue / 255)[0])
    assert hues == pytest.approx([0.02, 0.404, 0.78], abs=0.01)


def test_colours_may_be_given_match_by_match() -> None:
    images = grey_images((100, 80), (100, 80))
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    rows = [(90.0, 70.0, 90.0, 70.0), (50.0, 40.0, 50.0, 40.0), (10.0, 10.0, 10.0, 10.0)]
    picture = draw_matches(*images, matches_of(rows, [1.0, 3.0, 2.0]), colors=colors)
    assert [picture.getpixel((100, round(y))) for _, y, _, _ in rows] == colors


@pytest.mark.parametrize("corner", [(-0.49, -0.49), (99.49, -0.49), (-0.49, 79.49), (99.49, 79.49)])
def test_points_at_the_edges(corner: tuple[float, float]) -> None:
    images = grey_images((100, 80), (100, 80))
    assert drawn(draw_matches(*images, matches_of([(*corner, *corner)])), draw_matches(*images, matches_of([]))).any()


def test_lines_are_thicker_on_large_images() -> None:
    def thickness(size: tuple[int, int]) -> int:
        images = grey_images(size, size)
        middle = size[1] // 2
        picture = draw_matches(*images, matches_of([(10.0, middle, 10.0, middle)]))
        return int(drawn(picture, draw_matches(*images, matches_of([])))[:, size[0]].sum())

    assert thickness((100, 80)) == 1
    assert thickness((100, 1800)) == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1"])
def test_images_of_other_modes(mode: str) -> None:
    image: Any = Image.new("RGB", (100, 80), "white").convert(mode)
    assert (np.asarray(draw_matches(image, image, matches_of([]))) == 255).all()


def test_the_images_are_left_as_they_are() -> None:
    images = grey_images((100, 80), (100, 80))
    draw_matches(*images, matches_of([(20, 10, 70, 60)]))
    for image in images:
        assert (np.asarray(image) == GREY).all()
