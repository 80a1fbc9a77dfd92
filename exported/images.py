"""Images in, and the way back from the network's pixels to the image's own.

A coordinate names a pixel's centre: the centre of the first pixel is (0, 0). `exif` names the frame that coordinates are in:
"apply" turns the image upright by its EXIF orientation first, as the original MASt3R does; "ignore" takes the pixels as they
are stored, as COLMAP and hloc do.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np
from numpy.typing import DTypeLike, NDArray
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from smc.exported.errors import BadImage, BadInput, InputMissing, SmcError, UsageError
from smc.exported.resampling import Filter

ImageSource = str | os.PathLike[str] | Image.Image | NDArray[np.generic]
ExifChoice = Literal["apply", "ignore"]

PATCH = 16
"""The network's patch: both sides of its input are multiples of this."""

MAX_PIXELS = 89_478_485
"""The largest image taken, in pixels. Pillow warns of a decompression bomb from here on; this refuses."""

UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of an EXIF orientation upright."""

AS_STORED = {**UPRIGHT, 6: UPRIGHT[8], 8: UPRIGHT[6]}
"""What turns it back."""

VECTOR_FORMATS = ("EPS", "WMF")
"""What Pillow hands to another program, Ghostscript or Windows, which is not done with files of unknown origin."""

_LOADING = threading.Lock()
"""Held while an image that a caller opened is loaded. Pillow reads the file when the pixels or the EXIF data are first asked for,
several threads may ask for one image, and several images may share one file."""

Geometry = tuple[tuple[int, int], tuple[int, int, int, int]]
"""A resize and a crop: (new width, new height), then the crop box (left, top, right, bottom) in the resized image."""


@dataclass(frozen=True)
class Framing:
    """How an image becomes the network's input: by a resize, and a crop.

    Attributes:
        image_size: (width, height) of the image that coordinates refer to.
        resized_size: (width, height) after the resize, before the crop.
        crop: (left, top, right, bottom) in the resized image.
        exif: the frame of `image_size`.
    """

    image_size: tuple[int, int]
    resized_size: tuple[int, int]
    crop: tuple[int, int, int, int]
    exif: ExifChoice

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W) of the network's input."""
        left, top, right, bottom = self.crop
        return bottom - top, right - left

    @property
    def is_resized(self) -> bool:
        """Whether there is a resize to do."""
        return self.resized_size != self.image_size

    @property
    def filter(self) -> Filter:
        """Of the resize: the original's choice."""
        return "lanczos" if max(self.image_size) > max(self.resized_size) else "bicubic"

    @property
    def kept(self) -> float:
        """Fraction of the image's area inside the crop."""
        return self.shape[0] * self.shape[1] / (self.resized_size[0] * self.resized_size[1])

    def to_image(self, xy: NDArray[np.integer] | NDArray[np.floating]) -> NDArray[np.float32]:
        """Network pixels (K, 2) as x, y -> float32 (K, 2) coordinates in the image."""
        scale = np.array(self.image_size, np.float64) / np.array(self.resized_size)
        return ((xy + np.array(self.crop[:2]) + 0.5) * scale - 0.5).astype(np.float32)


@dataclass(frozen=True, eq=False)
class View:
    """An image as the network takes it: `rgb` is uint8 (H, W, 3)."""

    rgb: NDArray[np.uint8]
    framing: Framing

    @property
    def pixels(self) -> NDArray[np.float32]:
        """float32 (3, H, W) in [-1, 1], as the original network takes it."""
        return to_unit_range(self.rgb[None])[0]


@dataclass(frozen=True, eq=False)
class FramedImage:
    """An image of any size, `rgb` uint8 (h, w, 3), and how it becomes the network's input."""

    rgb: NDArray[np.uint8]
    framing: Framing

    def render(self) -> View:
        """What the network takes, made by Pillow if there is a resize to do; a part of `rgb` otherwise."""
        if self.framing.is_resized:
            return _render(Image.fromarray(self.rgb), self.framing)
        left, top, right, bottom = self.framing.crop
        return View(self.rgb[top:bottom, left:right], self.framing)


def open_image(source: ImageSource, exif: ExifChoice = "apply") -> Image.Image:
    """Read an image as 8-bit RGB.

    Args:
        source: a path; a PIL image; or an array, uint8 or uint16, (H, W) grey, (H, W, 3) RGB or (H, W, 4) with alpha.
        exif: "apply" turns the image upright by its EXIF orientation; "ignore" does not.

    Grey, palette and CMYK images are converted, 16-bit values are scaled, alpha is dropped. PIL images may be used by several threads at
    once; those not loaded yet are decoded one after the other.

    Pillow turns a TIFF upright when it loads it, and forgets how it was stored: a PIL image of a TIFF that has been loaded before is taken
    as it is, upright, for "ignore" too. Give the path instead.

    Raises:
        InputMissing: the file is absent or unreadable.
        BadImage: not an image, damaged, over `MAX_PIXELS`, or of a kind that cannot be converted.
        UsageError: `exif` is neither.
    """
    _check_exif(exif)
    if isinstance(source, np.ndarray):
        return Image.fromarray(_from_array(source))
    if isinstance(source, Image.Image):
        with _decoding("image"):
            with _LOADING:
                # What would be turned for good is opened once more: the next call has to find the caller's image as this one does.
                image = _open_again(source) if _turns_when_loaded(source) else source
                turn = _load(image, "image", exif)
            return _to_rgb(image, "image", turn)
    path = Path(source)
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise InputMissing(f"{str(path)!r} cannot be a file's name: {error}") from error
    with file, _decoding(str(path)):
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            size = os.fstat(file.fileno()).st_size
            raise BadImage(f"{path}: not an image that Pillow can read ({size:,} bytes)") from error
        with image:
            turn = _load(image, str(path), exif)
            return _to_rgb(image, str(path), turn)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn what Pillow raises into this package's errors: on malformed files its decoders raise nearly anything."""
    try:
        yield
    except SmcError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"{name}: over the limit of {MAX_PIXELS:,} pixels ({error})", fix="make it smaller first") from error
    except Exception as error:
        raise BadImage(f"{name}: damaged, or of a kind that cannot be converted ({type(error).__name__}: {error})") from error


def _turns_when_loaded(image: Image.Image) -> TypeGuard[TiffImageFile]:
    """Whether Pillow will turn the image upright when it loads it, and drop its orientation."""
    return isinstance(image, TiffImageFile) and bool(image.tile) and _orientation(image) in UPRIGHT


def _orientation(image: Image.Image) -> int:
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def _open_again(image: TiffImageFile) -> Image.Image:
    """The same frame of the same file, as an image of its own."""
    assert image.fp is not None  # as long as the image is not loaded
    again = Image.open(image.fp)
    again.seek(image.tell())
    return again


def _load(image: Image.Image, name: str, exif: ExifChoice) -> Image.Transpose | None:
    """Read an image's pixels. What is returned turns them into the frame that `exif` names."""
    _check_size(name, *image.size)
    if image.format in VECTOR_FORMATS:
        raise BadImage(f"{name}: {image.format} is a drawing, not an image of pixels", fix="convert it to PNG first")
    if _turns_when_loaded(image):
        orientation = _orientation(image)
        image.load()
        return AS_STORED[orientation] if exif == "ignore" else None
    image.load()
    # Not ImageOps.exif_transpose: that also packs the other EXIF tags anew, and fails on photographs where they are odd.
    return UPRIGHT.get(_orientation(image)) if exif == "apply" else None


def _to_rgb(image: Image.Image, name: str, turn: Image.Transpose | None) -> Image.Image:
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise BadImage(f"{name}: floating-point pixels have no defined white", fix="save it with 8 or 16 bits a channel")
    if image.mode.startswith("I"):
        image = Image.fromarray(_to_uint8(np.clip(np.asarray(image), 0, 65535).astype(np.uint16)))
    if image.mode == "P":
        image = image.convert("RGBA")  # on the direct way to RGB, Pillow warns where the palette has transparent colours
    return image.convert("RGB")


def _check_exif(exif: str) -> None:
    if exif not in ("apply", "ignore"):
        raise UsageError(f"exif is {exif!r}, 'apply' or 'ignore' was expected")


def _check_size(name: str, width: int, height: int) -> None:
    if width == 0 or height == 0:
        raise BadImage(f"{name}: {width}x{height} holds no pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"{name}: {width}x{height} is over the limit of {MAX_PIXELS:,} pixels", fix="make it smaller first")


def _to_uint8(pixels: NDArray[np.generic]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return pixels  # type: ignore[return-value]
    return np.round(pixels.astype(np.float32) / 257).astype(np.uint8)  # 65535 / 255


def _from_array(array: NDArray[np.generic]) -> NDArray[np.uint8]:
    """An image of whatever kind `open_image` takes as uint8 (h, w, 3)."""
    if array.dtype not in (np.uint8, np.uint16):
        raise BadImage(f"image array is {array.dtype}, uint8 or uint16 was expected")
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))):
        raise BadImage(f"image array has shape {array.shape}, (H, W), (H, W, 3) or (H, W, 4) was expected")
    _check_size("image array", array.shape[1], array.shape[0])
    if array.ndim == 2:
        array = array[:, :, None]
    rgb = np.broadcast_to(array, (*array.shape[:2], 3)) if array.shape[2] == 1 else array[:, :, :3]
    return np.ascontiguousarray(_to_uint8(rgb))


def trained_geometry(width: int, height: int, size: int) -> Geometry:
    """The original's resize and crop.

    The long side becomes `size` and both sides are cropped around the centre to multiples of 16, a square to 4:3; for `size`
    224 the short side becomes 224 and the crop is square.

    Raises:
        BadImage: the image is so elongated that the crop would be empty, or for `size` 224 that the resize would be enormous.
    """
    geometry = _original_geometry(width, height, size)
    (new_width, new_height), (left, top, right, bottom) = geometry
    if left == right or top == bottom or new_width * new_height > MAX_PIXELS:
        # The largest whole ratio that is taken: the short side, which the resize rounds, has to become a patch at least.
        most = MAX_PIXELS // size**2 if size == 224 else int(size / (PATCH - 0.5))
        raise BadImage(f"aspect ratio of {width}x{height} is too extreme", fix=f"crop it to an aspect ratio of at most {most}:1")
    return geometry


def _original_geometry(width: int, height: int, size: int) -> Geometry:
    """As `trained_geometry`, but the crop may be empty."""
    long_side = round(size * max(width / height, height / width)) if size == 224 else size
    longest = max(width, height)
    new_width, new_height = round(width * long_side / longest), round(height * long_side / longest)
    center_x, center_y = new_width // 2, new_height // 2
    if size == 224:
        half_width = half_height = min(center_x, center_y)
    else:
        half_width, half_height = 2 * center_x // PATCH * PATCH // 2, 2 * center_y // PATCH * PATCH // 2
        if new_width == new_height:
            half_height = 3 * half_width // 4
    return (new_width, new_height), (center_x - half_width, center_y - half_height, center_x + half_width, center_y + half_height)


def covering_geometry(width: int, height: int, shape: tuple[int, int]) -> Geometry:
    """The smallest resize that covers the (H, W) `shape`, and its central crop."""
    rows, cols = shape
    scale = max(cols / width, rows / height)
    new_width, new_height = max(cols, round(width * scale)), max(rows, round(height * scale))
    left, top = (new_width - cols) // 2, (new_height - rows) // 2
    return (new_width, new_height), (left, top, left + cols, top + rows)


def _render(image: Image.Image, framing: Framing) -> View:
    resized = image.resize(framing.resized_size, Image.Resampling[framing.filter.upper()])
    return View(np.asarray(resized.crop(framing.crop)), framing)


def to_unit_range(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], rounded as the original does."""
    return np.ascontiguousarray(((rgb.astype(np.float32) / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2), np.float32)


def as_plan_input(images: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Images in the form that a plan takes: uint8 (B, H, W, 3) as bytes, or float32 (B, 3, H, W) in [-1, 1].

    Raises BadInput where a plan takes bytes and float32 pixels are not those of an 8-bit image.
    """
    if images.dtype == dtype:
        return images
    return to_bytes(images) if np.dtype(dtype) == np.uint8 else to_unit_range(images)


def to_bytes(pixels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The inverse of `to_unit_range`. Raises BadInput where the pixels are not those of an 8-bit image."""
    values = (pixels.transpose(0, 2, 3, 1) + 1) * 127.5
    rgb = np.rint(values)
    if not (np.abs(values - rgb) < 0.01).all() or rgb.min() < 0 or rgb.max() > 255:
        raise BadInput(
            "this plan takes 8-bit images, and these float32 pixels are not x / 127.5 - 1 of any",
            fix="give the image itself to match() or encode(), or use a plan for CPUs",
        )
    return rgb.astype(np.uint8)


def load_image(path: ImageSource, size: int = 512, exif: ExifChoice = "apply") -> NDArray[np.float32]:
    """Load an image exactly as the original MASt3R does.

    Args:
        path: whatever `open_image` takes.
        size: the long side in pixels (for 224: the short side of a square crop).
        exif: "apply" or "ignore" the EXIF orientation.

    Returns:
        float32 (3, H, W) in [-1, 1], RGB, H and W multiples of 16.

    Raises:
        InputMissing, BadImage: as `open_image`; BadImage also for an extreme aspect ratio.
    """
    image = open_image(path, exif)
    return _render(image, Framing(image.size, *trained_geometry(*image.size, size), exif)).pixels


def load_view(source: ImageSource, shapes: Sequence[tuple[int, int]], exif: ExifChoice = "apply") -> View:
    """Load an image for a plan that takes the given (H, W) input shapes. Raises as `load_framed`."""
    image = open_image(source, exif)
    return _render(image, _framing(image.size, shapes, exif))


def load_framed(source: ImageSource, shapes: Sequence[tuple[int, int]], exif: ExifChoice = "apply") -> FramedImage:
    """As `load_view`, with the resize and the crop left to do, as `smc.exported.resampling` says.

    Raises:
        InputMissing, BadImage: as `load_image`.
    """
    _check_exif(exif)
    rgb = _from_array(source) if isinstance(source, np.ndarray) else np.asarray(open_image(source, exif))
    height, width, _ = rgb.shape
    return FramedImage(rgb, _framing((width, height), shapes, exif))


def _framing(size: tuple[int, int], shapes: Sequence[tuple[int, int]], exif: ExifChoice) -> Framing:
    """How an image of (width, height) becomes one of the (H, W) input shapes.

    If the original's own resize and crop gives one of the shapes, that is done. Otherwise the image is scaled to cover the
    shape that keeps most of it, and cropped around its centre. Raises BadImage for an extreme aspect ratio.
    """
    for shape in sorted(shapes, key=lambda s: -s[0] * s[1]):
        left, top, right, bottom = _original_geometry(*size, max(shape))[1]
        if (bottom - top, right - left) == shape:
            return Framing(size, *trained_geometry(*size, max(shape)), exif)
    trained_geometry(*size, 512)  # refuses aspect ratios of which a crop would keep next to nothing
    coverings = [covering_geometry(*size, shape) for shape in shapes]

    def kept_area(geometry: Geometry) -> tuple[float, int]:
        (width, height), (left, top, right, bottom) = geometry
        area = (right - left) * (bottom - top)
        return round(area / (width * height), 3), area  # of shapes that keep as much, the larger

    return Framing(size, *max(coverings, key=kept_area), exif)
