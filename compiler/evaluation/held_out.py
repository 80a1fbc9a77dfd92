"""The project's own held-out scenes, rendered as they are needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from smc.compiler.evaluation.pairs import PairSet, PosePair
from smc.compiler.packages import require_packages
from smc.exported.errors import NoTarget, UsageError

EDITION = 2
"""Counted up when `HeldOutPairs` gives other pairs for a seed: results and folders of pairs know a set by its digest."""

SEED, SHAPE = 0, (384, 512)
"""Of the set that figures are reported on."""


def held_out_scenes(path: Path, images: Path | None, device: str = "cpu") -> PairSet:
    """Scenes of `smc.compiler.scenes`.

    Args:
        path: how many, as text; a set's first pairs are those of a smaller set.
        images: the folder `held-out` of `smc.compiler.scenes.photographs`, to texture them with; None for textures of noise alone.
        device: what renders them, "cpu" or "cuda". A kind of GPU has a set of its own, see `HeldOutPairs`.

    Raises:
        UsageError: `path` is no number.
        NoTarget: torch is not installed, or there is no such device.
        InputMissing: there are no photographs.
        BadImage: one of them cannot be read.
    """
    if not str(path).isdecimal() or int(str(path)) == 0:
        raise UsageError(f"--data scenes:{path}: a number of pairs was expected, such as scenes:500")
    require_packages("rendering scenes", ("torch",) if device == "cpu" else ("torch", "triton"))
    import torch

    from smc.compiler.scenes import photographs
    from smc.compiler.scenes.pairs import HeldOutPairs

    if device != "cpu" and not torch.cuda.is_available():
        raise NoTarget("torch finds no GPU to render scenes on", fix="render on the CPU, which takes hours for 500 pairs: --device cpu")
    count = int(str(path))
    where = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    pairs = HeldOutPairs(count, SEED, SHAPE, images, device=device)
    files = [] if images is None else photographs.packed(images)
    state = hashlib.sha256(f"scenes {EDITION} {SEED} {SHAPE} {where}".encode())
    for file in files:
        state.update(file.name.encode() + b"\0" + file.read_bytes())
    return PairSet(
        kind="scenes",
        task="pose",
        names=[f"scene{SEED}-{index:05d}" for index in range(count)],
        load=InOrder(pairs).load,
        files=[],
        digest=state.hexdigest(),
        origin=f"seed {SEED}, {SHAPE[1]}x{SHAPE[0]}, {len(files)} photographs, rendered on {where} by torch {torch.__version__}",
    )


class InOrder:
    """Gives pairs by index of what can only be iterated over; in order, each is rendered once."""

    def __init__(self, pairs: Iterable[PosePair]) -> None:
        self._pairs = pairs
        self._iterator = iter(pairs)
        self._next = 0

    def load(self, index: int) -> PosePair:
        if index < self._next:
            self._iterator, self._next = iter(self._pairs), 0
        while True:
            pair = next(self._iterator)
            self._next += 1
            if self._next > index:
                return pair
