"""Images in, their faults, and coordinates on the way back."""

from __future__ import annotations

import os
import random
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from smc.exported.errors import BadImage, InputMissing, UsageError
from smc.exported.images import MAX_PIXELS, ExifChoice, View, load_framed, load_image, load_view, open_image, trained_geometry
from tests.conformance import load_case, make_image

FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Machines may be slow."""

SHAPES = ((96, 128), (128, 96), (80, 112))
ORIENTATION = 0x0112

# --- the original's loader ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", range(7))
def test_loads_as_the_original_does(case: int, tmp_path: Path) -> None:
    arrays = load_case("preprocess")
    width, height, size, seed = map(int, arrays[f"in_{case}"])
    rgb = np.round((make_image(seed, height, width)[0] + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(rgb).save(tmp_path / "image.png")
    found = load_image(tmp_path / "image.png", size)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    assert found.shape == (3, *arrays[f"shape_{case}"])
    np.testing.assert_array_equal(found[:, ::5, ::5], arrays[f"out_{case}"])


# --- faults ------------------------------------------------------------------------------------------------------------------


def noise(mode: str = "RGB", size: tuple[int, int] = (80, 60)) -> Image.Image:
    pixels = np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    return Image.fromarray(pixels).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: bytes) -> bytes:
    """A PNG of raw rows, whatever its header claims."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [b"", b"\0", b"garbage" * 1000, b"<!DOCTYPE html><html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_no_image_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(BadImage, match=r"x\.png") as caught:
        open_image(tmp_path / "x.png")
    assert caught.value.exit_status == 65


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_truncated_file_is_refused(kind: str, fraction: float, tmp_path: Path) -> None:
    data = encoded(noise(), kind)
    path = tmp_path / "cut"
    path.write_bytes(data[: int(fraction * len(data))])
    with pytest.raises(BadImage, match="cut"):
        open_image(path)


def test_truncated_file_that_the_caller_opened_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.jpg").write_bytes(encoded(noise(), "JPEG")[:2000])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(BadImage):
        open_image(image)


def test_damaged_files_raise_nothing_else(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    kinds = ("PNG", "JPEG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "TGA", "DDS", "SGI", "ICO", "PCX")
    whole = [encoded(noise(), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "TIFF", "WEBP") else {})) for kind in kinds]
    rng = random.Random(0)
    path, read = tmp_path / "image", 0
    for _ in range(1500):
        data = bytearray(rng.choice(whole))
        for _ in range(rng.choice((1, 2, 10))):
            data[rng.randrange(min(len(data), rng.choice((64, 400, len(data)))))] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                open_image(path)
                read += 1
            except BadImage:
                pass
    assert 0 < read < 1500


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x010E, 5, struct.pack("<II", 1, 0)), (0x011A, 2, b"72/1\0"), (0x0103, 12, struct.pack("<d", 1.5))],
    ids=["description as a fraction", "resolution as text", "compression as a float"],
)
def test_photograph_with_odd_exif_is_turned_upright(tag: int, kind: int, value: bytes, tmp_path: Path) -> None:
    """Tags of a wrong type, on which `PIL.ImageOps.exif_transpose` fails."""
    entries = [(tag, kind, 1 if kind != 2 else len(value), 38), (ORIENTATION, 3, 1, 6)]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + directory + struct.pack("<I", 0) + value
    (tmp_path / "odd.jpg").write_bytes(encoded(noise(size=(80, 60)), "JPEG", exif=exif))
    assert open_image(tmp_path / "odd.jpg").size == (60, 80)


def test_absent_files_are_told_from_bad_ones(tmp_path: Path) -> None:
    (tmp_path / "loop.png").symlink_to("loop.png")
    for path in (tmp_path / "none.png", tmp_path, tmp_path / "loop.png", tmp_path / ("n" * 300), "nul\0.png"):
        with pytest.raises(InputMissing) as caught:
            open_image(path)
        assert caught.value.exit_status == 66


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "secret.png"
    path.write_bytes(encoded(noise(), "PNG"))
    path.chmod(0)
    with pytest.raises(InputMissing, match="Permission denied"):
        open_image(path)


@pytest.mark.parametrize("warning", ["error", "ignore"])
@pytest.mark.parametrize(("width", "height"), [(10_000, 9_000), (1, MAX_PIXELS + 1), (50_000, 50_000)])
def test_image_over_the_cap_is_refused_before_it_is_decoded(
    width: int, height: int, warning: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 2, b"\0" * 1000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with warnings.catch_warnings():
        warnings.simplefilter(warning)  # type: ignore[arg-type]
        with pytest.raises(BadImage, match="over the limit of"):
            open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("source", [Image.new("1", (10_000, 9_000)), np.broadcast_to(np.uint8(0), (10_000, 9_000))])
def test_objects_over_the_cap_are_refused(source: Any) -> None:
    with pytest.raises(BadImage, match="over the limit of"):
        open_image(source)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_image_without_pixels_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(BadImage, match="no pixels"):
        load_image(Image.new("RGB", size))


def test_drawings_are_not_handed_to_another_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *args, **kwargs: pytest.fail("started Ghostscript"))
    (tmp_path / "photo.png").write_bytes(encoded(noise(), "EPS"))
    with pytest.raises(BadImage, match="drawing"):
        open_image(tmp_path / "photo.png")


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (16, 500)])
def test_smallest_images_work(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (255, 0, 51))
    pixels = load_view(image, SHAPES).pixels
    assert pixels.shape[1:] in SHAPES
    np.testing.assert_allclose(pixels[:, 40, 40], [1, -1, -0.6], atol=1e-6)


EXTREME: list[tuple[Callable[[Image.Image], Any], str]] = [
    (load_image, "at most 33:1"),
    (lambda image: load_image(image, 128), "at most 8:1"),
    (lambda image: load_image(image, 224), "at most 1783:1"),
    (lambda image: load_view(image, SHAPES), "at most 33:1"),
    (lambda image: load_view(image, [(224, 224)]), "at most 1783:1"),  # whose geometry is a resize to 2,240,000 by 224 pixels
]


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000)])
@pytest.mark.parametrize(("load", "fix"), EXTREME)
def test_extreme_aspect_ratio_is_refused(size: tuple[int, int], load: Callable[[Image.Image], Any], fix: str) -> None:
    with pytest.raises(BadImage, match=f"aspect ratio of {size[0]}x{size[1]} is too extreme$") as caught:
        load(Image.new("L", size))
    assert caught.value.fix.endswith(fix)


@pytest.mark.parametrize("size", [128, 224, 512])
def test_the_ratio_that_is_advised_is_the_largest_that_is_taken(size: int) -> None:
    with pytest.raises(BadImage) as caught:
        trained_geometry(10_000, 1, size)
    most = int(re.findall(r"(\d+):1$", caught.value.fix)[0])
    for short in (1, 7, 50):
        for width, height in ((most * short, short), (short, most * short)):
            trained_geometry(width, height, size)
        with pytest.raises(BadImage):
            trained_geometry((most + 1) * short, short, size)


@pytest.mark.parametrize("size", [(330, 10), (10, 330)])
def test_as_extreme_as_is_advised_fits_a_small_bundle(size: tuple[int, int]) -> None:
    assert load_view(Image.new("L", size), SHAPES).framing.shape in SHAPES


def test_unknown_frame_is_refused() -> None:
    with pytest.raises(UsageError, match="'apply' or 'ignore'"):
        load_image(noise(), exif="Apply")  # type: ignore[arg-type]


# --- kinds of pixels ---------------------------------------------------------------------------------------------------------

GREY = np.array([[0, 100, 200], [255, 1, 128]], np.uint8)
ALPHA = np.array([[0, 255, 7], [0, 9, 255]], np.uint8)
DEEP = np.array([[0, 257, 25_700], [65_535, 128, 129]], np.uint16)
DEEP_AS_8_BITS = np.array([[0, 1, 100], [255, 0, 1]], np.uint8)  # a 257th, rounded
COLORS = np.array([[[10, 20, 30], [255, 0, 0]], [[0, 255, 7], [1, 2, 3]]], np.uint8)


def three(grey: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.repeat(grey[:, :, None], 3, axis=2)


def palette_image() -> Image.Image:
    image = Image.new("P", (2, 2))
    image.putdata([0, 1, 2, 3])
    image.putpalette(COLORS.reshape(-1).tolist())
    return image


def with_alpha(image: Image.Image, alpha: NDArray[np.uint8]) -> Image.Image:
    image.putalpha(Image.fromarray(alpha))
    return image


def cmyk(*pixel: int) -> Image.Image:
    return Image.new("CMYK", (2, 1), pixel)


KINDS: dict[str, tuple[bytes, NDArray[np.uint8]]] = {
    "grey": (encoded(Image.fromarray(GREY), "PNG"), three(GREY)),
    "grey and alpha": (encoded(with_alpha(Image.fromarray(GREY), ALPHA), "PNG"), three(GREY)),
    "grey, one transparent": (encoded(Image.fromarray(GREY), "PNG", transparency=100), three(GREY)),
    "RGB": (encoded(Image.fromarray(COLORS), "PNG"), COLORS),
    "RGB and alpha": (encoded(with_alpha(Image.fromarray(COLORS), ALPHA[:, :2]), "PNG"), COLORS),
    "RGB, one transparent": (encoded(Image.fromarray(COLORS), "PNG", transparency=(255, 0, 0)), COLORS),
    "palette": (encoded(palette_image(), "PNG"), COLORS),
    "palette, one transparent": (encoded(palette_image(), "PNG", transparency=2), COLORS),
    "palette, several transparent": (encoded(palette_image(), "PNG", transparency=bytes([0, 128, 255, 0])), COLORS),
    "palette, GIF": (encoded(palette_image(), "GIF", transparency=2), COLORS),
    "1 bit": (encoded(Image.fromarray(GREY > 99), "PNG"), three(np.where(GREY > 99, 255, 0).astype(np.uint8))),
    "CMYK, no ink": (encoded(cmyk(0, 0, 0, 0), "TIFF"), np.full((1, 2, 3), 255, np.uint8)),
    "CMYK, black": (encoded(cmyk(0, 0, 0, 255), "TIFF"), np.zeros((1, 2, 3), np.uint8)),
    "CMYK, cyan": (encoded(cmyk(255, 0, 0, 0), "TIFF"), np.tile(np.array([0, 255, 255], np.uint8), (1, 2, 1))),
    "CMYK JPEG, no ink": (encoded(cmyk(0, 0, 0, 0), "JPEG"), np.full((1, 2, 3), 255, np.uint8)),
    "16-bit grey PNG": (encoded(Image.fromarray(DEEP), "PNG"), three(DEEP_AS_8_BITS)),
    "16-bit grey TIFF": (encoded(Image.fromarray(DEEP), "TIFF"), three(DEEP_AS_8_BITS)),
    "16-bit grey TIFF, big-endian": (encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), three(DEEP_AS_8_BITS)),
    "32-bit grey TIFF": (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), three(DEEP_AS_8_BITS)),
    "16-bit RGB PNG": (png(1, 1, 16, 2, struct.pack(">xHHH", 65_535, 257, 25_700)), np.array([[[255, 1, 100]]], np.uint8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixel_becomes_8_bit_rgb(kind: str, tmp_path: Path) -> None:
    data, wanted = KINDS[kind]
    (tmp_path / "image").write_bytes(data)
    from_path = open_image(tmp_path / "image")
    with Image.open(BytesIO(data)) as opened:
        from_object = open_image(opened)
    for image in (from_path, from_object):
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), wanted)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "LA", "PA", "I", "I;16", "I;16B"])
def test_every_mode_of_pillow_is_taken(mode: str) -> None:
    assert open_image(Image.new(mode, (4, 3))).size == (4, 3)


@pytest.mark.parametrize("source", ["file", "object"])
def test_floating_point_pixels_are_refused(source: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.ones((4, 4), np.float32))
    image.save(tmp_path / "float.tiff")
    with pytest.raises(BadImage, match="floating-point"):
        open_image(tmp_path / "float.tiff" if source == "file" else image)


def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    assert open_image(tmp_path / "moving.gif").getpixel((3, 3)) == (255, 0, 0)


def test_the_callers_image_is_left_as_it_is() -> None:
    image = noise("P")
    before = image.tobytes()
    open_image(image)
    assert (image.mode, image.tobytes()) == ("P", before)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_arrays(dtype: type[np.generic], channels: int | None) -> None:
    grid = np.random.RandomState(0).randint(0, 256, (5, 7) if channels is None else (5, 7, channels))
    array = (grid * (257 if dtype is np.uint16 else 1)).astype(dtype)
    wanted = grid[..., :3] if channels in (3, 4) else np.repeat(grid.reshape(5, 7, 1), 3, axis=2)
    for layout in (array, array[::-1][::-1], np.asfortranarray(array)):
        np.testing.assert_array_equal(np.asarray(open_image(layout)), wanted)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int8, np.uint32, bool, complex, object])
def test_array_of_another_type_is_refused(dtype: type) -> None:
    with pytest.raises(BadImage, match="uint8 or uint16"):
        open_image(np.zeros((4, 4, 3), dtype))


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3), (0, 4), (4, 0, 3), (4, 4, 0)])
def test_array_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadImage):
        open_image(np.zeros(shape, np.uint8))


# --- frames and coordinates --------------------------------------------------------------------------------------------------

AS_STORED: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda shown: shown,
    2: lambda shown: shown[:, ::-1],
    3: lambda shown: shown[::-1, ::-1],
    4: lambda shown: shown[::-1],
    5: lambda shown: shown.swapaxes(0, 1),
    6: lambda shown: np.rot90(shown),
    7: lambda shown: shown[::-1, ::-1].swapaxes(0, 1),
    8: lambda shown: np.rot90(shown, -1),
}
"""By EXIF orientation: how the pixels of an upright image lie in the file."""


def brightest(view: View) -> NDArray[np.float32]:
    """Image coordinates of a bright dot, the centroid of its network pixels."""
    weight = view.pixels[0] + 1
    y, x = np.indices(weight.shape)
    return view.framing.to_image(np.array([[np.average(x, weights=weight), np.average(y, weights=weight)]]))[0]


@pytest.mark.parametrize("deep", [False, True], ids=["8 bits", "16 bits"])
@pytest.mark.parametrize("orientation", AS_STORED)
def test_coordinates_are_in_the_declared_frame(orientation: int, deep: bool, tmp_path: Path) -> None:
    shown = np.zeros((128, 192), np.uint16 if deep else np.uint8)
    shown[30:34, 150:154] = np.iinfo(shown.dtype).max  # a dot around x 151.5, y 31.5
    stored = np.ascontiguousarray(AS_STORED[orientation](shown))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "dot.png", exif=exif)

    upright = load_view(tmp_path / "dot.png", [(64, 96), (96, 64)], "apply")
    assert (upright.framing.exif, upright.framing.image_size, upright.framing.shape) == ("apply", (192, 128), (64, 96))
    np.testing.assert_allclose(brightest(upright), [151.5, 31.5], atol=0.3)

    as_is = load_view(tmp_path / "dot.png", [(64, 96), (96, 64)], "ignore")
    assert (as_is.framing.exif, as_is.framing.image_size) == ("ignore", stored.shape[::-1])
    rows, cols = np.nonzero(stored)
    np.testing.assert_allclose(brightest(as_is), [cols.mean(), rows.mean()], atol=0.3)

    with Image.open(tmp_path / "dot.png") as image:
        np.testing.assert_array_equal(load_view(image, [(64, 96), (96, 64)]).pixels, upright.pixels)


FORMATS: dict[str, dict[str, Any]] = {
    "PNG": {},
    "JPEG": {},
    "MPO": {},
    "WEBP": {},
    "AVIF": {},
    "TIFF": {},
    "TIFF, LZW": {"compression": "tiff_lzw"},
    "TIFF, JPEG": {"compression": "jpeg"},
    "TIFF of two frames": {"save_all": True, "append_images": [Image.new("RGB", (8, 8))]},
}
"""Every format in which Pillow writes an orientation, and what it is told to."""

SHOWN = np.zeros((96, 128, 3), np.uint8)
SHOWN[:48, :64], SHOWN[:48, 64:], SHOWN[48:, :64] = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def turned_file(kind: str, orientation: int) -> bytes:
    """`SHOWN` as stored under an EXIF orientation."""
    name = kind.partition(",")[0].partition(" ")[0]
    Image.init()
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {name}")
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored = np.ascontiguousarray(AS_STORED[orientation](SHOWN))
    return encoded(Image.fromarray(stored), name, exif=exif, **FORMATS[kind])


def check_frame(image: Image.Image, orientation: int, exif: ExifChoice) -> None:
    """The image is `SHOWN` in the frame that was asked for, within what its format loses."""
    wanted = SHOWN if exif == "apply" else AS_STORED[orientation](SHOWN)
    assert image.size == wanted.shape[1::-1]
    assert np.abs(np.asarray(image).astype(int) - wanted).mean() < 10


@pytest.mark.parametrize("orientation", AS_STORED)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_is_read_in_the_frame_that_was_asked_for(kind: str, orientation: int, tmp_path: Path) -> None:
    (tmp_path / "turned").write_bytes(turned_file(kind, orientation))
    with Image.open(tmp_path / "turned") as by_name, Image.open(BytesIO((tmp_path / "turned").read_bytes())) as by_bytes:
        for source in (tmp_path / "turned", by_name, by_bytes):
            for exif in ("ignore", "ignore", "apply", "apply", "ignore"):  # one image, whatever it was asked for before
                check_frame(open_image(source, exif), orientation, exif)


@pytest.mark.parametrize("deep", ["<u2", ">u2"])
def test_a_deep_tiff_is_turned_back(deep: str, tmp_path: Path) -> None:
    stored = (257 * np.arange(35)).reshape(5, 7).astype(deep)
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(stored).save(tmp_path / "deep.tiff", exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "deep.tiff", "ignore"))[..., 0], stored // 257)


def test_a_callers_frame_of_a_tiff_is_kept() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    second = Image.fromarray(np.ascontiguousarray(AS_STORED[6](SHOWN)))
    with Image.open(BytesIO(encoded(Image.new("RGB", (8, 8)), "TIFF", save_all=True, append_images=[second], exif=exif))) as image:
        image.seek(1)
        for choice in ("ignore", "apply", "ignore"):
            check_frame(open_image(image, choice), 6, choice)
        assert image.tell() == 1


def test_a_tiff_that_the_caller_has_loaded_is_upright() -> None:
    with Image.open(BytesIO(turned_file("TIFF", 6))) as image:
        image.load()
        for exif in ("apply", "ignore"):
            np.testing.assert_array_equal(np.asarray(open_image(image, exif)), SHOWN)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("images", ["one image", "images of one file"])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "TIFF, LZW"])
def test_threads_read_one_image_alike(kind: str, images: str, exif: ExifChoice) -> None:
    """Pillow reads an image's pixels when they are first asked for."""
    tag = Image.Exif()
    tag[ORIENTATION] = 6
    data = encoded(noise(size=(640, 480)), kind.partition(",")[0], exif=tag, **FORMATS[kind])
    wanted = np.asarray(open_image(Image.open(BytesIO(data)), exif))
    together = threading.Barrier(4)

    def read(image: Image.Image) -> NDArray[np.uint8]:
        together.wait(60)
        return np.asarray(open_image(image, exif))

    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            file = BytesIO(data)
            opened = [Image.open(file)] * 4 if images == "one image" else [Image.open(file) for _ in range(4)]
            for found in pool.map(read, opened):
                np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("orientation", [0, 9, 65_535])
def test_unknown_orientation_changes_nothing(orientation: int) -> None:
    image = noise()
    image.getexif()[ORIENTATION] = orientation
    assert open_image(image).size == (80, 60)


@pytest.mark.parametrize("size", [(640, 480), (480, 640), (500, 500), (333, 517), (100, 75), (1000, 260), (61, 47), (1, 1), (2048, 1367)])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (80, 112), (384, 512), (224, 224)])
def test_every_network_pixel_lies_where_it_is_said_to(size: tuple[int, int], shape: tuple[int, int]) -> None:
    view = load_view(Image.new("L", size), [shape])
    (width, height), (left, top), (rows, cols) = view.framing.resized_size, view.framing.crop[:2], shape
    x, y = np.meshgrid(np.arange(cols), np.arange(rows))
    found = view.framing.to_image(np.stack([x, y], axis=-1).reshape(-1, 2)).reshape(rows, cols, 2)
    assert found.dtype == np.float32
    scale_x, scale_y = size[0] / width, size[1] / height
    np.testing.assert_allclose(found[..., 0], (x + 0.5) * scale_x + left * scale_x - 0.5, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(found[..., 1], (y + 0.5) * scale_y + top * scale_y - 0.5, rtol=1e-6, atol=1e-4)
    assert view.framing.to_image(np.empty((0, 2), np.int64)).shape == (0, 2)


@pytest.mark.parametrize("size", [(640, 480), (300, 451), (90, 61), (509, 509), (1031, 257)])
@pytest.mark.parametrize("shape", [(96, 128), (128, 96), (80, 112), (224, 224)])
def test_pixels_come_from_where_their_coordinates_say(size: tuple[int, int], shape: tuple[int, int]) -> None:
    """A ramp's value is its coordinate, so the resized image itself says where each of its pixels comes from."""
    width, height = size
    ramps = np.zeros((height, width, 3), np.uint8)
    ramps[..., 0] = np.round(np.linspace(0, 255, width))
    ramps[..., 1] = np.round(np.linspace(0, 255, height))[:, None]
    view = load_view(ramps, [shape])
    rows, cols = np.indices(shape)
    inner = (slice(8, -8), slice(8, -8))  # a resize has no neighbours to take beyond the image's edge
    wanted = view.framing.to_image(np.stack([cols[inner], rows[inner]], axis=-1).reshape(-1, 2))
    red, green = (view.pixels[channel][inner].astype(np.float64).ravel() * 127.5 + 127.5 for channel in (0, 1))
    for value, coordinate, side in ((red, wanted[:, 0], width), (green, wanted[:, 1], height)):
        assert abs(np.mean(value * (side - 1) / 255 - coordinate)) < 0.1
        assert np.max(np.abs(value - coordinate * 255 / (side - 1))) < 2


@FUZZ
@given(width=st.integers(1, 400), height=st.integers(1, 400), shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3, unique=True))
def test_views_of_any_size_stay_inside_their_image(width: int, height: int, shapes: list[tuple[int, int]]) -> None:
    if max(width, height) > 32 * min(width, height):
        return
    view = load_view(Image.new("L", (width, height)), shapes)
    rows, cols = view.framing.shape
    assert view.framing.shape in shapes
    assert 0 < view.framing.kept <= 1
    left, top = view.framing.crop[:2]
    assert min(left, top) >= 0
    assert left + cols <= view.framing.resized_size[0]
    assert top + rows <= view.framing.resized_size[1]
    corners = view.framing.to_image(np.array([[0, 0], [cols - 1, 0], [0, rows - 1], [cols - 1, rows - 1]]))
    assert (corners > -0.5).all()
    assert (corners < np.array([width, height]) - 0.5).all()
    center = view.framing.to_image(np.array([[(cols - 1) / 2, (rows - 1) / 2]]))[0]
    step = np.array([width, height]) / np.array(view.framing.resized_size)  # a crop of whole pixels is off centre by half of one
    assert (np.abs(center - (np.array([width, height]) - 1) / 2) <= step).all()


@pytest.mark.parametrize(
    ("size", "long_side", "shape"),
    [
        ((640, 480), 512, (384, 512)),
        ((480, 640), 512, (512, 384)),
        ((700, 700), 512, (384, 512)),
        ((640, 360), 512, (288, 512)),
        ((300, 200), 512, (336, 512)),
        ((640, 480), 128, (96, 128)),
        ((640, 480), 224, (224, 224)),
    ],
)
def test_the_originals_geometry_is_taken_where_a_shape_allows(size: tuple[int, int], long_side: int, shape: tuple[int, int]) -> None:
    others = [(48, 48), (80, 112)] + [(s, 512) for s in (384, 336, 288) if long_side == 512 and s != shape[0]]
    view = load_view(noise(size=size), [*others, shape])
    assert view.framing.shape == shape
    np.testing.assert_array_equal(view.pixels, load_image(noise(size=size), long_side))


def test_of_two_sizes_of_the_originals_the_larger_is_taken() -> None:
    assert load_view(noise(size=(640, 480)), [(96, 128), (384, 512)]).framing.shape == (384, 512)
    assert load_view(noise(size=(640, 480)), [(384, 512), (96, 128)]).framing.shape == (384, 512)


@FUZZ
@given(width=st.integers(20, 400), height=st.integers(20, 400))
def test_otherwise_the_crop_that_keeps_most_is_taken(width: int, height: int) -> None:
    shapes = [(48, 144), (144, 48), (96, 112)]  # none of which the original's own crop ever gives
    view = load_view(Image.new("L", (width, height)), shapes)
    ratios = [width / height * rows / cols for rows, cols in shapes]
    best = max(min(ratio, 1 / ratio) for ratio in ratios)
    assert view.framing.kept == pytest.approx(best, abs=0.02)


@pytest.mark.parametrize("size", [(128, 96), (128, 100), (131, 96), (96, 128), (140, 105), (20, 15)])
def test_framed_images_become_the_same_views(size: tuple[int, int]) -> None:
    """Resized and cropped, only cropped, and neither."""
    image = np.asarray(noise(size=size))
    view, rendered = load_view(image, SHAPES), load_framed(image, SHAPES).render()
    assert rendered.framing == view.framing
    np.testing.assert_array_equal(rendered.rgb, view.rgb)


def test_a_long_image_fits_a_small_bundle() -> None:
    view = load_view(noise(size=(1000, 100)), [(96, 128)])
    assert view.framing.shape == (96, 128)
    assert view.framing.kept < 0.2
