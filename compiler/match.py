"""`smc match`: two files in, matches and a picture out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smc.compiler.output_files import replacing
from smc.compiler.plane_check import PlaneCheck, check_plane, draw_check, read_truth
from smc.exported.drawing import draw_matches
from smc.exported.errors import CannotWrite, UsageError
from smc.exported.images import ExifChoice, open_image
from smc.exported.manifest import Manifest
from smc.exported.matcher import Matches, load


@dataclass(frozen=True)
class MatchResult:
    """`seconds`: wall time by stage. `plane`: the check against a homography, where one was given."""

    matches: Matches
    manifest: Manifest
    seconds: dict[str, float]
    plane: PlaneCheck | None = None

    def summary(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "matches": len(self.matches),
            "image_size0": self.matches.image_size0,
            "image_size1": self.matches.image_size1,
            "exif": self.matches.exif,
            "random_weights": self.manifest.random_weights,
            "seconds": self.seconds,
            **({} if self.plane is None else {"homography": self.plane.summary()}),
        }


def match_files(
    image0: Path,
    image1: Path,
    bundle: Path,
    *,
    out: Path | None,
    viz: Path | None,
    homography: Path | None = None,
    exif: ExifChoice,
    report: Callable[[str, float], None],
    **options: Any,
) -> MatchResult:
    """Load a bundle, match two files, write what was asked for.

    Args:
        image0, image1: the images.
        bundle: the bundle's directory.
        out: a `.npz` file for `Matches.arrays()`, or None.
        viz: a picture for the matches, or None.
        homography: the true homography of a flat scene, to check the matches with, or None; for the pixels that `exif` names.
        exif: see `Matcher.match`.
        report: told what is being done.
        options: keyword arguments of `Matcher.match_features`.

    Raises:
        UsageError: an output's name has an ending that cannot be written.
        CannotWrite: an output cannot be written.
        DiskError: the disk is full.
        NoTarget: a homography was given, and poselib is not installed.
        And what `load` and `Matcher.match` raise.
    """
    if out is not None and out.suffix != ".npz":
        raise UsageError(f"--out {out}: matches are written as .npz")
    if viz is not None and viz.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
        raise UsageError(f"--viz {viz}: pictures are written as .png, .jpg or .webp")
    for path in (out, viz):
        if path is not None and not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
            raise CannotWrite(f"{path}: its folder is missing or read-only")
        if path is not None and os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
            raise CannotWrite(f"{path} is a directory")

    truth = None if homography is None else read_truth(homography)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str, description: str) -> Iterator[None]:
        report(description, len(seconds) / 4)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    with stage("load", "loading the bundle"):
        matcher = load(bundle)
    with stage("encode 0", f"encoding {image0.name}"):
        features0 = matcher.encode(image0, exif=exif)
    with stage("encode 1", f"encoding {image1.name}"):
        features1 = matcher.encode(image1, exif=exif)
    with stage("decode and match", "decoding and matching"):
        matches = matcher.match_features(features0, features1, **options)

    plane = None if truth is None else check_plane(matches, truth)
    if out is not None:
        with replacing(out) as temporary:
            np.savez(temporary, **matches.arrays())  # type: ignore[arg-type]  # numpy's stub reads every name as `allow_pickle`
    if viz is not None:
        with replacing(viz) as temporary:
            images = open_image(image0, exif), open_image(image1, exif)
            picture = draw_matches(*images, matches) if plane is None else draw_check(*images, matches, plane)
            _save_picture(picture, temporary)
    return MatchResult(matches, matcher.manifest, seconds, plane)


def _save_picture(picture: Image.Image, path: Path) -> None:
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # The encoder's own complaint: JPEG ends at 65,500 pixels a side, WebP at 16,383.
        size = f"{picture.width}x{picture.height}"
        raise CannotWrite(f"a picture of {size} does not go into {path.suffix}: {error}", fix="take .png") from error
