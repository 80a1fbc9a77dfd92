"""What runs matching on a GPU, without one: a stand-in for its memory and its graph. Results are in tests/plugins/test_matching.py."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("cuda.bindings")

import functools
import operator

from smc.exported.engines import cuda_matching
from smc.exported.engines.cuda_matching import CudaMatcher, squared_limit
from smc.exported.engines.cuda_program import Program, Region
from smc.exported.errors import BadInput
from smc.exported.matching import fast_reciprocal_nn

SHAPES: dict[str, tuple[str, tuple[int, ...]]] = {
    "desc1": ("float32", (20, 30, 24)),
    "desc2": ("float32", (16, 40, 24)),
    "conf1": ("float32", (20, 30)),
    "conf2": ("float32", (16, 40)),
    "starts": ("int32", (2, 8)),
    "options": ("int32", (8,)),
    "status": ("int32", (4,)),
    "xy1": ("int64", (600, 2)),
    "xy2": ("int64", (600, 2)),
    "confidence": ("float32", (600,)),
}


class StandIn:
    """Stream, graph and arena in one: it keeps what every run was asked, and answers with one match more each time."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], list[int], list[int]]] = []
        self.regions, end = {}, 0
        for name, (dtype, shape) in SHAPES.items():
            self.regions[name] = Region("arena", end, dtype, shape)
            end += -(-int(np.prod(shape)) * np.dtype(dtype).itemsize // 256) * 256
        self.arena = np.full(end, 0xFF, np.uint8)
        self["status"][:] = 0, 0x3F800000, 0x3F800000, 0

    def __getitem__(self, name: str) -> Any:
        region = self.regions[name]
        size = int(np.prod(region.shape)) * np.dtype(region.dtype).itemsize
        return self.arena[region.offset : region.offset + size].view(region.dtype).reshape(region.shape)

    @property
    def address(self) -> int:
        return self.arena.ctypes.data

    def matcher(self) -> CudaMatcher:
        return CudaMatcher(Program("matcher", self.regions, self.regions, 0, ()), [], {"arena": self.address}, self, None)  # type: ignore[arg-type]

    def launch(self, stream: object) -> None:
        options = self["options"].tolist()
        one, two = (self["starts"][image, : options[image]].tolist() for image in range(2))
        self.asked.append((options, one, two))
        count = len(self.asked)
        self["status"][0] = count
        self["xy1"][:count], self["xy2"][:count], self["confidence"][:count] = 1, 2, 0.5

    def copy(self, to: int, source: int, nbytes: int) -> None:
        ctypes.memmove(to, source, nbytes)

    def synchronize(self) -> None:
        pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setattr(cuda_matching, "capture", lambda program, kernels, bases, stream: stand_in)
    monkeypatch.setattr(cuda_matching, "pinned_array", lambda pool, shape, dtype: np.empty(shape, dtype))
    return stand_in


def test_it_needs_neither_the_compiler_nor_torch_nor_triton() -> None:
    code = "import sys, smc.exported.engines.cuda_matching; print({'torch', 'triton', 'smc.compiler', 'smc.plugins'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_the_grid_is_asked_for_batch_by_batch(gpu: StandIn) -> None:
    """20 x 30 at step 5 are 24 points: three batches of 8, of which the first begins the list."""
    xy1, xy2, confidence = gpu.matcher().fast_reciprocal_nn(5)
    assert [options[:5] for options, _, _ in gpu.asked] == [[8, 0, 1, 0, 0], [8, 0, 0, 0, 0], [8, 0, 0, 0, 0]]
    assert functools.reduce(operator.iadd, (one for _, one, _ in gpu.asked), []) == [
        x + 30 * y for y in range(2, 20, 5) for x in range(2, 30, 5)
    ]
    assert (xy1.tolist(), xy2.tolist(), confidence.tolist()) == ([[1, 1]] * 3, [[2, 2]] * 3, [0.5] * 3)
    assert (xy1.dtype, confidence.dtype) == (np.int64, np.float32)


def test_both_ways_asks_for_both_grids(gpu: StandIn) -> None:
    """At step 10 the images have 6 and 8 points; at step 7, 12 and 12."""
    matcher = gpu.matcher()
    matcher.reciprocal_nn_both_ways(10)
    matcher.reciprocal_nn_both_ways(7)
    assert [options[:5] for options, _, _ in gpu.asked] == [[6, 8, 1, 0, 0], [8, 8, 1, 0, 0], [4, 4, 0, 0, 0]]
    assert gpu.asked[0][2] == [x + 40 * y for y in (5, 15) for x in (5, 15, 25, 35)]


def test_starting_points_and_tolerances_make_one_trip(gpu: StandIn) -> None:
    matcher = gpu.matcher()
    matcher.fast_reciprocal_nn(start_xy=np.array([[3, 1], [2, 0], [3, 1]]))
    matcher.fast_reciprocal_nn(start_xy=(np.array([3]), np.array([1])), pixel_tol=5)
    matcher.fast_reciprocal_nn(10, pixel_tol=5.001)
    assert [options[:5] for options, _, _ in gpu.asked] == [[2, 0, 1, 1, 0], [1, 0, 1, 1, 25], [6, 0, 1, 1, 26]]
    assert [one for _, one, _ in gpu.asked[:2]] == [[2, 33], [33]]


def test_nostarting_points_still_look_at_the_maps(gpu: StandIn) -> None:
    gpu["status"][1] = 0x7F800000
    with pytest.raises(BadInput, match="NaN or infinite"):
        gpu.matcher().fast_reciprocal_nn(1000)
    assert [options[:3] for options, _, _ in gpu.asked] == [[0, 0, 1]]


@pytest.mark.parametrize("bits", [0x7F800000, 0x7FC00000])
@pytest.mark.parametrize("place", [1, 2])
def test_descriptors_that_are_not_finite_are_refused(gpu: StandIn, place: int, bits: int) -> None:
    gpu["status"][place] = bits
    with pytest.raises(BadInput, match="NaN or infinite"):
        gpu.matcher().fast_reciprocal_nn()


@pytest.mark.parametrize(
    "options",
    [
        {"pixel_tol": -1},
        {"pixel_tol": float("nan")},
        {"subsample": 0},
        {"subsample": 2.5},
        {"subsample": [8]},
        {"start_xy": np.array([[30, 0]])},
        {"start_xy": np.array([[0.5, 0]])},
    ],
)
def test_bad_arguments_are_refused_as_on_the_cpu(gpu: StandIn, options: dict[str, Any]) -> None:
    with pytest.raises(BadInput) as wanted:
        fast_reciprocal_nn(np.ones((20, 30, 24), np.float32), np.ones((16, 40, 24), np.float32), **options)
    with pytest.raises(BadInput) as found:
        gpu.matcher().fast_reciprocal_nn(**options)
    assert str(found.value) == str(wanted.value)
    assert gpu.asked == []


@pytest.mark.parametrize("tolerance", [1e-9, 0.1, 1, np.sqrt(2), np.nextafter(np.sqrt(2), 2), 3, 5, 5.001, np.sqrt(1000), 4999.9, 1e4])
def test_squared_limit_keeps_the_distances_below_the_tolerance(tolerance: float) -> None:
    limit = squared_limit(tolerance)
    assert np.sqrt(limit - 1) < tolerance <= np.sqrt(limit)


@pytest.mark.parametrize("tolerance", [1e5, 1e300, float("inf")])
def test_a_tolerance_beyond_any_image_keeps_all(tolerance: float) -> None:
    assert squared_limit(tolerance) == 2**31 - 1
