"""What this machine has and lacks for building and running plans."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from smc.compiler.packages import OLDEST_TRITON, is_old_triton
from smc.version import VERSION

PACKAGES = {
    "": ("numpy", "pillow", "msgspec", "filelock", "click", "rich", "onnxruntime"),
    "compile": ("torch", "onnx", "onnxscript", "onnx-graphsurgeon", "polygraphy", "safetensors", "platformdirs"),
    "tensorrt": ("tensorrt", "triton", "cuda-bindings"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13", "cuda-bindings"),
    "bench": ("matplotlib",),
    "eval": ("poselib", "opencv-python-headless"),
    "train": ("triton", "scikit-image"),
    "cuda": ("cuda-bindings",),
}
"""Extras of the distribution ("" the plain install) and the packages they bring."""

PURPOSES = {
    "": "run bundles",
    "compile": "build bundles",
    "tensorrt": "TensorRT plans",
    "tensorrt-rtx": "TensorRT-RTX plans",
    "bench": "plots of benchmarks",
    "eval": "measuring accuracy",
    "train": "training the small model",
    "cuda": "CUDA plans",
}


@dataclass(frozen=True)
class Finding:
    """`state`: "ok", "missing" (needed for what `subject` says) or "absent" (optional). `fix`: how to get it, or empty."""

    subject: str
    state: Literal["ok", "missing", "absent"]
    detail: str
    fix: str = ""


def examine() -> list[Finding]:
    """Every finding, in the order to show them."""
    python = Finding("Python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    own = Finding("speedy-mast3r", "ok", VERSION)
    return [own, python, _memory(), *(_extra(extra) for extra in PACKAGES), _kernel_compiler(), _nvidia_driver()]


def _extra(extra: str) -> Finding:
    found, lacking = _installed(PACKAGES[extra])
    subject = f"{PURPOSES[extra]} [{extra or 'plain install'}]"
    if not lacking:
        return Finding(subject, "ok", ", ".join(found))
    fix = f"pip install 'speedy-mast3r[{extra}]'" if extra else "pip install speedy-mast3r"
    state: Literal["missing", "absent"] = "missing" if extra in ("", "compile") else "absent"
    return Finding(subject, state, f"lacks {', '.join(lacking)}", fix)


def _kernel_compiler() -> Finding:
    """Triton is in no extra of its own: CUDA plans need it where they are built, on top of `[compile]`, and nowhere else."""
    found, lacking = _installed(("triton",))
    subject, fix = "building CUDA plans", f"pip install 'triton>={OLDEST_TRITON}'"
    if lacking:
        return Finding(subject, "absent", "lacks triton", fix)
    if is_old_triton(metadata.version("triton")):
        return Finding(subject, "absent", f"{found[0]} is too old", fix)
    return Finding(subject, "ok", found[0])


def _installed(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those of the packages that are installed, with their versions, and those that are not."""
    found, lacking = [], []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            lacking.append(name)
    return found, lacking


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{cores} cores, {total:.0f} GiB memory"
    if total < 12:
        return Finding(
            "machine", "missing", detail, "compiling the public model takes up to 12 GiB; a smaller machine can still run bundles"
        )
    return Finding("machine", "ok", detail)


def _nvidia_driver() -> Finding:
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Finding("NVIDIA driver", "absent", "none; bundles for CPUs run without", "install the NVIDIA driver, if there is a GPU")
    version, count = ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDriverGetVersion(ctypes.byref(version)) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Finding("NVIDIA driver", "absent", "the library is there, no GPU answers", "check that the GPU is visible: nvidia-smi")
    gpus = []
    for index in range(count.value):
        name, major, minor = ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
        cuda.cuDeviceGetName(name, 256, index)
        cuda.cuDeviceComputeCapability(ctypes.byref(major), ctypes.byref(minor), index)
        gpus.append(f"{name.value.decode(errors='replace')} (sm {major.value}.{minor.value})")
    return Finding("NVIDIA driver", "ok", f"CUDA {version.value // 1000}.{version.value % 1000 // 10}; {', '.join(gpus) or 'no GPU'}")
