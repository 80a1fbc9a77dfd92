"""Packages that a task needs and that the plain installation does not bring."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path

from smc.exported.errors import NoTarget

DISTRIBUTIONS = {
    "onnx_graphsurgeon": "onnx-graphsurgeon",
    "tensorrt_rtx": "tensorrt-rtx-cu13",
    "cuda.bindings": "cuda-bindings",
    "cv2": "opencv-python-headless",
}
"""Names to install, where they differ from the names to import."""


OLDEST_TRITON = "3.9"
"""The first version with the Gluon that kernels are written in."""


def is_old_triton(version: str) -> bool:
    """Whether Triton of a version such as "3.7.1" is too old to compile this project's kernels."""
    found, oldest = ([int(number) for number in re.findall(r"\d+", text)[:2]] for text in (version, OLDEST_TRITON))
    return found < oldest


def missing_packages(names: Iterable[str]) -> list[str]:
    """Those of the importable `names` that are not installed, as names to install."""
    return [DISTRIBUTIONS.get(name, name) for name in names if not _is_installed(name)]


def require_packages(purpose: str, names: Iterable[str]) -> None:
    """Raise NoTarget, saying what to install, unless all are installed."""
    if missing := missing_packages(names):
        raise NoTarget(f"{purpose} needs {', '.join(missing)}, which is not installed", fix=f"pip install {' '.join(missing)}")


def cache_directory() -> Path:
    """Where this user's builds keep what the next ones can use. Raises NoTarget where platformdirs is not installed."""
    require_packages("finding the cache", ("platformdirs",))
    import platformdirs

    return Path(platformdirs.user_cache_dir("speedy-mast3r"))


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
