"""Taking times: warm up, sample, keep the median."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from smc.compiler.bench.records import Figure

WARM_UP = 3
"""Runs before the first sample: compilers, CUDA graphs and caches need up to three of them."""

FEWEST, PATIENCE = 3, 10.0
"""After so many samples, sampling ends as soon as it has taken so many seconds."""

RUNS = 5
"""Runs between two events of the GPU: what the launch of the first one costs is then a small part."""


def sample(run: Callable[[], float], repeat: int) -> Figure:
    """Warm up, then call `run`, which returns its seconds, up to `repeat` times."""
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < repeat and (len(times) < FEWEST or time.perf_counter() - start < PATIENCE):
        times.append(run())
    return summarise(times)


def summarise(times: list[float]) -> Figure:
    return Figure(median=statistics.median(times), min=min(times), max=max(times), count=len(times))


def wall(run: Callable[[], object], synchronize: Callable[[], object] = lambda: None) -> Callable[[], float]:
    """A `run` for `sample`: the wall clock around one call, with the device idle at both ends."""

    def timed() -> float:
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - start

    return timed
