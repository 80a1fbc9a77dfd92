"""Float32 outputs, recorded by one process for the others to compare with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.compiler.bench.records import Accuracy, Shape
from smc.compiler.bench.tasks import Work
from smc.compiler.verify import match_set, output_error

Maps = Mapping[str, NDArray[np.float32]]
"""The eight outputs of a batch, batch first."""


def check_accuracy(work: Work, shape: Shape, batch: int, maps: Maps) -> list[Accuracy]:
    """Compare the last pair of a batch with its reference, or record it; nothing where `work` asks for neither."""
    if work.references is None:
        return []
    found = {name: np.asarray(values[batch - 1], np.float32) for name, values in maps.items()}
    path = Path(work.references) / f"{shape[1]}x{shape[0]}-{batch - 1}.npz"
    if work.record:
        arrays: dict[str, Any] = dict(found)
        if batch == 1:
            arrays["matches"] = np.array(sorted(match_set(found)), np.int64).reshape(-1, 4)
        np.savez(path, **arrays)
        return []
    if not path.exists():
        return []
    with np.load(path) as wanted:
        errors = {name: output_error(wanted[name], found[name]).relative for name in wanted.files if name != "matches"}
        if batch > 1 or max(errors.values()) > 1e29:
            return [Accuracy(shape, batch, errors)]
        reference = set(map(tuple, wanted["matches"].tolist()))
    matches = match_set(found)
    union = len(matches | reference)
    return [Accuracy(shape, batch, errors, len(matches), len(reference), len(matches & reference) / union if union else 1.0)]
