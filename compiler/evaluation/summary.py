"""What results come to: a data set's figures, and how two runs differ on the same pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from smc.compiler.evaluation.metrics import columns_of, figures
from smc.compiler.evaluation.pairs import Floats, Task
from smc.compiler.evaluation.records import Config, DataConfig, PairResult
from smc.compiler.evaluation.results import differences, read_results, without_origin
from smc.exported.errors import UsageError

RESAMPLES = 10_000

BLOCK = 2_000_000
"""Values of a column that are resampled at once."""

LEVEL = 0.95


class Summary(msgspec.Struct, frozen=True):
    """A data set's figures.

    Attributes:
        kind, task, scale: of the data set; errors in pixels are in those of the scale.
        pairs: how many.
        failed: of how many nothing could be estimated, in no draw.
        median_error: over all pairs and draws, degrees or pixels; None where more than half failed.
        figures: by name; all but "matches" are fractions of 1.
        spread: the standard deviation, between single draws, of the figures that depend on them; empty with one draw.
        seconds: medians by stage.
    """

    kind: str
    task: Task
    scale: str
    pairs: int
    failed: int
    median_error: float | None
    figures: dict[str, float]
    spread: dict[str, float]
    seconds: dict[str, float]


class Difference(msgspec.Struct, frozen=True):
    """A figure of two runs over the same pairs. `low`, `high`: where second - first lies, by a paired bootstrap, at 95 %."""

    first: float
    second: float
    difference: float
    low: float
    high: float


class Comparison(msgspec.Struct, frozen=True):
    """Two runs on one data set: the pairs that both have, how many only one has, and figures by name."""

    kind: str
    pairs: int
    only_first: int
    only_second: int
    figures: dict[str, Difference]


def summarise(config: Config, rows: Sequence[PairResult]) -> list[Summary]:
    """The figures of each data set that has rows."""
    return [_summary(data, found) for data in config.data if (found := [row for row in rows if row.kind == data.kind])]


def _summary(data: DataConfig, rows: list[PairResult]) -> Summary:
    columns = columns_of(rows)
    errors = columns["error"]
    median = float(np.median(errors))
    by_draw = [figures(data.task, columns | {"error": errors[:, [draw]]}) for draw in range(errors.shape[1])]
    spread = {name: float(np.std([found[name] for found in by_draw], ddof=1)) for name in by_draw[0]} if len(by_draw) > 1 else {}
    stages = dict.fromkeys(stage for row in rows for stage in row.seconds)
    return Summary(
        kind=data.kind,
        task=data.task,
        scale=data.scale,
        pairs=len(rows),
        failed=int(np.isinf(errors).all(1).sum()),
        median_error=median if np.isfinite(median) else None,
        figures={name: float(value) for name, value in figures(data.task, columns).items()},
        spread={name: value for name, value in spread.items() if not name.startswith(("precision", "matches"))},
        seconds={stage: float(np.median([row.seconds[stage] for row in rows if stage in row.seconds])) for stage in stages},
    )


def compare(first: Path, second: Path, seed: int = 0) -> list[Comparison]:
    """How the second run differs from the first, on the pairs that both have.

    Pairs are drawn with replacement, the same for both runs, `RESAMPLES` times.

    Raises:
        InputMissing, BadInput: a file is none of results.
        UsageError: they cannot be compared, having other thresholds, seeds or data.
    """
    (header0, rows0), (header1, rows1) = read_results(first), read_results(second)
    shared = {data.kind: data for data in header0.config.data if data.kind in {other.kind for other in header1.config.data}}
    if other := differences(*(_judging(header.config, shared) for header in (header0, header1))):
        raise UsageError(f"{first} and {second} cannot be compared: {'; '.join(other)}", fix="evaluate both alike")
    comparisons = []
    for kind, data in shared.items():
        names0, names1 = ([name for of, name in rows if of == kind] for rows in (rows0, rows1))
        both = [name for name in names0 if (kind, name) in rows1]
        if both:
            columns0, columns1 = (columns_of([rows[kind, name] for name in both]) for rows in (rows0, rows1))
            found = paired_differences(data.task, columns0, columns1, seed)
            comparisons.append(Comparison(kind, len(both), len(names0) - len(both), len(names1) - len(both), found))
    if not comparisons:
        raise UsageError(f"{first} and {second} have no pairs in common")
    return comparisons


def _judging(config: Config, shared: dict[str, DataConfig]) -> Config:
    """What two configs need to have in common: not the matcher, not how many pairs are taken, and not which run rendered them."""
    data = [msgspec.structs.replace(data, pairs=0) for kind in shared for data in config.data if data.kind == kind]
    return without_origin(msgspec.structs.replace(config, matcher={}, limit=None, data=data))


def paired_differences(task: Task, columns0: Mapping[str, Floats], columns1: Mapping[str, Floats], seed: int = 0) -> dict[str, Difference]:
    """How the figures of two runs over the same pairs differ; `seed` is of the bootstrap.

    The columns are those of `columns_of`, row by row of the same pair.
    """
    whole0, whole1 = figures(task, columns0), figures(task, columns1)
    samples: dict[str, list[Floats]] = {}
    count, draws = columns0["error"].shape
    for index in _resamples(count, draws, seed):
        drawn0, drawn1 = (figures(task, {name: values[index] for name, values in columns.items()}) for columns in (columns0, columns1))
        for name in drawn0.keys() & drawn1.keys():
            samples.setdefault(name, []).append(drawn1[name] - drawn0[name])
    found = {}
    for name in whole0:
        if name in samples:
            low, high = np.quantile(np.concatenate(samples[name]), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            one, other = float(whole0[name]), float(whole1[name])
            found[name] = Difference(one, other, other - one, float(low), float(high))
    return found


def _resamples(count: int, draws: int, seed: int) -> Iterator[np.ndarray[tuple[int, int], np.dtype[np.int64]]]:
    """Indices (B, count) of pairs drawn with replacement, `RESAMPLES` rows in all."""
    random = np.random.default_rng(seed)
    rows = max(1, BLOCK // (count * draws))
    for begin in range(0, RESAMPLES, rows):
        yield random.integers(0, count, (min(rows, RESAMPLES - begin), count))
