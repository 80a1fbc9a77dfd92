"""What a report says of the machine it was made on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from smc.version import VERSION

PACKAGES = ("numpy", "torch", "triton", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx-cu13", "cuda-bindings")


def describe_machine() -> dict[str, str]:
    """The processor, the GPUs, and the driver."""
    found = {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
    }
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return found
    gpus = [[part.strip() for part in line.split(",")] for line in answer.splitlines() if line.count(",") == 2]
    if gpus:
        found["gpu"] = "; ".join(f"{name}, {memory}" for name, _, memory in gpus)
        found["driver"] = gpus[0][1]
    return found


def describe_versions() -> dict[str, str]:
    """Python, this package, and what is installed of the libraries that are measured."""
    found = {"python": platform.python_version(), "speedy-mast3r": VERSION}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
