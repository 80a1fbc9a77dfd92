"""FastNN-Lite on the CPU against double loops, on 384x512x24 descriptor maps.

    python benchmarks/fastnn.py [--out benchmarks/fastnn-cpu.json]

All three run the same reciprocal scheme and must return the same matches. The peers:
- "double loop": 8192 queries by 8192 points a block, keeping each row's best; the least that a double loop can do.
- "double loop, both directions": the same, with each block's best column as well, which is what the original MASt3R computes
  (and its queries do not need).
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smc.exported import matching

HEIGHT, WIDTH, CHANNELS = 384, 512, 24
BLOCK = 8192


def double_loop(queries: NDArray[np.float32], points: NDArray[np.float32], columns: bool = False) -> NDArray[np.int64]:
    nearest = np.zeros(len(queries), np.int64)
    for i in range(0, len(queries), BLOCK):
        rows = queries[i : i + BLOCK]
        best = np.full(len(rows), -np.inf, np.float32)
        for j in range(0, len(points), BLOCK):
            scores = rows @ points[j : j + BLOCK].T
            winner = scores.argmax(axis=1)
            score = scores[np.arange(len(rows)), winner]
            better = score > best
            best[better] = score[better]
            nearest[i : i + BLOCK][better] = winner[better] + j
            if columns:
                scores.argmax(axis=0)
    return nearest


def both_directions(queries: NDArray[np.float32], points: NDArray[np.float32]) -> NDArray[np.int64]:
    return double_loop(queries, points, columns=True)


def descriptor_maps(seed: int, noise: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Two noisy copies of one smooth random field, of unit norm: a matchable pair."""
    random = np.random.default_rng(seed)
    cells = random.standard_normal((HEIGHT // 16 + 2, WIDTH // 16 + 2, CHANNELS))
    rows, cols = np.linspace(0, HEIGHT // 16 + 0.999, HEIGHT), np.linspace(0, WIDTH // 16 + 0.999, WIDTH)
    i, j = rows.astype(int)[:, None], cols.astype(int)[None, :]
    down, right = (rows[:, None] - i)[..., None], (cols[None, :] - j)[..., None]
    smooth = (cells[i, j] * (1 - right) + cells[i, j + 1] * right) * (1 - down) + (
        cells[i + 1, j] * (1 - right) + cells[i + 1, j + 1] * right
    ) * down
    maps = (smooth + noise * random.standard_normal(smooth.shape) for _ in range(2))
    first, second = ((m / np.linalg.norm(m, axis=-1, keepdims=True)).astype(np.float32) for m in maps)
    return first, second


Maps = tuple[NDArray[np.float32], NDArray[np.float32]]


def run_with(search: Callable[..., NDArray[np.int64]], maps: Maps) -> tuple[float, NDArray[np.int64]]:
    """Seconds and matches, (K, 4), of the reciprocal scheme with the given search."""
    original = matching.nearest_neighbours
    matching.nearest_neighbours = search
    try:
        start = time.perf_counter()
        matches = np.concatenate(matching.fast_reciprocal_nn(*maps), axis=1)
        return time.perf_counter() - start, matches
    finally:
        matching.nearest_neighbours = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()

    # Ours first: the process's peak memory only ever grows.
    searches = {"FastNN-Lite": matching.nearest_neighbours, "double loop": double_loop, "double loop, both directions": both_directions}
    results = []
    for noise in (0.1, 0.3):
        seconds: dict[str, list[float]] = {name: [] for name in searches}
        extra_mib = 0.0
        counts = set()
        for seed in range(arguments.rounds):
            maps = descriptor_maps(seed, noise)
            wanted = None
            for name, search in searches.items():
                if name == "double loop, both directions" and seed > 1:
                    continue  # ten times slower; two rounds tell enough
                before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                taken, matches = run_with(search, maps)
                if name == "FastNN-Lite" and not results and seed == 0:
                    extra_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
                seconds[name].append(taken)
                wanted = matches if wanted is None else wanted
                if not np.array_equal(matches, wanted):
                    sys.exit(f"{name} returns other matches than FastNN-Lite")
            counts.add(len(wanted))
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        results.append({"noise": noise, "matches": sorted(counts), "median_seconds": medians, "extra_memory_mib": extra_mib or None})
        print(f"noise {noise}: {min(counts)} to {max(counts)} matches")
        for name, median in medians.items():
            print(f"  {name:30} {median:7.3f} s   {median / medians['FastNN-Lite']:5.2f} x")
        if extra_mib:
            print(f"  extra memory of FastNN-Lite: {extra_mib:.0f} MiB")
    if arguments.out:
        record = {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "cpu": cpu_name(),
            "python": platform.python_version(),
            "numpy": np.__version__,
            "maps": [HEIGHT, WIDTH, CHANNELS],
            "results": results,
        }
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    main()
