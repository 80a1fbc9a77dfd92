"""The runtime's face: load a bundle, match images."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from concurrent.futures import wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from smc.exported.bundle import open_bundle
from smc.exported.engines import DeviceEngine, Engine, MatchingEngine, MatchRequest, PairMatches, load_engine
from smc.exported.errors import BadInput, UsageError
from smc.exported.images import ExifChoice, FramedImage, Framing, ImageSource, View, load_framed, load_view
from smc.exported.manifest import Manifest
from smc.exported.matching import fast_reciprocal_nn, match_confidence, reciprocal_nn_both_ways
from smc.exported.threads import in_thread

if TYPE_CHECKING:
    from smc.exported.engines.cuda_memory import DeviceArray

Loaded = TypeVar("Loaded", FramedImage, View)

MAX_SUBSAMPLE = 65536
"""Beyond any input's sides."""

WARN_KEPT = 0.7
"""The fraction of an image's area that the crop must keep for `encode` to stay silent."""


@dataclass(frozen=True, eq=False)
class Features:
    """One encoded image, for any number of pairs.

    Attributes:
        tokens: the engine's features, batch of one.
        framing: how the image became the network's input.
        build_key: of the bundle that encoded it, the only one that can read the tokens.
    """

    tokens: Any
    framing: Framing
    build_key: str


@dataclass(frozen=True, eq=False)
class Matches:
    """Correspondences between two images, K of them.

    Attributes:
        keypoints0, keypoints1: float32 (K, 2) as x, y in pixels of either image; the centre of the first pixel is (0, 0).
        confidence: float32 (K,), the smaller descriptor confidence of the two pixels; larger is better, not bounded by 1.
        points0, points1: float32 (K, 3), the 3D points that the network predicts at the two pixels, both in the first
            camera's frame and of arbitrary scale; None unless asked for.
        image_size0, image_size1: (width, height) in pixels.
        exif: the frame of the coordinates, "apply" for the upright image, "ignore" for pixels as stored.
    """

    keypoints0: NDArray[np.float32]
    keypoints1: NDArray[np.float32]
    confidence: NDArray[np.float32]
    image_size0: tuple[int, int]
    image_size1: tuple[int, int]
    exif: ExifChoice
    points0: NDArray[np.float32] | None = None
    points1: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.keypoints0)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Everything as arrays, under the attributes' names: what `smc match --out` writes with `numpy.savez`."""
        named = {name: value for name, value in vars(self).items() if value is not None}
        return {name: np.asarray(value) for name, value in named.items()}


class Matcher:
    """A loaded bundle. Methods may be called from several threads at once and give the same bits as in series."""

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self.manifest = manifest
        self._engine = engine

    def match(
        self,
        image0: ImageSource,
        image1: ImageSource,
        subsample: int = 8,
        *,
        pixel_tol: float = 0,
        both_ways: bool = False,
        border: int = 0,
        min_confidence: float = 0,
        points3d: bool = False,
        exif: ExifChoice = "apply",
    ) -> Matches:
        """Match two images.

        Args:
            image0, image1: paths, PIL images, or uint8/uint16 arrays (H, W), (H, W, 3) or (H, W, 4).
            subsample: step of the grid of starting points, in network pixels; smaller gives more matches.
            pixel_tol: see `fast_reciprocal_nn`.
            both_ways: also start from a grid in the second image, and merge.
            border: drop matches closer than this to the edge of the network's input, in network pixels; the original's demos use 3.
            min_confidence: drop matches below this confidence.
            points3d: also return the 3D points, without which plans of the cuda backend leave out the heads for them.
            exif: "apply" or "ignore" the EXIF orientation; it names the frame of the keypoints. A PIL image of a TIFF that has been
                loaded before is upright for both: Pillow forgets how it was stored.

        Raises:
            InputMissing, BadImage: an image cannot be read.
            BadInput: the network gave descriptors that are not finite.
            UsageError: an option is out of range.
        """
        _check_options(subsample, pixel_tol, both_ways, border, min_confidence)
        request = MatchRequest(subsample, pixel_tol, both_ways, points3d)
        if isinstance(self._engine, MatchingEngine):
            framed0, framed1 = self._load_both(load_framed, image0, image1, exif)
            framings = framed0.framing, framed1.framing
            _warn_if_cropped(*framings)
            found = self._engine.match_images(framed0, framed1, request)
        else:
            view0, view1 = self._load_both(load_view, image0, image1, exif)
            framings = view0.framing, view1.framing
            _warn_if_cropped(*framings)
            found = self._match_on_host(self._engine.encode(view0.rgb[None]), self._engine.encode(view1.rgb[None]), request)
        return _in_images(found, *framings, border, min_confidence)

    def encode(self, image: ImageSource, *, exif: ExifChoice = "apply") -> Features:
        """Encode one image, to be matched against any number of others. Raises InputMissing, BadImage, UsageError."""
        shapes = self.manifest.input_shapes
        if isinstance(self._engine, MatchingEngine):
            framed = load_framed(image, shapes, exif)
            _warn_if_cropped(framed.framing)
            return Features(self._engine.encode_image(framed), framed.framing, self.manifest.build_key)
        view = load_view(image, shapes, exif)
        _warn_if_cropped(view.framing)
        return Features(self._engine.encode(view.rgb[None]), view.framing, self.manifest.build_key)

    def match_features(
        self,
        features0: Features,
        features1: Features,
        subsample: int = 8,
        *,
        pixel_tol: float = 0,
        both_ways: bool = False,
        border: int = 0,
        min_confidence: float = 0,
        points3d: bool = False,
    ) -> Matches:
        """Match two encoded images. Arguments as for `match`.

        Raises:
            BadInput: another bundle encoded them, they are in different frames, or the descriptors are not finite.
            UsageError: an option is out of range.
        """
        _check_options(subsample, pixel_tol, both_ways, border, min_confidence)
        if not features0.build_key == features1.build_key == self.manifest.build_key:
            raise BadInput("these features were encoded by another bundle", fix="encode the images with this matcher")
        if features0.framing.exif != features1.framing.exif:
            raise BadInput("one image was encoded with exif='apply' and the other with exif='ignore'", fix="encode both alike")
        request = MatchRequest(subsample, pixel_tol, both_ways, points3d)
        if isinstance(self._engine, MatchingEngine):
            found = self._engine.match_features(features0.tokens, features1.tokens, request)
        else:
            found = self._match_on_host(features0.tokens, features1.tokens, request)
        return _in_images(found, features0.framing, features1.framing, border, min_confidence)

    @overload
    def infer(
        self, view0: NDArray[np.float32], view1: NDArray[np.float32], on_device: Literal[False] = False
    ) -> dict[str, NDArray[np.float32]]: ...

    @overload
    def infer(self, view0: NDArray[np.float32], view1: NDArray[np.float32], on_device: Literal[True]) -> dict[str, DeviceArray]: ...

    def infer(
        self, view0: NDArray[np.float32], view1: NDArray[np.float32], on_device: bool = False
    ) -> dict[str, NDArray[np.float32]] | dict[str, DeviceArray]:
        """The network alone.

        Args:
            view0, view1: float32 (1, 3, H, W) in [-1, 1], each of a shape that the bundle was built for.
            on_device: leave the maps on the GPU, where CuPy, torch and others read them in place (`__cuda_array_interface__`, DLPack).

        Returns:
            `pts3d1`, `pts3d2` (H, W, 3) in the first camera's frame, `conf1`, `conf2` (H, W), `desc1`, `desc2` (H, W, D) of
            unit norm, `desc_conf1`, `desc_conf2` (H, W); all float32.

        Raises:
            BadInput: an array of another type or shape, or one of no 8-bit image where the plan takes bytes.
            UsageError: `on_device` with a bundle whose maps come to the host.
        """
        for view in (view0, view1):
            self._check_view(view)
        if not on_device:
            return self._decode(self._engine.encode(view0), self._engine.encode(view1))
        if not isinstance(self._engine, DeviceEngine):
            backend = self.manifest.backend.name
            raise UsageError(f"maps of {backend} plans come to the host", fix="leave out on_device, or build with --backend cuda")
        maps = self._engine.decode_on_device(self._engine.encode(view0), self._engine.encode(view1))
        return {name: values[0] for name, values in maps.items()}

    def _load_both(self, load: Callable[..., Loaded], image0: ImageSource, image1: ImageSource, exif: ExifChoice) -> tuple[Loaded, Loaded]:
        """Two images at once: decoding and resizing, which Pillow does without Python's lock, take longer than a fast GPU's network."""
        shapes = self.manifest.input_shapes
        if self._is_loaded(image0) or self._is_loaded(image1):
            return load(image0, shapes, exif), load(image1, shapes, exif)
        loading = in_thread(lambda: load(image1, shapes, exif))
        try:
            return load(image0, shapes, exif), loading.result()
        finally:
            wait([loading])  # also where the first failed: the second is the caller's again

    def _is_loaded(self, image: ImageSource) -> bool:
        """Whether nothing long is to be done for an image on the host, for which a thread would not be worth its start."""
        resized_there = isinstance(self._engine, MatchingEngine)
        return isinstance(image, np.ndarray) and (resized_there or image.shape[:2] in self.manifest.input_shapes)

    def _match_on_host(self, tokens0: Any, tokens1: Any, request: MatchRequest) -> PairMatches:
        maps = self._decode(tokens0, tokens1)
        desc1, desc2, conf1, conf2 = maps["desc1"], maps["desc2"], maps["desc_conf1"], maps["desc_conf2"]
        if request.both_ways:
            xy1, xy2, confidence = reciprocal_nn_both_ways(desc1, desc2, conf1, conf2, request.subsample)
        else:
            xy1, xy2 = fast_reciprocal_nn(desc1, desc2, request.subsample, request.pixel_tol)
            confidence = match_confidence(xy1, xy2, conf1, conf2)
        if not request.points3d:
            return PairMatches(xy1, xy2, confidence)
        points1, points2 = (maps[name][xy[:, 1], xy[:, 0]] for name, xy in (("pts3d1", xy1), ("pts3d2", xy2)))
        return PairMatches(xy1, xy2, confidence, points1, points2)

    def _decode(self, tokens0: Any, tokens1: Any) -> dict[str, NDArray[np.float32]]:
        return {name: value[0] for name, value in self._engine.decode(tokens0, tokens1).items()}

    def _check_view(self, view: NDArray[np.float32]) -> None:
        if view.dtype != np.float32 or view.ndim != 4 or view.shape[:2] != (1, 3):
            raise BadInput(f"a view is float32 (1, 3, H, W), found {view.dtype} {view.shape}")
        if view.shape[2:] not in self.manifest.input_shapes:
            known = ", ".join(f"{width}x{height}" for height, width in self.manifest.input_shapes)
            raise BadInput(
                f"a view of {view.shape[3]}x{view.shape[2]}: the bundle was built for {known}",
                fix=f"build it with --shape {view.shape[3]}x{view.shape[2]}",
            )


def _warn_if_cropped(*framings: Framing) -> None:
    """Warn of images that the crop loses much of."""
    for framing in framings:
        if framing.kept < WARN_KEPT:
            width, height = framing.image_size
            warnings.warn(
                f"the bundle's input shapes keep only {framing.kept:.0%} of a {width}x{height} image; "
                "build it with a --shape of that aspect ratio",
                stacklevel=3,
            )


def _in_images(found: PairMatches, framing0: Framing, framing1: Framing, border: int, min_confidence: float) -> Matches:
    """Matches in pixels of the images, without those too near the edge of the network's input or of too little confidence."""
    kept = found.confidence >= min_confidence
    if border > 0:
        for xy, framing in ((found.xy1, framing0), (found.xy2, framing1)):
            height, width = framing.shape
            x, y = xy.T
            kept &= (x >= border) & (x < width - border) & (y >= border) & (y < height - border)
    return Matches(
        keypoints0=framing0.to_image(found.xy1[kept]),
        keypoints1=framing1.to_image(found.xy2[kept]),
        confidence=found.confidence[kept],
        image_size0=framing0.image_size,
        image_size1=framing1.image_size,
        exif=framing0.exif,
        points0=None if found.points1 is None else found.points1[kept],
        points1=None if found.points2 is None else found.points2[kept],
    )


def _check_options(subsample: int, pixel_tol: float, both_ways: bool, border: int, min_confidence: float) -> None:
    """Raise UsageError for an option that is out of range, before the network runs."""
    if not isinstance(subsample, int | np.integer) or not 1 <= subsample <= MAX_SUBSAMPLE:
        raise UsageError(f"subsample must be a whole number from 1 to {MAX_SUBSAMPLE}, found {subsample!r}")
    for name, value in (("pixel_tol", pixel_tol), ("border", border)):
        if not value >= 0:
            raise UsageError(f"{name} must be 0 or more, found {value}")
    if both_ways and pixel_tol > 0:
        raise UsageError("both_ways follows walks until they close, pixel_tol keeps starting points: choose one")
    if math.isnan(min_confidence):
        raise UsageError("min_confidence must be a number, found nan")


def load(path: str | os.PathLike[str], *, threads: int | None = None) -> Matcher:
    """Load a bundle.

    Args:
        path: the bundle's directory.
        threads: CPU threads of the engine, None for all cores. Matching is NumPy's, whose BLAS has threads of its own.

    Raises:
        UsageError: `threads` is no whole number from 1 to 1024.
        InputMissing: there is no bundle, or it cannot be read.
        BundleDamaged: it is not what its manifest says.
        BundleMismatch: it is for another machine or another version.
        NoTarget: the library of its backend is not installed.
        DiskError: a read failed midway.
        OutOfMemory, BackendFailed: its engine could not be loaded.
    """
    if threads is not None and (type(threads) is not int or not 1 <= threads <= 1024):
        raise UsageError(f"threads is {threads!r}, a whole number from 1 to 1024 was expected")
    bundle = open_bundle(path, everything=False)
    return Matcher(load_engine(bundle, threads), bundle.manifest)
