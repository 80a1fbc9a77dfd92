"""A fresh process that loads a bundle and matches once: `python -m smc.compiler.bench.cold BUNDLE STARTED`.

STARTED is `time.time()` from before the process was started. Prints the seconds of each part as JSON.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np

import smc


def main(path: str, started: float) -> None:
    imported = time.time()
    matcher = smc.load(path)
    loaded = time.time()
    height, width = matcher.manifest.input_shapes[0]
    random = np.random.default_rng()
    image0, image1 = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    ready = time.time()
    matcher.match(image0, image1)
    matched = time.time()
    print(
        json.dumps(
            {
                "start and import": imported - started,
                "load": loaded - imported,
                "first result": matched - ready,
                "load to first result": loaded - imported + matched - ready,
                "process start to first result": matched - started - (ready - loaded),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
