"""An evaluation from top to bottom: data sets, matches, estimates, results."""

from __future__ import annotations

import datetime
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smc.compiler.bench.machine import describe_machine, describe_versions
from smc.compiler.evaluation import estimate
from smc.compiler.evaluation.data import check_kinds
from smc.compiler.evaluation.geometry import (
    corner_error,
    direction_error,
    epipolar_error,
    resize_matrix,
    rotation_error,
    transfer_error,
    transform,
)
from smc.compiler.evaluation.matchers import Correspondences, PairMatcher
from smc.compiler.evaluation.pairs import Floats, HomographyPair, Image, PairSet
from smc.compiler.evaluation.records import SCHEMA, Config, DataConfig, Estimate, Header, PairResult
from smc.compiler.evaluation.results import open_results
from smc.exported.errors import BadInput, UsageError
from smc.exported.images import open_image

PRECISION_PIXELS = (1, 3, 5)

EPIPOLAR = {"epipolar 5e-4": 5e-4, "epipolar 1e-4": 1e-4}
"""Largest epipolar error of a right match: SuperGlue's for ScanNet, and the stricter one that LoFTR has for MegaDepth."""

Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class EvalRequest:
    """What to evaluate.

    Attributes:
        matcher: finds the matches.
        data: data sets, each of another kind.
        out: the file of results; one that the same evaluation has begun is continued.
        limit: pairs to draw from each data set, None for all.
        seed: of that draw, and of the estimator's first draw; its next ones have the next numbers.
        draws: how often everything is estimated from the same matches, with other samples: what one draw finds is partly luck.
        iterations: samples of an estimate, at most.
        pose_threshold: largest epipolar error of an inlier, pixels of the data set's scale.
        homography_threshold: largest distance of an inlier, likewise.

    Raises UsageError for a number that is out of range.
    """

    matcher: PairMatcher
    data: Sequence[PairSet]
    out: Path
    limit: int | None = None
    seed: int = 0
    draws: int = 1
    iterations: int = estimate.ITERATIONS
    pose_threshold: float = 1.0
    homography_threshold: float = 3.0

    def __post_init__(self) -> None:
        if self.draws < 1 or self.iterations < 1:
            raise UsageError(f"{self.draws} draws of {self.iterations} iterations: at least 1 of each")
        if not 0 <= self.seed <= estimate.LARGEST_SEED - (self.draws - 1):
            raise UsageError(f"seed {self.seed} with {self.draws} draws: seeds are from 0 to 2^64 - 1, and every draw takes the next one")
        for name in ("pose_threshold", "homography_threshold"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise UsageError(f"{name} is {value}: a finite number of pixels above 0 was expected")


@dataclass(frozen=True)
class Evaluation:
    """The lines of all pairs asked for, and how many of them an earlier run had made."""

    header: Header
    rows: list[PairResult]
    continued: int


def evaluate(request: EvalRequest, report: Progress = lambda description, fraction: None) -> Evaluation:
    """Match every pair, estimate, compare with ground truth, and write a line, as soon as a pair is done.

    Raises:
        UsageError: there is no data, or two data sets of one kind, or the file is of another evaluation.
        NoTarget: poselib is not installed.
        InputMissing, BadImage, BadInput: an image or its ground truth cannot be used.
        CannotWrite, DiskError, Busy: the file cannot be written.
        And what the matcher raises.
    """
    if not request.data:
        raise UsageError("there is nothing to evaluate on", fix="name a data set: --data KIND:PATH")
    check_kinds([data.kind for data in request.data])
    chosen = [_chosen(data, request.limit, request.seed) for data in request.data]
    config = Config(
        matcher=request.matcher.describe(),
        data=[
            DataConfig(data.kind, data.task, len(indices), data.digest, str(data.scale), data.origin)
            for data, indices in zip(request.data, chosen, strict=True)
        ],
        limit=request.limit,
        seed=request.seed,
        draws=request.draws,
        iterations=request.iterations,
        pose_threshold=request.pose_threshold,
        homography_threshold=request.homography_threshold,
        estimator=f"poselib {estimate.version()}",
    )
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    header = Header(SCHEMA, config, created, describe_versions(), describe_machine())
    with open_results(request.out, header) as file:
        continued = len(file.rows)
        wanted = [(data, index) for data, indices in zip(request.data, chosen, strict=True) for index in indices]
        for done, (data, index) in enumerate(wanted):
            report(f"evaluating on {data.kind}", done / len(wanted))
            if (data.kind, data.names[index]) not in file.rows:
                file.add(_evaluate_pair(data, index, request))
        rows = [file.rows[data.kind, data.names[index]] for data, index in wanted]
    return Evaluation(header, rows, continued)


def _chosen(data: PairSet, limit: int | None, seed: int) -> list[int]:
    """Indices of the pairs to take, in the list's order."""
    if limit is None or limit >= len(data):
        return list(range(len(data)))
    return sorted(np.random.default_rng(seed).choice(len(data), limit, replace=False).tolist())


def _evaluate_pair(data: PairSet, index: int, request: EvalRequest) -> PairResult:
    start = time.perf_counter()
    pair = data.load(index)
    image0, image1 = _rgb(pair.image0), _rgb(pair.image1)
    seconds = {"read": time.perf_counter() - start}

    start = time.perf_counter()
    found = request.matcher.match(image0, image1)
    seconds |= found.seconds or {"match": time.perf_counter() - start}
    xy0, xy1 = _points(found)

    (height0, width0), (height1, width1) = image0.shape[:2], image1.shape[:2]
    resize0, resize1 = (resize_matrix(data.scale.factor(width, height)) for width, height in ((width0, height0), (width1, height1)))
    small0, small1 = transform(resize0, xy0), transform(resize1, xy1)
    precision: dict[str, float] = {}
    seeds = range(request.seed, request.seed + request.draws)
    if isinstance(pair, HomographyPair):
        truth = resize1 @ pair.homography @ np.linalg.inv(resize0)
        precision = _pixel_precision(transfer_error(small0, small1, truth))
        width, height = (side * data.scale.factor(width0, height0) for side in (width0, height0))
        start = time.perf_counter()
        planes = [estimate.homography(small0, small1, request.homography_threshold, seed, request.iterations) for seed in seeds]
        seconds["estimate"] = (time.perf_counter() - start) / request.draws
        estimates = [_judge_homography(found, truth, width, height) for found in planes]
    else:
        for name, intrinsics, width, height in (("first", pair.K0, width0, height0), ("second", pair.K1, width1, height1)):
            _check_centre(f"{data.kind} {pair.name}, {name} image", intrinsics, width, height)
        if pair.warp is not None:
            mapped, seen = pair.warp(xy0)
            distance = np.linalg.norm(transform(resize1, mapped) - small1, axis=1)
            precision = _pixel_precision(np.where(seen, distance, np.inf))
        squares = epipolar_error(xy0, xy1, pair.K0, pair.K1, pair.T_0to1)
        precision |= {name: _fraction(squares < limit) for name, limit in EPIPOLAR.items()}
        cameras = resize0 @ pair.K0, resize1 @ pair.K1
        start = time.perf_counter()
        poses = [estimate.relative_pose(small0, small1, *cameras, request.pose_threshold, seed, request.iterations) for seed in seeds]
        seconds["estimate"] = (time.perf_counter() - start) / request.draws
        estimates = [_judge_pose(found, pair.T_0to1) for found in poses]
    return PairResult(data.kind, data.names[index], len(xy0), estimates, precision, seconds)


def _judge_homography(found: tuple[Floats, int] | None, truth: Floats, width: float, height: float) -> Estimate:
    if found is None:
        return Estimate()
    matrix, inliers = found
    error = corner_error(matrix, truth, width, height)
    return Estimate(inliers, error if np.isfinite(error) else None)


def _judge_pose(found: tuple[Floats, Floats, int] | None, truth: Floats) -> Estimate:
    if found is None:
        return Estimate()
    rotation, translation = rotation_error(found[0], truth[:3, :3]), direction_error(found[1], truth[:3, 3])
    return Estimate(found[2], max(rotation, translation), rotation, translation)


def _rgb(image: Image) -> NDArray[np.uint8]:
    """uint8 (H, W, 3), as stored: ground truth is for pixels before any EXIF orientation."""
    return np.asarray(open_image(image, "ignore"))


def _points(found: Correspondences) -> tuple[Floats, Floats]:
    """The matches, float64 (K, 2) each. Raises BadInput for what are none, as another's matcher may return."""
    points = [np.asarray(keypoints, np.float64) for keypoints in (found.keypoints0, found.keypoints1)]
    if points[0].shape != points[1].shape or points[0].shape[1:] != (2,) or not all(np.isfinite(xy).all() for xy in points):
        raise BadInput(f"the matcher returned keypoints {points[0].shape} and {points[1].shape}; (K, 2) twice, finite, were expected")
    return points[0], points[1]


def _check_centre(name: str, intrinsics: Floats, width: int, height: int) -> None:
    """Raise BadInput where intrinsics are for an image of another size, as far as that can be seen."""
    x, y = intrinsics[0, 2], intrinsics[1, 2]
    if not (0 < x < width and 0 < y < height):
        raise BadInput(
            f"{name}: the intrinsics have their principal point at {x:.0f}, {y:.0f}, outside of its {width}x{height} pixels",
            fix="take images of the size that the list was made for",
        )


def _pixel_precision(errors: Floats) -> dict[str, float]:
    return {f"{pixels} px": _fraction(errors < pixels) for pixels in PRECISION_PIXELS}


def _fraction(right: NDArray[np.bool_]) -> float:
    return float(right.mean()) if len(right) else 0.0
