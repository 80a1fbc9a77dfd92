"""What a file of results holds: a header, then a line a pair. docs/evaluation.md describes it."""

from __future__ import annotations

from typing import Any

import msgspec

from smc.compiler.evaluation.pairs import Task

SCHEMA = 2


class DataConfig(msgspec.Struct, frozen=True):
    """A data set: its kind, how many pairs are taken of it, a digest of their names and ground truth, what its pixels are, and what
    made it, where it is the project's own."""

    kind: str
    task: Task
    pairs: int
    digest: str
    scale: str
    origin: str = ""


class Config(msgspec.Struct, frozen=True):
    """All that results depend on; lines of one file are of one config, but for the `origin` of its data.

    Attributes:
        matcher: what `PairMatcher.describe` says.
        data: the data sets.
        limit: pairs drawn from each data set, None for all.
        seed: of that draw, and of the estimator's first draw.
        draws, iterations, pose_threshold, homography_threshold: see `EvalRequest`.
        estimator: name and version.
    """

    matcher: dict[str, Any]
    data: list[DataConfig]
    limit: int | None
    seed: int
    draws: int
    iterations: int
    pose_threshold: float
    homography_threshold: float
    estimator: str


class Header(msgspec.Struct, frozen=True):
    """The first line. `versions` and `machine` may differ between the runs that a file was made in: they are the first run's."""

    schema: int
    config: Config
    created: str
    versions: dict[str, str]
    machine: dict[str, str]


class Estimate(msgspec.Struct, frozen=True):
    """One robust estimate.

    Attributes:
        inliers: matches that agree with it.
        error: degrees, the larger of rotation's and translation's; or of a homography the mean corner error in pixels. None where
            nothing could be estimated.
        rotation_error, translation_error: degrees, of a pose.
    """

    inliers: int = 0
    error: float | None = None
    rotation_error: float | None = None
    translation_error: float | None = None


class PairResult(msgspec.Struct, frozen=True):
    """A pair's line.

    Attributes:
        kind: of data.
        name: of the pair.
        matches: how many there are.
        estimates: one a draw.
        precision: the fraction of matches that ground truth confirms, by measure; 0 where there are none.
        seconds: wall time by stage, that of an estimate for one draw.
    """

    kind: str
    name: str
    matches: int
    estimates: list[Estimate]
    precision: dict[str, float]
    seconds: dict[str, float]
