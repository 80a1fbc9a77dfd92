"""The published lists of image pairs with poses, as LoFTR, SuperGlue and glue-factory have them. Images are the user's own copy."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.compiler.evaluation.arrays import read_arrays
from smc.compiler.evaluation.geometry import resize_matrix, turn
from smc.compiler.evaluation.pairs import OWN_SIZE, Floats, Image, ListedPair, PairSet, Scale, digest_of, unique
from smc.exported.errors import BadInput, InputMissing
from smc.exported.images import open_image

MEGADEPTH_SCALE = Scale("long", 1600)
"""glue-factory's."""

SCANNET_SCALE = Scale("long", 640)
"""SuperGlue's and LoFTR's."""

SCANNET_SIZE, LOFTR_SCANNET_SIZE = (1296, 968), (640, 480)
"""(width, height) of ScanNet's colour images, and of what LoFTR makes of them; their intrinsics are for these."""

COLMAP_CENTRE = np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
"""COLMAP's intrinsics, which glue-factory keeps, put the centre of the first pixel at (0.5, 0.5)."""

FRAME = re.compile(r"(?:.*/)?(scene\d{4}_\d{2})(?:/.*|_)frame-0*(\d+)(?:\.color)?\.jpg")
"""An image of ScanNet as SuperGlue's lists name it."""


@dataclass(frozen=True)
class _Line:
    """A pair as a list has it.

    Attributes:
        quarters: counter-clockwise turns that make either image upright, for the matcher to see it so.
        made_for: (width, height) of the images that the intrinsics are for; None for whatever size they have.
    """

    name: str
    images: tuple[Path, Path]
    intrinsics: tuple[Floats, Floats]
    pose: Floats
    quarters: tuple[int, int] = (0, 0)
    made_for: tuple[int, int] | None = None

    def load(self, name: str) -> ListedPair:
        pose = self.pose
        images: list[Image] = []
        intrinsics = []
        for i in (0, 1):
            image: Image = self.images[i]
            matrix = self.intrinsics[i]
            if self.made_for is not None or self.quarters[i]:
                image = np.asarray(open_image(self.images[i], "ignore"))
            if self.made_for is not None and isinstance(image, np.ndarray):
                matrix = _fitted(matrix, self.made_for, (image.shape[1], image.shape[0]))
            if self.quarters[i] and isinstance(image, np.ndarray):
                image, matrix, camera = turn(image, matrix, self.quarters[i])
                pose = camera @ pose if i else pose @ np.linalg.inv(camera)
            images.append(image)
            intrinsics.append(matrix)
        return ListedPair(name, images[0], images[1], intrinsics[0], intrinsics[1], pose)


def megadepth(path: Path, images: Path | None) -> PairSet:
    """LoFTR's `megadepth_test_1500_scene_info` (a folder of scenes' .npz files, or one of them), or glue-factory's `pairs_calibrated.txt`.

    Raises:
        InputMissing, BadInput: the list cannot be read, or is none.
    """
    if path.suffix == ".txt":
        return _set("megadepth", _text_lines(path, images or path.parent), MEGADEPTH_SCALE)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise InputMissing(f"{path}: no .npz files of scenes in it")
    root = images or files[0].parent
    lines = []
    for file in files:
        scene = read_arrays(file)
        try:
            for (index0, index1), *_ in scene["pair_infos"]:
                names = [str(scene["image_paths"][i]) for i in (index0, index1)]
                intrinsics = [_matrix(scene["intrinsics"][i], 3) - COLMAP_CENTRE for i in (index0, index1)]
                pose0, pose1 = (_matrix(scene["poses"][i], 4) for i in (index0, index1))
                lines.append(_line(names, root, intrinsics, pose1 @ np.linalg.inv(pose0)))
        except (KeyError, IndexError, TypeError, ValueError, np.linalg.LinAlgError) as error:
            raise BadInput(
                f"{file}: not a scene of LoFTR's list ({type(error).__name__}: {error}); "
                "image_paths, intrinsics, poses and pair_infos were expected"
            ) from error
    return _set("megadepth", lines, MEGADEPTH_SCALE)


def scannet(path: Path, images: Path | None) -> PairSet:
    """LoFTR's `scannet_test_1500` (a folder with `test.npz` and `intrinsics.npz`), or SuperGlue's `scannet_test_pairs_with_gt.txt`.

    Raises:
        InputMissing, BadInput: the list cannot be read, or is none.
    """
    if path.suffix == ".txt":
        lines = [replace(line, made_for=SCANNET_SIZE) for line in _text_lines(path, images or path.parent)]
        return _set("scannet", lines, SCANNET_SCALE)
    root = images or path
    pairs, intrinsics = read_arrays(path / "test.npz"), read_arrays(path / "intrinsics.npz")
    lines = []
    try:
        poses = pairs.get("rel_pose")
        for i, (scene_number, part, frame0, frame1) in enumerate(pairs["name"]):
            scene = f"scene{scene_number:04d}_{part:02d}"
            names = [f"{scene}/color/{frame}.jpg" for frame in (frame0, frame1)]
            if poses is not None:
                pose = np.vstack([np.asarray(poses[i], np.float64).reshape(-1)[:12].reshape(3, 4), [0, 0, 0, 1]])
            else:
                to_world0, to_world1 = (_read_pose(root / scene / "pose" / f"{frame}.txt") for frame in (frame0, frame1))
                pose = np.linalg.inv(to_world1) @ to_world0
            matrix = _matrix(intrinsics[scene], 3)
            lines.append(_line(names, root, (matrix, matrix), pose, made_for=LOFTR_SCANNET_SIZE))
    except (KeyError, IndexError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise BadInput(f"{path}: not LoFTR's list of ScanNet ({type(error).__name__}: {error})") from error
    return _set("scannet", lines, SCANNET_SCALE)


def pose_list(path: Path, images: Path | None) -> PairSet:
    """A text list, a pair a line: SuperGlue's form, or glue-factory's `pairs_calibrated.txt`.

    SuperGlue: name0 name1 turns0 turns1 K0 (9) K1 (9) T_0to1 (16). glue-factory: name0 name1 K0 (9) K1 (9) R (9) t (3), or T_0to1 (16)
    at its end; its intrinsics are COLMAP's.

    Raises:
        InputMissing, BadInput: the list cannot be read, or is none.
    """
    return _set("pairs", _text_lines(path, images or path.parent), OWN_SIZE)


def _text_lines(path: Path, root: Path) -> list[_Line]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        kind = InputMissing if isinstance(error, OSError) else BadInput
        raise kind(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    parsers: dict[int, Callable[[Sequence[str], Floats, Path], _Line]] = {38: _superglue_line, 36: _gluefactory_line, 32: _gluefactory_line}
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        parts = line.split()
        if not parts:
            continue
        if len(parts) not in parsers:
            fix = "only lists with intrinsics and poses can be evaluated" if len(parts) in (2, 4) else ""
            raise BadInput(f"{path}, line {number}: {len(parts)} values, 38 (SuperGlue), 36 or 32 (glue-factory) were expected", fix=fix)
        try:
            lines.append(parsers[len(parts)](parts[:2], np.array(parts[2:], np.float64), root))
        except ValueError as error:
            raise BadInput(f"{path}, line {number}: {error}") from error
    if not lines:
        raise BadInput(f"{path}: no pairs in it")
    return lines


def _superglue_line(names: Sequence[str], values: Floats, root: Path) -> _Line:
    turns = values[:2]
    if not np.isin(turns, (0, 1, 2, 3)).all():
        raise ValueError(f"turns {turns[0]:g} and {turns[1]:g}, 0 to 3 were expected")
    intrinsics = _matrix(values[2:11], 3), _matrix(values[11:20], 3)
    return _line(names, root, intrinsics, _matrix(values[20:], 4), quarters=(int(turns[0]), int(turns[1])))


def _gluefactory_line(names: Sequence[str], values: Floats, root: Path) -> _Line:
    pose = values[18:]
    if len(pose) == 12:
        pose = np.vstack([np.column_stack([pose[:9].reshape(3, 3), pose[9:]]), [0, 0, 0, 1]])
    intrinsics = [_matrix(matrix, 3) - COLMAP_CENTRE for matrix in (values[:9], values[9:18])]
    return _line(names, root, intrinsics, _matrix(pose, 4))


def _line(names: Sequence[str], root: Path, intrinsics: Sequence[Floats], pose: Floats, **rest: Any) -> _Line:
    """A pair after checks. Raises ValueError."""
    rotation = pose[:3, :3]
    # Published lists have five digits.
    if np.abs(rotation @ rotation.T - np.eye(3)).max() > 0.01 or np.linalg.det(rotation) < 0:
        raise ValueError(f"the pose of {names[0]} and {names[1]} has no rotation in it")
    for name, matrix in zip(names, intrinsics, strict=True):
        if not (matrix[0, 0] > 0 and matrix[1, 1] > 0 and np.allclose(matrix[2], [0, 0, 1])):
            raise ValueError(f"the intrinsics of {name} are none of a camera")
    found = _found(root, names[0]), _found(root, names[1])
    return _Line(f"{names[0]} {names[1]}", found, (intrinsics[0], intrinsics[1]), pose, **rest)


def _found(root: Path, name: str) -> Path:
    """Where an image is: as the list names it, or, for ScanNet, as `scene/color/frame.jpg`, which is how most copies have it."""
    path = root / name
    frame = FRAME.fullmatch(name)
    if frame is not None and not path.exists():
        usual = root / frame[1] / "color" / f"{frame[2]}.jpg"
        return usual if usual.exists() else path
    return path


def _fitted(intrinsics: Floats, made_for: tuple[int, int], size: tuple[int, int]) -> Floats:
    """Intrinsics for an image of another size than they were made for; the two axes may be scaled apart."""
    x, y = (resize_matrix(new / old) for new, old in zip(size, made_for, strict=True))
    return np.vstack([x[0], y[1], x[2]]) @ intrinsics


def _matrix(values: NDArray[Any], size: int) -> Floats:
    """Raises ValueError for values of another number, or that are not finite."""
    matrix = np.asarray(values, np.float64).reshape(size, size)
    if not np.isfinite(matrix).all():
        raise ValueError("a matrix holds values that are not finite")
    return matrix


def _read_pose(path: Path) -> Floats:
    try:
        return _matrix(np.array(path.read_text().split(), np.float64), 4)
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}", fix="it is needed where the list has no rel_pose") from error


def _set(kind: str, lines: list[_Line], scale: Scale) -> PairSet:
    names = unique(line.name for line in lines)
    return PairSet(
        kind=kind,
        task="pose",
        names=names,
        load=lambda index: lines[index].load(names[index]),
        files=[image for line in lines for image in line.images],
        digest=digest_of((line.name, (*line.intrinsics, line.pose)) for line in lines),
        scale=scale,
    )
