"""Pairs with exact correspondence, kept in files: held-out scenes that are to be evaluated on more than once.

    python -m smc.compiler.evaluation.rendered --pairs 500 --photographs DIR/held-out --device cuda --out FOLDER

renders them, and continues where it was interrupted; `--data rendered:FOLDER` evaluates on them. A file is a .npz of `image0`,
`image1` uint8 (H, W, 3), `K0`, `K1` (3, 3), `T_0to1` (4, 4), and for the pixels of the first image `to1` float32 (H, W, 2), where
each is in the second, and `seen` bool (H, W), whether it is seen there. `set.json` says what made them, and identifies the set.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smc.compiler.evaluation.arrays import read_arrays
from smc.compiler.evaluation.held_out import held_out_scenes
from smc.compiler.evaluation.pairs import Floats, ListedPair, PairSet, PosePair
from smc.compiler.output_files import replacing, writing
from smc.exported.errors import BadInput, InputMissing, UsageError

JUMP = 4.0
"""Pixels by which the places of neighbours may differ for the surface between them to be whole."""

RECORD = "set.json"

SHAPES = {"K0": (3, 3), "K1": (3, 3), "T_0to1": (4, 4)}


def rendered(path: Path, images: Path | None) -> PairSet:
    """A folder of such files. Where there is no record of what made them, its digest is that of the files.

    Raises:
        InputMissing: there are no such files, or the record cannot be read.
        BadInput: there is no folder of images to such pairs, or the record is none.
    """
    if images is not None:
        raise BadInput(f"{images}: rendered pairs hold their images", fix="give the folder alone")
    files = sorted(path.glob("*.npz"))
    if not files:
        raise InputMissing(f"{path}: no rendered pairs in it", fix="python -m smc.compiler.evaluation.rendered --pairs 500 --out FOLDER")
    record = read_record(path)
    return PairSet(
        kind="rendered",
        task="pose",
        names=[file.stem for file in files],
        load=lambda index: read_pair(files[index]),
        files=files,
        digest=record.get("digest") or _digest(files),
        origin=record.get("origin", ""),
    )


def _digest(files: Iterable[Path]) -> str:
    state = hashlib.sha256()
    for file in files:
        state.update(file.name.encode() + b"\0" + file.read_bytes())
    return state.hexdigest()


def read_record(folder: Path) -> dict[str, str]:
    """What `set.json` of a folder holds: `origin`, and the `digest` of the scenes; nothing where there is none.

    Raises:
        InputMissing: it cannot be read.
        BadInput: it is something else.
    """
    try:
        record = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputMissing(f"{folder / RECORD}: {error.strerror}") from error
    except ValueError as error:
        raise BadInput(f"{folder / RECORD}: not a record of rendered pairs ({error})") from error
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise BadInput(f"{folder / RECORD}: not a record of rendered pairs")
    return record


def render(count: int, photographs: Path | None, device: str, out: Path, report: Callable[[int], None] = lambda done: None) -> None:
    """Render held-out scenes into files, but for those that are there. `report` is told how many there are.

    Raises:
        UsageError: `count` is less than 1, or the folder holds pairs of another set, or of one that it does not name.
        CannotWrite, DiskError: it cannot be written.
        InputMissing, BadInput: its record cannot be read.
        And what `held_out_scenes` raises.
    """
    if count < 1:
        raise UsageError(f"{count} pairs: at least 1 was expected")
    scenes = held_out_scenes(Path(str(count)), photographs, device)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        record = read_record(out)
        known = record.get("digest")
        if known is None and (record or any(out.glob("*.npz"))):
            raise UsageError(f"{out} holds pairs, and no {RECORD} says of which set", fix="give another --out")
        if known not in (None, scenes.digest):
            raise UsageError(
                f"{out} holds pairs of another set: {record.get('origin') or known}",
                fix="give the same --photographs and --device, or another --out",
            )
        with replacing(out / RECORD) as temporary:
            temporary.write_text(json.dumps({"origin": scenes.origin, "digest": scenes.digest}) + "\n")
        for index, name in enumerate(scenes.names):
            if not (out / f"{name}.npz").exists():
                pair = scenes.load(index)
                assert isinstance(pair, PosePair)
                write_pair(out / f"{name}.npz", pair)
                report(index + 1)


def read_pair(path: Path) -> ListedPair:
    """A pair from its file. Raises InputMissing, BadInput."""
    arrays = read_arrays(path)
    try:
        height, width = arrays["image0"].shape[:2]
        expected = SHAPES | {"to1": (height, width, 2), "seen": (height, width)}
        for name, shape in expected.items():
            if arrays[name].shape != shape:
                raise ValueError(f"{name} is {arrays[name].shape}, {shape} was expected")
        intrinsics0, intrinsics1, pose = (arrays[name].astype(np.float64) for name in SHAPES)
        warp = between_pixels(arrays["to1"].astype(np.float64), arrays["seen"].astype(bool))
        return ListedPair(path.stem, arrays["image0"], arrays["image1"], intrinsics0, intrinsics1, pose, warp)
    except (KeyError, ValueError) as error:
        raise BadInput(f"{path}: not a rendered pair ({error})") from error


def write_pair(path: Path, pair: PosePair) -> None:
    """Keep a pair whose images are arrays and whose correspondence is known. The file is whole or not there."""
    assert isinstance(pair.image0, np.ndarray)
    assert pair.warp is not None
    height, width = pair.image0.shape[:2]
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    to1, seen = pair.warp(np.column_stack([x.ravel(), y.ravel()]).astype(np.float64))
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        np.savez(  # images of noise and texture: compressed they would be four fifths of this, and ten times as slow
            file,
            image0=pair.image0,
            image1=np.asarray(pair.image1),
            K0=pair.K0,
            K1=pair.K1,
            T_0to1=pair.T_0to1,
            to1=to1.reshape(height, width, 2).astype(np.float32),
            seen=seen.reshape(height, width),
        )
    os.replace(temporary, path)


def between_pixels(to1: Floats, seen: NDArray[np.bool_]) -> Callable[[Floats], tuple[Floats, NDArray[np.bool_]]]:
    """A correspondence from its values at pixels.

    Linear between four pixels of one surface; elsewhere, at edges, that of the nearest pixel moved along with the point. Exact
    at pixels, which is where a network's matches are.
    """
    height, width = seen.shape

    def warp(xy: Floats) -> tuple[Floats, NDArray[np.bool_]]:
        inside = ((xy >= -0.5) & (xy <= np.array([width, height]) - 0.5)).all(1)
        low = np.clip(np.floor(xy).astype(np.int64), 0, np.array([width, height]) - 2)
        corners = [(low[:, 1] + down, low[:, 0] + right) for down in (0, 1) for right in (0, 1)]
        places = np.stack([to1[corner] for corner in corners])
        whole = np.stack([seen[corner] for corner in corners]).all(0) & (np.ptp(places, axis=0) < JUMP).all(1)
        right, down = (xy - low).T
        weights = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
        linear = (weights[:, :, None] * places).sum(0)
        nearest = np.clip(np.rint(xy).astype(np.int64), 0, np.array([width, height]) - 1)
        pixel = nearest[:, 1], nearest[:, 0]
        return np.where(whole[:, None], linear, to1[pixel] + (xy - nearest)), (whole | seen[pixel]) & inside

    return warp


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m smc.compiler.evaluation.rendered", description="Render held-out scenes into files.")
    parser.add_argument("--pairs", type=int, default=500, help="[default: 500]")
    parser.add_argument("--photographs", type=Path, metavar="DIR", help="held-out photographs for textures [default: noise alone]")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="what renders; a kind of GPU has a set of its own, the CPU's is the same everywhere, to rounding [default: cpu]",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="FOLDER")
    arguments = parser.parse_args()

    def say(done: int) -> None:
        print(f"{done} of {arguments.pairs}", file=sys.stderr)

    render(arguments.pairs, arguments.photographs, arguments.device, arguments.out, say)


if __name__ == "__main__":
    from smc.compiler.programs import run

    run(main)
