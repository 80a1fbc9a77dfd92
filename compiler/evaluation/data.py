"""The data sets that `--data KIND:PATH[:IMAGES]` names."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from smc.compiler.evaluation.held_out import held_out_scenes
from smc.compiler.evaluation.homographies import homography_folder, hpatches
from smc.compiler.evaluation.pairs import PairSet
from smc.compiler.evaluation.pose_lists import megadepth, pose_list, scannet
from smc.compiler.evaluation.rendered import rendered
from smc.exported.errors import InputMissing, UsageError

KINDS: dict[str, Callable[[Path, Path | None], PairSet]] = {
    "megadepth": megadepth,
    "scannet": scannet,
    "pairs": pose_list,
    "hpatches": hpatches,
    "homography": homography_folder,
    "scenes": held_out_scenes,
    "rendered": rendered,
}


def open_data(text: str) -> PairSet:
    """A data set from its option.

    Raises:
        UsageError: there is no such kind.
        InputMissing: the list or an image is absent.
        BadInput: the list is none.
    """
    kind, *paths = text.split(":")
    if kind not in KINDS or not 1 <= len(paths) <= 2 or not all(paths):
        raise UsageError(f"--data {text}: KIND:PATH or KIND:PATH:IMAGES was expected, KIND one of {', '.join(KINDS)}")
    found = KINDS[kind](Path(paths[0]), Path(paths[1]) if len(paths) > 1 else None)
    check_files(found)
    return found


def check_kinds(kinds: Sequence[str]) -> None:
    """Raise UsageError where two data sets of one evaluation are of one kind: results name a pair by its kind and its name."""
    if len(set(kinds)) < len(kinds):
        raise UsageError(f"data sets {', '.join(kinds)}: each has to be of another kind", fix="evaluate them in runs of their own")


def check_files(data: PairSet) -> None:
    """Raise InputMissing where images are absent, before any work is done."""
    files = list(dict.fromkeys(data.files))
    missing = [file for file in files if not os.path.isfile(file)]
    if missing:
        raise InputMissing(
            f"{missing[0]}: no such image, of {data.kind}; {len(missing)} of its {len(files)} are missing",
            fix="" if data.task == "homography" else f"name the folder that the list's paths start from: --data {data.kind}:LIST:IMAGES",
        )
