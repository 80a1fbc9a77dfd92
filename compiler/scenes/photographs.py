"""The photographs that textures are cut from: which, where they come from, and how they are packed.

    python -m smc.compiler.scenes.photographs --out photographs [FOLDER ...]

finds them under the folders given (by default where Debian's `opencv-doc` has its examples, and scikit-image's `data`), and
writes them scaled down, one JPEG each, into `training/` and `held-out/`. Only what is named here is taken: none of them shows
what `graf1.png`, `graf3.png` or the leuven pair show, which are for evaluation.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from smc.compiler.output_files import writing
from smc.exported.errors import BadImage, InputMissing

if TYPE_CHECKING:  # packing needs no torch
    import torch
    from torch import Tensor

OPENCV = Path("/usr/share/doc/opencv-doc/examples")

TRAINING = (
    *("aero1.jpg", "baboon.jpg", "basketball1.png", "Blender_Suzanne1.jpg", "board.jpg", "butterfly.jpg", "cards.png"),
    *("chicky_512.png", "ela_original.jpg", "fruits.jpg", "home.jpg", "left.jpg", "left01.jpg", "smarties.png", "stuff.jpg"),
    *("sudoku.png", "squirrel_cls.jpg", "orange.jpg", "pic3.png", "plant.jpg", "stanford.png", "licenseplate_motion.jpg"),
    *("scenetext01.jpg", "scenetext02.jpg", "scenetext04.jpg", "scenetext05.jpg", "scenetext06.jpg"),
    *("scenetext_segmented_word02.jpg", "scenetext_segmented_word03.jpg", "scenetext_segmented_word05.jpg"),
    *("astronaut.png", "camera.png", "chelsea.png", "coins.png", "grass.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "retina.jpg"),
)
HELD_OUT = (
    *("aloeL.jpg", "building.jpg", "rubberwhale1.png", "starry_night.jpg", "scenetext03.jpg", "messi5.jpg", "apple.jpg"),
    *("scenetext_segmented_word01.jpg", "brick.png", "coffee.png", "gravel.png", "rocket.jpg"),
)
"""For evaluation alone."""

SETS = {"training": TRAINING, "held-out": HELD_OUT}

SIDE = 640
"""Photographs become squares of this side, in pixels; a texture's proportions do not matter."""


def default_folders() -> list[Path]:
    """The places above that exist here."""
    skimage = importlib.util.find_spec("skimage")
    folders = [OPENCV, *([Path(skimage.origin).parent / "data"] if skimage and skimage.origin else [])]
    return [folder for folder in folders if folder.is_dir()]


def find(folders: list[Path], names: tuple[str, ...]) -> list[Path]:
    """The named files under the folders, in the order of their names, the first of each name."""
    found: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.name in names:
                found.setdefault(path.name, path)
    return [found[name] for name in sorted(found)]


def pack(folders: list[Path], out: Path) -> dict[str, int]:
    """Write both sets under `out`; how many photographs each has.

    Raises:
        InputMissing: one of the sets has none.
        BadImage: one cannot be read.
        CannotWrite, DiskError: they cannot be written.
    """
    counts = {}
    for name, files in SETS.items():
        paths = find(folders, files)
        if not paths:
            raise InputMissing(
                f"none of the {name} photographs is in {', '.join(map(str, folders)) or 'any known place'}",
                fix="install Debian's opencv-doc or scikit-image, or give folders that hold their pictures",
            )
        with writing(out / name):
            (out / name).mkdir(parents=True, exist_ok=True)
        for path in paths:
            picture, packed_as = _open(path), (out / name / path.name).with_suffix(".jpg")
            with writing(packed_as):
                picture.save(packed_as, quality=93)
        counts[name] = len(paths)
    return counts


def packed(folder: Path) -> list[Path]:
    """The files of one set, by name. Raises InputMissing where there are none."""
    paths = sorted(folder.glob("*.jpg"))
    if not paths:
        held_out = folder / "held-out"
        raise InputMissing(
            f"{folder}: no photographs (*.jpg) in it",
            fix=f"name {held_out}" if held_out.is_dir() else "python -m smc.compiler.scenes.photographs --out DIR",
        )
    return paths


def load(folder: Path, device: torch.device) -> Tensor:
    """uint8 (count, 3, SIDE, SIDE): the pictures of one set, by name.

    Raises:
        InputMissing: there are none.
        BadImage: one cannot be read.
    """
    import torch

    pictures = np.stack([np.asarray(_open(path)) for path in packed(folder)])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous().to(device)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            opaque = Image.new("RGBA", image.size, "white")
            opaque.alpha_composite(image.convert("RGBA"))
            return opaque.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        raise BadImage(f"{path}: cannot be read as an image ({type(error).__name__}: {error})") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smc.compiler.scenes.photographs", description="Pack photographs for textures.")
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args()
    for name, count in pack(arguments.folders or default_folders(), arguments.out).items():
        print(f"{arguments.out / name}: {count} photographs of {len(SETS[name])}")


if __name__ == "__main__":
    from smc.compiler.programs import run

    run(main)
