"""The reference data in `data/conformance`, whose README says how its inputs are remade."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DATA = Path(__file__).parent / "data" / "conformance"


def make_image(seed: int, height: int, width: int) -> NDArray[np.float32]:
    """The input image of a seed: float32 (1, 3, H, W) in [-1, 1]."""
    random = np.random.RandomState(seed)
    cells = random.standard_normal((3, height // 16 + 2, width // 16 + 2))
    rows, cols = np.linspace(0, height // 16 + 0.999, height), np.linspace(0, width // 16 + 0.999, width)
    i, j = rows.astype(int), cols.astype(int)
    down, right = (rows - i)[:, None], (cols - j)[None, :]

    def corner(di: int, dj: int) -> NDArray[np.float64]:
        return cells[:, i + di][:, :, j + dj]

    smooth = (corner(0, 0) * (1 - right) + corner(0, 1) * right) * (1 - down) + (corner(1, 0) * (1 - right) + corner(1, 1) * right) * down
    image = smooth + 0.1 * random.standard_normal((3, height, width))
    return np.clip(image, -1, 1).astype(np.float32)[None]


def case_images(arrays: dict[str, NDArray]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Both input images of a model case."""
    first, second = (make_image(int(arrays[f"image{view}_seed"]), *map(int, arrays[f"shape{view}"])) for view in (1, 2))
    return first, second


def load_case(name: str) -> dict[str, NDArray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def state_dict_shapes(name: str) -> dict[str, list[int]]:
    """Every name and shape of the case's checkpoint, as the original writes it."""
    return json.loads((DATA / f"{name}.state_dict.json").read_text())


def relative_error(found: NDArray, wanted: NDArray) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
