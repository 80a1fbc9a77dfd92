"""Matches of a flat scene against its true homography: `smc match --homography`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from smc.compiler.evaluation import estimate
from smc.compiler.evaluation.geometry import corner_error, transfer_error, transform
from smc.compiler.evaluation.homographies import read_homography
from smc.compiler.evaluation.pairs import Floats
from smc.exported.drawing import draw_matches
from smc.exported.matcher import Matches

INLIER_PIXELS = 3.0
"""Largest distance of an inlier, as `smc eval` has it, and of a match that is drawn as right."""

PRECISION_PIXELS = (1, 3, 5)

RIGHT, WRONG = (60, 220, 60), (235, 50, 50)
TRUE_OUTLINE, FOUND_OUTLINE = "white", "magenta"


@dataclass(frozen=True, eq=False)
class PlaneCheck:
    """How matches compare with the truth.

    Attributes:
        truth: (3, 3), from the first image to the second.
        found: (3, 3), estimated from the matches; None where there are too few.
        inliers: matches that agree with it.
        errors: (K,) distances of the matches to the truth in pixels, the mean of both images'.
        corner_error: the mean distance, in pixels of the second image, of where both send the first image's corners.
    """

    truth: Floats
    found: Floats | None
    inliers: int
    errors: Floats
    corner_error: float | None

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        precision = {f"{pixels} px": float((self.errors < pixels).mean()) if len(self.errors) else 0.0 for pixels in PRECISION_PIXELS}
        return {"corner_error": self.corner_error, "inliers": self.inliers, "precision": precision}


def read_truth(path: Path) -> Floats:
    """The homography of a file.

    Raises:
        NoTarget: poselib is not installed.
        InputMissing, BadInput: the file cannot be read, or holds no homography.
    """
    estimate.version()
    return read_homography(path)


def check_plane(matches: Matches, truth: Floats) -> PlaneCheck:
    """Estimate a homography from matches, and compare both with the truth (3, 3)."""
    xy0, xy1 = (xy.astype(np.float64) for xy in (matches.keypoints0, matches.keypoints1))
    estimated = estimate.homography(xy0, xy1, INLIER_PIXELS, seed=0)
    found, inliers = estimated if estimated is not None else (None, 0)
    error = corner_error(found, truth, *matches.image_size0) if found is not None else np.inf
    return PlaneCheck(truth, found, inliers, transfer_error(xy0, xy1, truth), error if np.isfinite(error) else None)


def draw_check(image0: Image.Image, image1: Image.Image, matches: Matches, check: PlaneCheck) -> Image.Image:
    """The picture of `draw_matches`, right matches green and wrong ones red, and in the second image the first one's outline, where it
    is in truth (white) and where the estimate puts it (magenta); see `outline` for when there is none."""
    colors = [RIGHT if error < INLIER_PIXELS else WRONG for error in check.errors.tolist()]
    outlined = image1.convert("RGB")
    draw = ImageDraw.Draw(outlined)
    line = max(2, round(max(image1.size) / 250))
    for homography, color, thickness in ((check.truth, TRUE_OUTLINE, 3 * line), (check.found, FOUND_OUTLINE, line)):
        corners = None if homography is None else outline(homography, *image0.size)
        if corners is not None:
            draw.line([tuple(corner) for corner in corners.tolist()], fill=color, width=thickness)
    return draw_matches(image0, outlined, matches, colors=colors)


def outline(homography: Floats, width: int, height: int) -> Floats | None:
    """Where a homography puts the border of an image: its corners (5, 2), the first one again at the end.

    None where the line that it sends to infinity meets the image: then the border is no quadrilateral.
    """
    border = np.array([[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1], [0, 0]], np.float64)
    w = border @ homography[2, :2] + homography[2, 2]
    return transform(homography, border) if (w > 0).all() or (w < 0).all() else None
