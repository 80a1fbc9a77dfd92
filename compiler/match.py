"""`smc match`: two files in, matches and a picture out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from smc.compiler.output_files import check_output, replacing
from smc.compiler.plane_check import PlaneCheck, check_plane, draw_check, read_truth
from smc.exported.drawing import draw_matches
from smc.exported.errors import CannotWrite
from smc.exported.images import ExifChoice, open_image
from smc.exported.manifest import Manifest
from smc.exported.matcher import Features, Matches, load

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")


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
    check_output(out, "--out", (".npz",))
    check_output(viz, "--viz", PICTURE_ENDINGS)

    truth = None if homography is None else read_truth(homography)
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str, description: str) -> Iterator[None]:
        report(description, len(seconds) / 4)
        start = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - start

    def encode(path: Path) -> tuple[Image.Image, Features]:
        image = open_image(path, exif)
        # As an array, for the image still has the EXIF data by which it has been turned already.
        return image, matcher.encode(np.asarray(image), exif=exif)

    with stage("load", "loading the bundle"):
        matcher = load(bundle)
    with stage("encode 0", f"encoding {image0.name}"):
        pixels0, features0 = encode(image0)
    with stage("encode 1", f"encoding {image1.name}"):
        pixels1, features1 = encode(image1)
    with stage("decode and match", "decoding and matching"):
        matches = matcher.match_features(features0, features1, **options)

    plane = None if truth is None else check_plane(matches, truth)
    if out is not None:
        with replacing(out) as temporary, temporary.open("wb") as file:  # NumPy would add .npz to a name that ends in .NPZ
            np.savez(file, **matches.arrays())  # type: ignore[arg-type]  # numpy's stub reads every name as `allow_pickle`
    if viz is not None:
        with replacing(viz) as temporary:
            picture = draw_matches(pixels0, pixels1, matches) if plane is None else draw_check(pixels0, pixels1, matches, plane)
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
