"""Engines: what runs a plan. One module a backend, all with the same face."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from smc.exported.bundle import Bundle
from smc.exported.errors import BundleMismatch
from smc.exported.manifest import Manifest

if TYPE_CHECKING:
    from smc.exported.engines.cuda_memory import DeviceArray
    from smc.exported.images import FramedImage

Maps = dict[str, NDArray[np.float32]]
Files = Mapping[str, memoryview]


@dataclass(frozen=True)
class MatchRequest:
    """How to match two decoded images; see `Matcher.match`."""

    subsample: int
    pixel_tol: float = 0
    both_ways: bool = False
    points3d: bool = False


@dataclass(frozen=True, eq=False)
class PairMatches:
    """Matches in network pixels: xy1, xy2 int64 (K, 2), confidence float32 (K,), and the 3D points float32 (K, 3) if asked for."""

    xy1: NDArray[np.int64]
    xy2: NDArray[np.int64]
    confidence: NDArray[np.float32]
    points1: NDArray[np.float32] | None = None
    points2: NDArray[np.float32] | None = None


class Engine(Protocol):
    """A loaded plan. Calls may come from any number of threads at once."""

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> Any:
        """images uint8 (B, H, W, 3), or float32 (B, 3, H, W) in [-1, 1] -> features of the engine's own kind, batch first.

        A plan that takes bytes raises BadInput for float32 pixels that are not those of an 8-bit image.
        """

    def decode(self, features1: Any, features2: Any) -> Maps:
        """Features of B images each -> `pts3d{1,2}`, `conf{1,2}`, `desc{1,2}`, `desc_conf{1,2}`, float32, batch first."""


@runtime_checkable
class MatchingEngine(Engine, Protocol):
    """An engine that also makes images the network's input, and matches, where its maps are."""

    def encode_image(self, image: FramedImage) -> Any:
        """As `encode`, of one image of any size that is framed for a shape of the plan. Raises BadInput."""

    def match_images(self, image1: FramedImage, image2: FramedImage, request: MatchRequest) -> PairMatches:
        """Two images, framed as for `encode_image`. Raises BadInput."""

    def match_features(self, features1: Any, features2: Any, request: MatchRequest) -> PairMatches:
        """Features of one image each. Raises BadInput."""


@runtime_checkable
class DeviceEngine(Engine, Protocol):
    """An engine that can leave the maps on the GPU."""

    def decode_on_device(self, features1: Any, features2: Any) -> dict[str, DeviceArray]:
        """As `decode`; the maps are there when it returns."""


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
    return engine_for(bundle.manifest, bundle.files, threads)


def engine_for(manifest: Manifest, files: Files, threads: int | None = None) -> Engine:
    """The engine for a plan whose files' contents are given. Raises as `load_engine`."""
    backend = manifest.backend.name
    if backend == "onnxruntime":
        from smc.exported.engines.onnxruntime import OnnxRuntimeEngine

        return OnnxRuntimeEngine(files, manifest.stages, threads)
    if backend in ("tensorrt", "tensorrt-rtx"):
        from smc.exported.engines.tensorrt import TensorRtEngine

        return TensorRtEngine(files, manifest)
    if backend == "cuda":
        from smc.exported.engines.cuda import CudaEngine

        return CudaEngine(files, manifest)
    raise BundleMismatch(f"the bundle's backend is {backend!r}, which this version does not know", fix="upgrade speedy-mast3r")
