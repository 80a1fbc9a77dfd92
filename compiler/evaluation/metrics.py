"""A data set's figures from its pairs' errors.

Columns are (..., n): any number of resamples of n pairs at once; errors are (..., n, d), of d draws of the estimator. Where nothing
could be estimated, the error is infinite. Figures of errors are means over draws, as of evaluations of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from smc.compiler.evaluation.pairs import Floats, Task
from smc.compiler.evaluation.records import PairResult

POSE_DEGREES, HOMOGRAPHY_PIXELS = (5, 10, 20), (1, 3, 5, 10)

MAA_DEGREES = tuple(range(1, 11))


def auc(errors: Floats, thresholds: Sequence[float]) -> list[Floats]:
    """The area (...,) under the curve of recall over error, up to each threshold and divided by it.

    The curve is linear between pairs, and flat from the last one below the threshold: exact, as SuperGlue, LoFTR and glue-factory
    have it, not a histogram.
    """
    errors = np.sort(errors, axis=-1)
    count = errors.shape[-1]
    recall = np.broadcast_to(np.arange(1, count + 1) / count, errors.shape)
    zero = np.zeros((*errors.shape[:-1], 1))
    areas = []
    for threshold in thresholds:
        below = errors < threshold
        last = below.sum(-1, keepdims=True) / count
        x = np.concatenate([zero, np.where(below, errors, threshold), zero + threshold], axis=-1)
        y = np.concatenate([zero, np.where(below, recall, last), last], axis=-1)
        trapezoids = np.diff(x, axis=-1) * (y[..., 1:] + y[..., :-1]) / 2
        areas.append(trapezoids.sum(-1) / threshold)
    return areas


def accuracy(errors: Floats, threshold: float) -> Floats:
    """The fraction (...,) of errors below the threshold."""
    return (errors < threshold).mean(-1)


def figures(task: Task, columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """Figures by name, each (...,), from columns (..., n) as `columns_of` has them. All but "matches" are fractions of 1."""
    errors = np.moveaxis(columns["error"], -1, 0)
    found: dict[str, Floats] = {}
    if task == "pose":
        areas = [area.mean(0) for area in auc(errors, POSE_DEGREES)]
        found |= {f"AUC@{degrees}°": area for degrees, area in zip(POSE_DEGREES, areas, strict=True)}
        found["mean AUC"] = np.mean(areas, axis=0)
        found["mAA"] = np.mean([accuracy(errors, degrees).mean(0) for degrees in MAA_DEGREES], axis=0)
    else:
        areas = auc(errors, HOMOGRAPHY_PIXELS)
        found |= {f"AUC@{n} px": area.mean(0) for n, area in zip(HOMOGRAPHY_PIXELS, areas, strict=True)}
        found |= {f"accuracy@{n} px": accuracy(errors, n).mean(0) for n in HOMOGRAPHY_PIXELS}
    found |= {name: values.mean(-1) for name, values in columns.items() if name.startswith("precision@")}
    found["matches"] = columns["matches"].mean(-1)
    return found


def columns_of(rows: Sequence[PairResult]) -> dict[str, Floats]:
    """What figures are made of: errors (n, draws), and (n,) each matches and the precisions that all pairs have."""
    columns = {
        "error": np.array([[np.inf if found.error is None else found.error for found in row.estimates] for row in rows]),
        "matches": np.array([row.matches for row in rows], np.float64),
    }
    measures = [name for name in rows[0].precision if all(name in row.precision for row in rows)]
    return columns | {f"precision@{name}": np.array([row.precision[name] for row in rows]) for name in measures}
