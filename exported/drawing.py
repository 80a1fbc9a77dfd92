"""A picture of matches."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

from PIL import Image, ImageDraw

from smc.exported.matcher import Matches

Color = tuple[int, int, int]
"""RGB, 0 to 255."""

GAP = 8
"""Pixels between the two images."""


def draw_matches(
    image0: Image.Image, image1: Image.Image, matches: Matches, limit: int = 150, colors: Sequence[Color] | None = None
) -> Image.Image:
    """The two images side by side, with a line for each match.

    Args:
        image0, image1: the images, RGB, in the frame of the matches.
        matches: what to draw.
        limit: how many matches to draw; those of highest confidence.
        colors: RGB of each match; None for hues that run with the position in the first image.
    """
    height = max(image0.height, image1.height)
    picture = Image.new("RGB", (image0.width + GAP + image1.width, height), "white")
    picture.paste(image0, (0, 0))
    picture.paste(image1, (image0.width + GAP, 0))
    draw = ImageDraw.Draw(picture)
    scale = max(1, round(height / 600))
    chosen = matches.confidence.argsort()[::-1][:limit]
    for x0, y0, x1, y1, i in sorted((*matches.keypoints0[i].tolist(), *matches.keypoints1[i].tolist(), i) for i in chosen.tolist()):
        color = _hue(0.8 * (x0 + 0.5) / image0.width) if colors is None else colors[i]
        x1 += image0.width + GAP
        draw.line((x0, y0, x1, y1), fill=color, width=scale)
        for x, y in ((x0, y0), (x1, y1)):
            draw.ellipse((x - 2 * scale, y - 2 * scale, x + 2 * scale, y + 2 * scale), outline=color, width=scale)
    return picture


def _hue(hue: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.9, 1.0)
    return int(255 * red), int(255 * green), int(255 * blue)
