"""A loaded bundle: the network's outputs, matches in pixels of the images, and how it holds up."""

from __future__ import annotations

import ctypes
import gc
import io
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image

import smc
from smc.exported.images import load_view
from tests.conformance import case_images, load_case, relative_error

LIMIT = 2e-5
"""What two correct float32 implementations stay below, by the conformance data's README."""

MAP_SHAPES = {"pts3d": (3,), "conf": (), "desc": (24,), "desc_conf": ()}
"""The last axes of each map, beside (H, W)."""


@pytest.fixture(scope="session")
def pair(examples: Path) -> tuple[Path, Path]:
    return examples / "graf1.png", examples / "graf3.png"


@pytest.fixture(scope="session")
def features(tiny_matcher: smc.Matcher, pair: tuple[Path, Path]) -> tuple[smc.Features, smc.Features]:
    return tiny_matcher.encode(pair[0]), tiny_matcher.encode(pair[1])


def same(one: smc.Matches, other: smc.Matches) -> bool:
    """Equal in every bit."""
    first, second = one.arrays(), other.arrays()
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def check(matches: smc.Matches) -> None:
    """What any result must be: whole, finite, and inside its images."""
    count = len(matches)
    assert matches.confidence.shape == (count,)
    assert matches.confidence.dtype == np.float32
    assert np.isfinite(matches.confidence).all()
    for keypoints, size in ((matches.keypoints0, matches.image_size0), (matches.keypoints1, matches.image_size1)):
        assert keypoints.shape == (count, 2)
        assert keypoints.dtype == np.float32
        assert (keypoints > -0.5).all()
        assert (keypoints < np.array(size) - 0.5).all()
    for points in (matches.points0, matches.points1):
        if points is not None:
            assert points.shape == (count, 3)
            assert points.dtype == np.float32
            assert np.isfinite(points).all()


# --- the network alone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_landscape", "tiny_portrait_mixed"])
def test_maps_are_those_of_the_original(tiny_matcher: smc.Matcher, name: str) -> None:
    case = load_case(name)
    views = case_images(case)
    maps = tiny_matcher.infer(*views)
    assert maps.keys() == {f"{output}{view}" for output in MAP_SHAPES for view in (1, 2)}
    stride = int(case["stride"])
    for output, last in MAP_SHAPES.items():
        for number, view in enumerate(views, 1):
            value = maps[f"{output}{number}"]
            assert value.shape == (*view.shape[2:], *last)
            assert value.dtype == np.float32
            assert relative_error(value[::stride, ::stride], case[f"{output}{number}"]) < LIMIT, f"{output}{number}"
    for number in (1, 2):
        np.testing.assert_allclose(np.linalg.norm(maps[f"desc{number}"], axis=2), 1, atol=1e-5)


def test_maps_do_not_depend_on_the_layout_of_the_views(tiny_matcher: smc.Matcher) -> None:
    view = case_images(load_case("tiny_landscape"))[0]
    wanted = tiny_matcher.infer(view, view)
    for other in (np.asfortranarray(view), view[..., ::-1].copy()[..., ::-1]):
        found = tiny_matcher.infer(other, view)
        assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("view", "message", "fix"),
    [
        (np.zeros((1, 3, 96, 128)), "float64", ""),
        (np.zeros((1, 3, 96, 128), np.uint8), "uint8", ""),
        (np.zeros((3, 96, 128), np.float32), r"\(3, 96, 128\)", ""),
        (np.zeros((2, 3, 96, 128), np.float32), r"\(2, 3, 96, 128\)", ""),
        (np.zeros((1, 4, 96, 128), np.float32), r"\(1, 4, 96, 128\)", ""),
        (np.zeros((1, 96, 128, 3), np.float32), r"\(1, 96, 128, 3\)", ""),
        (np.zeros((1, 3, 112, 112), np.float32), "128x96, 96x128, 112x80", "--shape 112x112"),
        (np.zeros((1, 3, 112, 80), np.float32), "a view of 80x112", "--shape 80x112"),
        (np.zeros((1, 3, 90, 128), np.float32), "a view of 128x90", "--shape 128x90"),
        (np.zeros((1, 3, 0, 0), np.float32), "a view of 0x0", "--shape"),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_other_views_are_refused(tiny_matcher: smc.Matcher, view: NDArray[Any], message: str, fix: str, position: int) -> None:
    views = [np.zeros((1, 3, 96, 128), np.float32)] * 2
    views[position] = view
    with pytest.raises(smc.BadInput, match=message) as caught:
        tiny_matcher.infer(*views)
    assert fix in caught.value.fix


def test_maps_stay_on_the_device_only_where_there_is_one(tiny_matcher: smc.Matcher) -> None:
    view = np.zeros((1, 3, 96, 128), np.float32)
    with pytest.raises(smc.UsageError, match="maps of onnxruntime plans come to the host") as caught:
        tiny_matcher.infer(view, view, on_device=True)
    assert "--backend cuda" in caught.value.fix


# --- matches -----------------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same(tiny_matcher: smc.Matcher, pair: tuple[Path, Path]) -> None:
    images = [Image.open(path) for path in pair]
    wanted = tiny_matcher.match(*pair, points3d=True)
    check(wanted)
    assert len(wanted) > 20
    assert wanted.image_size0 == wanted.image_size1 == (800, 640)
    for sources in (list(map(str, pair)), images, [np.asarray(image) for image in images], [pair[0], images[1]]):
        assert same(tiny_matcher.match(*sources, points3d=True), wanted)
    for image in images:
        image.close()


@pytest.mark.parametrize(
    "options",
    [{}, {"subsample": 4}, {"pixel_tol": 5}, {"both_ways": True}, {"border": 3, "min_confidence": 1.2, "points3d": True}],
    ids=lambda options: ", ".join(options) or "defaults",
)
def test_match_is_encoding_and_matching(
    tiny_matcher: smc.Matcher, pair: tuple[Path, Path], features: tuple[smc.Features, smc.Features], options: dict[str, Any]
) -> None:
    matches = tiny_matcher.match_features(*features, **options)
    check(matches)
    assert len(matches)
    assert same(matches, tiny_matcher.match(*pair, **options))


def test_an_image_is_encoded_once_for_many_pairs(
    tiny_matcher: smc.Matcher, pair: tuple[Path, Path], features: tuple[smc.Features, smc.Features]
) -> None:
    first, second = features
    portrait = tiny_matcher.encode(Image.open(pair[1]).crop((0, 0, 480, 640)))
    before = np.copy(first.tokens)
    for other in (second, first, portrait, second):
        check(tiny_matcher.match_features(first, other))
    assert same(tiny_matcher.match_features(first, second), tiny_matcher.match(*pair))
    np.testing.assert_array_equal(first.tokens, before)


def test_matches_are_those_of_the_maps(
    tiny_matcher: smc.Matcher, pair: tuple[Path, Path], features: tuple[smc.Features, smc.Features]
) -> None:
    maps = tiny_matcher.infer(*(load_view(path, tiny_matcher.manifest.input_shapes).pixels[None] for path in pair))
    xy0, xy1 = smc.fast_reciprocal_nn(maps["desc1"], maps["desc2"])
    matches = tiny_matcher.match_features(*features, points3d=True)
    np.testing.assert_array_equal(matches.keypoints0, features[0].framing.to_image(xy0))
    np.testing.assert_array_equal(matches.keypoints1, features[1].framing.to_image(xy1))
    np.testing.assert_array_equal(matches.points0, maps["pts3d1"][xy0[:, 1], xy0[:, 0]])
    np.testing.assert_array_equal(matches.points1, maps["pts3d2"][xy1[:, 1], xy1[:, 0]])
    confidence = np.minimum(maps["desc_conf1"][xy0[:, 1], xy0[:, 0]], maps["desc_conf2"][xy1[:, 1], xy1[:, 0]])
    np.testing.assert_array_equal(matches.confidence, confidence)


def rows(matches: smc.Matches) -> set[tuple[float, ...]]:
    return {tuple(row) for row in np.column_stack([matches.keypoints0, matches.keypoints1, matches.confidence]).tolist()}


def test_options_choose_among_the_matches(tiny_matcher: smc.Matcher, features: tuple[smc.Features, smc.Features]) -> None:
    everything = tiny_matcher.match_features(*features, 4)
    assert everything.points0 is None
    assert everything.points1 is None

    middle = float(np.median(everything.confidence))
    confident = tiny_matcher.match_features(*features, 4, min_confidence=middle)
    assert rows(confident) == {row for row in rows(everything) if row[-1] >= np.float32(middle)}
    assert 0 < len(confident) < len(everything)

    inner = tiny_matcher.match_features(*features, 4, border=10)
    left, top = features[0].framing.to_image(np.array([[10, 10]]))[0]
    right, bottom = features[0].framing.to_image(np.array([[117, 85]]))[0]

    def inside(x: float, y: float) -> bool:
        return bool(left <= x <= right and top <= y <= bottom)

    assert rows(inner) == {row for row in rows(everything) if inside(*row[:2]) and inside(*row[2:4])}
    assert 0 < len(inner) < len(everything)

    assert rows(everything) <= rows(tiny_matcher.match_features(*features, 4, both_ways=True))
    assert len(tiny_matcher.match_features(*features, 4)) > len(tiny_matcher.match_features(*features, 8))


NOTHING: list[dict[str, Any]] = [{"subsample": 1000}, {"border": 1000}, {"min_confidence": 1e9}, {"subsample": 1000, "both_ways": True}]


@pytest.mark.parametrize("options", NOTHING)
def test_no_matches_have_their_shapes(
    tiny_matcher: smc.Matcher, features: tuple[smc.Features, smc.Features], options: dict[str, Any]
) -> None:
    matches = tiny_matcher.match_features(*features, points3d=True, **options)
    check(matches)
    assert len(matches) == 0
    assert matches.keypoints0.shape == (0, 2)
    assert matches.points1 is not None
    assert matches.points1.shape == (0, 3)


class NoEngine:
    """An engine that must not be used."""

    def encode(self, images: Any) -> Any:
        pytest.fail("the encoder ran")

    def decode(self, features1: Any, features2: Any) -> Any:
        pytest.fail("the decoder ran")


NAN = float("nan")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"both_ways": True, "pixel_tol": 3}, "choose one"),
        ({"subsample": 0}, "subsample must be a whole number from 1 to 65536, found 0"),
        ({"subsample": 2.5}, "whole number"),
        ({"subsample": 0, "both_ways": True}, "whole number"),
        ({"pixel_tol": -1}, "pixel_tol must be 0 or more, found -1"),
        ({"pixel_tol": NAN}, "0 or more"),
        ({"pixel_tol": -1, "both_ways": True}, "0 or more"),
        ({"pixel_tol": NAN, "both_ways": True}, "0 or more"),
        ({"border": -1}, "border must be 0 or more, found -1"),
        ({"border": NAN}, "0 or more"),
        ({"min_confidence": NAN}, "min_confidence must be a number, found nan"),
    ],
)
def test_bad_options_are_refused_before_the_network_runs(
    tiny_matcher: smc.Matcher, features: tuple[smc.Features, smc.Features], options: dict[str, Any], message: str
) -> None:
    matcher = smc.Matcher(NoEngine(), tiny_matcher.manifest)
    with pytest.raises(smc.UsageError, match=message):
        matcher.match_features(*features, **options)
    with pytest.raises(smc.UsageError, match=message):
        matcher.match("absent.png", "absent.png", **options)


@pytest.mark.parametrize(
    ("source", "error"),
    [("none.png", smc.InputMissing), (".", smc.InputMissing), (__file__, smc.BadImage), (np.zeros((4, 4), np.float32), smc.BadImage)],
)
def test_bad_images_are_refused(tiny_matcher: smc.Matcher, pair: tuple[Path, Path], source: Any, error: type[smc.SmcError]) -> None:
    with pytest.raises(error):
        tiny_matcher.match(pair[0], source)
    with pytest.raises(error):
        tiny_matcher.match(source, pair[0])


def test_frames_are_not_mixed(tiny_matcher: smc.Matcher, features: tuple[smc.Features, smc.Features]) -> None:
    first, second = features
    with pytest.raises(smc.BadInput, match=r"'apply'.*'ignore'"):
        tiny_matcher.match_features(first, replace(second, framing=replace(second.framing, exif="ignore")))
    with pytest.raises(smc.UsageError, match="'apply' or 'ignore'"):
        tiny_matcher.encode(np.zeros((96, 128), np.uint8), exif="Ignore")  # type: ignore[arg-type]


def test_keypoints_are_in_the_declared_frame(tiny_matcher: smc.Matcher, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A photograph stored lying on its side gives the upright one's matches, or those of its pixels as stored."""
    with Image.open(pair[0]) as image:
        upright = image.convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / "lying.png", exif=exif)
    applied = tiny_matcher.match(tmp_path / "lying.png", pair[1])
    ignored = tiny_matcher.match(tmp_path / "lying.png", pair[1], exif="ignore")
    assert (applied.exif, applied.image_size0) == ("apply", upright.size)
    assert (ignored.exif, ignored.image_size0) == ("ignore", stored.size)
    assert same(applied, tiny_matcher.match(upright, pair[1]))
    assert same(ignored, tiny_matcher.match(np.asarray(stored), pair[1], exif="ignore"))


# --- unusual images ----------------------------------------------------------------------------------------------------------

TEXTURED = np.random.RandomState(0).randint(0, 256, (96, 128, 3)).astype(np.uint8)
UNUSUAL: dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]] = {
    "identical": (TEXTURED, TEXTURED),
    "no texture": (np.full((96, 128), 127, np.uint8), np.full((96, 128), 127, np.uint8)),
    "black and white": (np.zeros((96, 128), np.uint8), np.full((96, 128), 255, np.uint8)),
    "texture and none": (TEXTURED, np.zeros((96, 128), np.uint8)),
    "noise": (TEXTURED, TEXTURED[::-1, ::-1]),
    "landscape and portrait": (TEXTURED, np.rot90(TEXTURED)),
    "two portraits": (np.rot90(TEXTURED), np.rot90(TEXTURED, -1)),
    "one pixel": (np.zeros((1, 1), np.uint8), TEXTURED),
    "large and small": (np.repeat(np.repeat(TEXTURED, 10, axis=0), 10, axis=1), TEXTURED[:48, :64]),
}


@pytest.mark.parametrize("options", [{}, {"both_ways": True}, {"pixel_tol": 5}], ids=["walk", "both ways", "tolerance"])
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_images(tiny_matcher: smc.Matcher, name: str, options: dict[str, Any]) -> None:
    image0, image1 = UNUSUAL[name]
    for sources in ((image0, image1), (image1, image0)):
        matches = tiny_matcher.match(*sources, points3d=True, **options)
        check(matches)
        assert matches.image_size0 == sources[0].shape[1::-1]
        assert matches.image_size1 == sources[1].shape[1::-1]


@pytest.mark.parametrize(("size", "kept"), [((800, 600), None), ((600, 800), None), ((1600, 400), "35%"), ((400, 1600), "33%")])
def test_it_warns_where_little_of_an_image_is_kept(tiny_matcher: smc.Matcher, size: tuple[int, int], kept: str | None) -> None:
    image = Image.new("L", size)
    if kept is None:
        tiny_matcher.encode(image)  # a warning would fail the test
    else:
        with pytest.warns(UserWarning, match=f"{kept} of a {size[0]}x{size[1]} image; build it with a --shape"):
            tiny_matcher.encode(image)


def test_of_two_bad_images_the_first_is_reported(tiny_matcher: smc.Matcher, examples: Path, tmp_path: Path) -> None:
    good, bad, worse = examples / "graf1.png", tmp_path / "absent.png", tmp_path / "text.png"
    worse.write_text("no image")
    for pair, error, name in (
        ((bad, worse), smc.InputMissing, bad),
        ((good, worse), smc.BadImage, worse),
        ((worse, bad), smc.BadImage, worse),
    ):
        with pytest.raises(error, match=name.name):
            tiny_matcher.match(*pair)


def test_images_loaded_at_once_are_those_loaded_one_by_one(tiny_matcher: smc.Matcher, examples: Path) -> None:
    sources = [examples / "graf1.png", Image.open(examples / "graf3.png"), np.asarray(Image.open(examples / "graf3.png"))]
    for pair in itertools.product(sources, repeat=2):
        matches = tiny_matcher.match(*pair)
        alone = tiny_matcher.match_features(*(tiny_matcher.encode(image) for image in pair))
        np.testing.assert_array_equal(matches.keypoints1, alone.keypoints1)
        assert (matches.image_size0, matches.image_size1) == (alone.image_size0, alone.image_size1)


def test_no_image_is_read_any_more_when_match_raises(tiny_matcher: smc.Matcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be an image of the caller's, who goes on to use it."""
    image, loads = Image.new("L", (800, 600)), []

    def load_slowly() -> None:
        time.sleep(0.2)
        loads.append(image)

    monkeypatch.setattr(image, "load", load_slowly)
    with pytest.raises(smc.InputMissing):
        tiny_matcher.match("absent.png", image)
    assert loads


def test_images_that_share_a_file_are_read_one_after_the_other(tiny_matcher: smc.Matcher, examples: Path) -> None:
    file = io.BytesIO((examples / "graf1.png").read_bytes())
    alone = tiny_matcher.match(examples / "graf1.png", examples / "graf1.png")
    for _ in range(3):
        matches = tiny_matcher.match(Image.open(file), Image.open(file))  # Pillow reads an image's pixels when they are first asked for
        np.testing.assert_array_equal(matches.keypoints1, alone.keypoints1)


def test_a_warning_is_about_the_callers_line(tiny_matcher: smc.Matcher) -> None:
    image = Image.new("L", (1600, 400))
    for call in (lambda: tiny_matcher.encode(image), lambda: tiny_matcher.match(image, image)):
        with pytest.warns(UserWarning, match="of a 1600x400 image") as caught:
            call()
        assert {warning.filename for warning in caught} == {__file__}


# --- results -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points3d", [False, True])
def test_arrays_are_read_back_without_pickle(
    tiny_matcher: smc.Matcher, features: tuple[smc.Features, smc.Features], points3d: bool, tmp_path: Path
) -> None:
    matches = tiny_matcher.match_features(*features, points3d=points3d)
    np.savez(tmp_path / "matches.npz", **matches.arrays())
    with np.load(tmp_path / "matches.npz", allow_pickle=False) as saved:
        assert set(saved) == {name for name, value in vars(matches).items() if value is not None}
        assert ("points0" in saved) == points3d
        np.testing.assert_array_equal(saved["keypoints0"], matches.keypoints0)
        np.testing.assert_array_equal(saved["confidence"], matches.confidence)
        assert saved["image_size0"].tolist() == list(matches.image_size0)
        assert str(saved["exif"]) == "apply"


# --- holding up --------------------------------------------------------------------------------------------------------------


def test_threads_give_the_same_bits_as_one_after_another(tiny_matcher: smc.Matcher, pair: tuple[Path, Path]) -> None:
    random = np.random.RandomState(1)
    images: list[Any] = [pair[0], *(random.randint(0, 256, (*shape, 3)).astype(np.uint8) for shape in ((128, 96), (80, 112)))]
    jobs = [(one, other) for one in images for other in images]

    def run(job: tuple[Any, Any]) -> smc.Matches:
        return tiny_matcher.match(*job, points3d=True)

    in_series = list(map(run, jobs))
    with ThreadPoolExecutor(8) as pool:
        at_once = list(pool.map(run, jobs * 2))
    assert len(at_once) == 2 * len(in_series) == 18
    assert all(same(one, other) for one, other in zip(in_series * 2, at_once, strict=True))


def test_number_of_threads(tiny_bundle: Path, tiny_matcher: smc.Matcher, pair: tuple[Path, Path]) -> None:
    check(smc.load(tiny_bundle, threads=1).match(*pair))
    for threads in (0, -1):
        with pytest.raises(smc.UsageError, match=f"threads is {threads}"):
            smc.load(tiny_bundle, threads=threads)


@pytest.fixture
def memory() -> Callable[[], float]:
    """The memory in use, MiB, without what the allocator holds back for later."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)
    process = psutil.Process()

    def measure() -> float:
        gc.collect()
        trim(0)
        return float(process.memory_info().rss) / 2**20

    return measure


def test_loading_again_and_again_takes_no_more_memory(tiny_bundle: Path, memory: Callable[[], float]) -> None:
    def growth(cycles: int) -> float:
        before = memory()
        for _ in range(cycles):
            smc.load(tiny_bundle, threads=1)
        return memory() - before

    growth(3)
    assert growth(9) < 5  # its weights are 190 MiB


def test_matching_again_and_again_takes_no_more_memory(
    tiny_matcher: smc.Matcher, pair: tuple[Path, Path], memory: Callable[[], float]
) -> None:
    def growth(cycles: int) -> float:
        before = memory()
        for _ in range(cycles):
            tiny_matcher.match(*pair, points3d=True)
        return memory() - before

    growth(3)
    assert growth(12) < 5  # the maps of one pair are 3 MiB
