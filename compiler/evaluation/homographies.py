"""Image pairs with homographies: HPatches, and folders of images with a file of the homography."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from smc.compiler.evaluation.pairs import OWN_SIZE, Floats, HomographyPair, PairSet, Scale, digest_of
from smc.exported.errors import BadInput, InputMissing

HPATCHES_SCALE = Scale("short", 480)
"""glue-factory's."""

LEFT_OUT = {
    "i_contruction", "i_crownnight", "i_dc", "i_pencils", "i_whitebuilding", "v_artisans", "v_astronautis", "v_talent",
}  # fmt: skip
"""Sequences of HPatches that D2-Net and everyone after it leave out, as their images are large: 108 remain of 116."""

IMAGES = {".png", ".jpg", ".jpeg", ".ppm", ".webp", ".tif", ".tiff", ".bmp"}

WORST_CONDITION = 1e14
"""The condition number from which a matrix counts as singular. It has no scale, as a homography has none; a determinant has. In pixels of
images of 20,000 it is up to 1e11; of a matrix that is singular but for float64's rounding, 1e16."""

HOMOGRAPHY_FILE = re.compile(r"H(?P<first>[A-Za-z0-9]+)to(?P<second>[A-Za-z0-9]+?)p?\.(xml|txt)")


def hpatches(path: Path, images: Path | None) -> PairSet:
    """HPatches' sequences, folders named i_* and v_*: 1.ppm with 2.ppm to 6.ppm, and H_1_2 to H_1_6.

    Raises:
        InputMissing, BadInput: a file is absent or cannot be read.
    """
    _no_images(images)
    sequences = sorted(folder for folder in path.glob("[iv]_*") if folder.is_dir() and folder.name not in LEFT_OUT)
    if not sequences:
        raise InputMissing(f"{path}: no folders i_* and v_* of HPatches in it")
    pairs = [
        HomographyPair(f"{folder.name} 1-{i}", folder / "1.ppm", folder / f"{i}.ppm", read_homography(folder / f"H_1_{i}"))
        for folder in sequences
        for i in range(2, 7)
    ]
    return _set("hpatches", pairs, HPATCHES_SCALE)


def homography_folder(path: Path, images: Path | None) -> PairSet:
    """A folder with files such as `H1to3p.xml`, each the homography between two images whose names end in 1 and 3.

    Raises:
        InputMissing, BadInput: a file is absent or cannot be read, or it is not clear which images a homography is of.
    """
    _no_images(images)
    if not path.is_dir():
        raise InputMissing(f"{path}: no such folder")
    pictures = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
    pairs = []
    for file in sorted(path.iterdir()):
        named = HOMOGRAPHY_FILE.fullmatch(file.name)
        if named is None:
            continue
        firsts, seconds = (
            {image.stem.removesuffix(end): image for image in pictures if image.stem.endswith(end)}
            for end in (named["first"], named["second"])
        )
        common = sorted(firsts.keys() & seconds.keys())
        if len(common) != 1:
            raise BadInput(
                f"{file}: {len(common)} pairs of images there have names that end in {named['first']} and {named['second']}",
                fix="keep one such pair of images with every file of a homography",
            )
        image0, image1 = firsts[common[0]], seconds[common[0]]
        pairs.append(HomographyPair(f"{image0.name} {image1.name}", image0, image1, read_homography(file)))
    if not pairs:
        raise InputMissing(f"{path}: no files of homographies in it, such as H1to3p.xml")
    return _set("homography", pairs, OWN_SIZE)


def read_homography(path: Path) -> Floats:
    """A homography (3, 3), written as nine numbers or as OpenCV's FileStorage writes a matrix in XML.

    Raises:
        InputMissing: the file cannot be read.
        BadInput: it holds no finite, invertible matrix (3, 3).
    """
    try:
        text = path.read_text()
        if path.suffix == ".xml":
            matrix = ElementTree.fromstring(text).find("./*[rows]")
            if matrix is None or (matrix.findtext("rows"), matrix.findtext("cols")) != ("3", "3"):
                raise ValueError("no matrix of 3 rows and 3 columns in it")
            text = matrix.findtext("data", "")
        numbers = np.array(text.split(), np.float64)
        if len(numbers) != 9:
            raise ValueError(f"nine numbers were expected, found {len(numbers)}")
        if not np.isfinite(numbers).all():
            raise ValueError("one of its numbers is not finite")
        found = numbers.reshape(3, 3)
        if not np.linalg.cond(found) < WORST_CONDITION:
            raise ValueError("the matrix has no inverse")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except (ValueError, ElementTree.ParseError) as error:
        raise BadInput(
            f"{path}: not a homography ({error})",
            fix="write the nine numbers of an invertible matrix, row by row, or save it with OpenCV's FileStorage as .xml",
        ) from error
    return found


def _no_images(images: Path | None) -> None:
    if images is not None:
        raise BadInput(f"{images}: homographies lie beside their images", fix="give the folder alone")


def _set(kind: str, pairs: list[HomographyPair], scale: Scale) -> PairSet:
    return PairSet(
        kind=kind,
        task="homography",
        names=[pair.name for pair in pairs],
        load=pairs.__getitem__,
        files=[image for pair in pairs for image in (pair.image0, pair.image1) if isinstance(image, Path)],
        digest=digest_of((pair.name, [pair.homography]) for pair in pairs),
        scale=scale,
    )
