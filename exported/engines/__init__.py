"""Engines: what runs a plan. One module a backend, all with the same face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smc.exported.bundle import Bundle
from smc.exported.errors import BundleMismatch

Maps = dict[str, NDArray[np.float32]]
Files = Mapping[str, memoryview]


class Engine(Protocol):
    """A loaded plan. Calls may come from any number of threads at once."""

    def encode(self, images: NDArray[np.float32]) -> Any:
        """images (B, 3, H, W) float32 in [-1, 1] -> features of the engine's own kind, batch first."""

    def decode(self, features1: Any, features2: Any) -> Maps:
        """Features of B images each -> `pts3d{1,2}`, `conf{1,2}`, `desc{1,2}`, `desc_conf{1,2}`, float32, batch first."""


def load_engine(bundle: Bundle, threads: int | None = None) -> Engine:
    """The engine for a bundle.

    Args:
        bundle: the verified bundle.
        threads: CPU threads to use; None for all cores.

    Raises:
        BundleMismatch: this installation has no such backend, or not the version that the plan needs.
        NoTarget: the backend's library is not installed.
        OutOfMemory, BackendFailed: the engine could not be loaded.
    """
    return engine_for(bundle.manifest.backend.name, bundle.files, bundle.manifest.stages, threads)


def engine_for(backend: str, files: Files, stages: Mapping[str, str], threads: int | None = None) -> Engine:
    """The engine of a backend over a plan's files; `stages` names the files of "encoder" and "decoder". Raises as `load_engine`."""
    if backend == "onnxruntime":
        from smc.exported.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(files, stages, threads)
    raise BundleMismatch(f"the bundle's backend is {backend!r}, which this version does not know", fix="upgrade speedy-mast3r")
