"""Matching on the CPU: the launches under Triton's interpreter, behind the engine that runs them on a GPU.

The interpreter needs a process of its own. Run as a module with TRITON_INTERPRET=1, this prints, for every case, how it differs from the
plain version, "" where it does not, as JSON.
"""

from __future__ import annotations

import ctypes
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines import cuda_matching
from smc.exported.engines.cuda_matching import CudaMatcher
from smc.exported.engines.cuda_program import Program, Region
from smc.exported.errors import BadInput
from smc.exported.matching import fast_reciprocal_nn, match_confidence, reciprocal_nn_both_ways
from smc.plugins.matching.launches import Tile, launches, operand_shapes, workspace
from smc.plugins.matching.specification import Matching
from tests.conformance import load_case
from tests.plugins.launching import interpret, without_overlap

Map = NDArray[np.float32]
Maps = tuple[Map, Map, Map, Map]
Arrays = dict[str, NDArray[Any]]

TILE = Tile(block_m=32, block_n=32, run=64, twice=False, warps=4, stages=1, programs=3, settlers=2)


@dataclass(frozen=True)
class Case:
    """Maps, and what is asked of them: `options` of `fast_reciprocal_nn`, or both ways with `subsample`."""

    name: str
    fields: str
    shape1: tuple[int, int]
    shape2: tuple[int, int]
    options: tuple[tuple[str, Any], ...] = ()
    both_ways: bool = False
    sm: int = 90


CASES = [
    Case("grid", "copy", (20, 37), (23, 31), (("subsample", 5),)),
    Case("pointers", "copy", (20, 37), (23, 31), (("subsample", 7),), sm=86),
    Case("unlike", "random", (19, 23), (24, 16), (("subsample", 4),)),
    Case("every pixel", "random", (6, 6), (8, 5), (("subsample", 1),)),
    Case("batches", "copy", (20, 37), (23, 31), (("subsample", 3),)),
    Case("tolerance", "copy", (20, 37), (23, 31), (("subsample", 4), ("pixel_tol", 5.0))),
    Case("starting points", "random", (20, 37), (23, 31), (("start_xy", ((36, 0, 5, 5, 17), (19, 0, 3, 3, 8))),)),
    Case("one starting point with a tolerance", "random", (9, 9), (7, 9), (("start_xy", ((4,), (4,))), ("pixel_tol", 100.0))),
    Case("no starting point", "random", (6, 8), (8, 6), (("subsample", 1000),)),
    Case("both ways", "copy", (20, 37), (23, 31), (("subsample", 6),), both_ways=True),
    Case("both ways, more of one image", "copy", (12, 60), (6, 7), (("subsample", 4),), both_ways=True),
    Case("constant", "constant", (12, 10), (11, 13), (("subsample", 5),)),
    Case("equal scores", "whole", (13, 17), (12, 9), (("subsample", 4),)),
    Case("repeated", "tiled", (24, 21), (17, 30), (("subsample", 5),)),
    Case("zero", "zero", (5, 6), (7, 4), (("subsample", 3),)),
    Case("large", "large", (12, 17), (13, 11), (("subsample", 4),)),
    Case("tiny", "tiny", (12, 17), (13, 11), (("subsample", 4),)),
    Case("one pixel", "random", (1, 1), (1, 2), (("subsample", 1),)),
    Case("size 16", "short", (9, 11), (10, 8), (("subsample", 4),)),
]
"""Small: the interpreter takes about 10 ms to move one walk once."""


def random_map(seed: int, shape: tuple[int, int], size: int = 24) -> Map:
    """Unit descriptors."""
    desc = np.random.default_rng(seed).standard_normal((*shape, size)).astype(np.float32)
    return desc / np.linalg.norm(desc, axis=2, keepdims=True)


def maps(case: Case) -> Maps:
    """desc1, desc2, conf1, conf2."""
    random = np.random.default_rng(11)
    desc1, desc2 = random_map(1, case.shape1), random_map(2, case.shape2)
    match case.fields:
        case "copy" | "large" | "tiny":  # most points have a noisy copy in the other map
            count = min(desc1[..., 0].size, desc2[..., 0].size)
            copied = desc1.reshape(-1, 24)[random.permutation(desc1[..., 0].size)[:count]]
            desc2.reshape(-1, 24)[:count] = copied + 0.1 * desc2.reshape(-1, 24)[:count]
            desc1, desc2 = {"copy": (desc1, desc2), "large": (desc1 * 300, desc2 * 0.004), "tiny": (desc1 * 1e-9, desc2)}[case.fields]
        case "constant":
            desc1, desc2 = np.full_like(desc1, 0.2), np.full_like(desc2, 0.2)
        case "whole":
            desc1, desc2 = (random.integers(-1, 2, desc.shape).astype(np.float32) for desc in (desc1, desc2))
        case "tiled":
            patch = random.integers(-3, 4, (6, 5, 24)).astype(np.float32)  # exact in float32: copies score alike in any sum
            desc1, desc2 = (np.tile(patch, (6, 7, 1))[:height, :width] for height, width in (case.shape1, case.shape2))
        case "zero":
            desc1, desc2 = np.zeros_like(desc1), np.zeros_like(desc2)
        case "short":
            desc1, desc2 = desc1[..., :16], desc2[..., :16]
    conf1, conf2 = (random.random(shape).astype(np.float32) for shape in (case.shape1, case.shape2))
    return tuple(np.ascontiguousarray(each, np.float32) for each in (desc1, desc2, conf1, conf2))  # type: ignore[return-value]


class FewAtOnce(Matching):
    """Programs that take so few starting points that one list takes several batches."""

    @property
    def starts(self) -> int:
        return 64


class OnTheCpu:
    """In place of a GPU: an arena of numpy memory, and a "graph" that interprets the launches."""

    def __init__(self, op: Matching, tile: Tile = TILE, sm: int = 90) -> None:
        self._launches = [without_overlap(launch) for launch in launches(op, tile, sm)]
        regions, end = {}, 0
        self._places = {}
        for name, (dtype, shape) in (operand_shapes(op) | workspace(op, tile)).items():
            regions[name] = Region("arena", end, dtype, shape)
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            self._places[name] = (end, size)
            end += -(-size // 256) * 256
        self.arena = np.full(end, 0xFF, np.uint8)  # NaN, and -1
        self.memory: Arrays = {
            name: self.arena[start : start + size].view(regions[name].dtype).reshape(regions[name].shape)
            for name, (start, size) in self._places.items()
        }
        self._program = Program("matcher", regions, regions, end, ())
        self.runs = 0

    def matcher(self) -> CudaMatcher:
        return CudaMatcher(self._program, [], {"arena": self.arena.ctypes.data, "weights": 0}, self, None)  # type: ignore[arg-type]

    def launch(self, stream: object) -> None:
        """As a graph."""
        self.runs += 1
        for launch in self._launches:
            interpret(launch, self.memory)

    def copy(self, to: int, source: int, nbytes: int) -> None:
        """As a stream."""
        ctypes.memmove(to, source, nbytes)

    def synchronize(self) -> None:
        """As a stream."""


def on_the_cpu(case: Case) -> tuple[OnTheCpu, CudaMatcher]:
    """A matcher with the case's maps in place."""
    gpu = OnTheCpu(FewAtOnce(case.shape1, case.shape2, maps(case)[0].shape[2]), sm=case.sm)
    cuda_matching.capture = lambda program, kernels, bases, stream: gpu  # type: ignore[assignment, return-value]
    cuda_matching.pinned_array = lambda pool, shape, dtype: np.empty(shape, dtype)  # type: ignore[assignment]
    for name, values in zip(("desc1", "desc2", "conf1", "conf2"), maps(case), strict=True):
        gpu.memory[name][:] = values
    return gpu, gpu.matcher()


def ask(case: Case, matcher: CudaMatcher) -> tuple[NDArray[Any], ...]:
    """The engine's answer."""
    options = {name: tuple(map(np.array, value)) if name == "start_xy" else value for name, value in case.options}
    return matcher.reciprocal_nn_both_ways(**options) if case.both_ways else matcher.fast_reciprocal_nn(**options)


def answer(case: Case) -> tuple[NDArray[Any], ...]:
    """The plain version's."""
    desc1, desc2, conf1, conf2 = maps(case)
    options = {name: tuple(map(np.array, value)) if name == "start_xy" else value for name, value in case.options}
    if case.both_ways:
        return reciprocal_nn_both_ways(desc1, desc2, conf1, conf2, **options)
    xy1, xy2 = fast_reciprocal_nn(desc1, desc2, **options)
    return xy1, xy2, match_confidence(xy1, xy2, conf1, conf2)


def difference(found: tuple[NDArray[Any], ...], wanted: tuple[NDArray[Any], ...]) -> str:
    """ "" if both are the same to the bit, else which is not."""
    names = ("xy1", "xy2", "confidence")
    return ", ".join(
        f"{name}: {one.dtype} {one.shape}, {other.dtype} {other.shape} expected"
        for name, one, other in zip(names, found, wanted, strict=True)
        if one.dtype != other.dtype or not np.array_equal(one, other)
    )


def interpreted() -> dict[str, str]:
    """How every case differs from the plain version, and what else does not hold."""
    results = {}
    for case in CASES:
        gpu, matcher = on_the_cpu(case)
        results[case.name] = difference(ask(case, matcher), answer(case))
        if case.name == "batches":
            results["more than one batch"] = "" if gpu.runs > 1 else "there was one"
        if case.name == "grid":
            results["again"] = difference(ask(case, matcher), answer(case))
    return results | refused() | originals()


def refused() -> dict[str, str]:
    """Descriptors that are not finite, and then ones that are."""
    results = {}
    case = Case("", "random", (6, 8), (8, 6), (("subsample", 6),))
    gpu, matcher = on_the_cpu(case)
    for name, bad in (("desc1", np.nan), ("desc1", np.inf), ("desc2", np.nan), ("desc2", -np.inf)):
        kept = gpu.memory[name][3, 4, 5]
        gpu.memory[name][3, 4, 5] = bad
        try:
            ask(case, matcher)
            results[f"{bad} in {name}"] = "not refused"
        except BadInput as error:
            results[f"{bad} in {name}"] = "" if str(error) == "descriptors hold NaN or infinite values" else str(error)
        gpu.memory[name][3, 4, 5] = kept
    return results | {"finite again": difference(ask(case, matcher), answer(case))}


def originals() -> dict[str, str]:
    """The original's results."""
    data = load_case("fastnn_40x72_noisy")
    op = Matching(data["desc1"].shape[:2], data["desc2"].shape[:2])
    gpu = OnTheCpu(op, Tile(block_m=64, block_n=64, run=256, twice=True, warps=4, stages=1, programs=2, settlers=1))
    cuda_matching.capture = lambda program, kernels, bases, stream: gpu  # type: ignore[assignment, return-value]
    for name in ("desc1", "desc2", "conf1", "conf2"):
        gpu.memory[name][:] = data[name]
    matcher = gpu.matcher()
    asked = {
        "original, step 8": (matcher.fast_reciprocal_nn(8), ("xy1_s8", "xy2_s8")),
        "original, tolerance": (matcher.fast_reciprocal_nn(8, pixel_tol=3), ("xy1_tol3", "xy2_tol3")),
    }
    return {
        name: ", ".join(key for one, key in zip(found, keys, strict=False) if not np.array_equal(one, data[key]))
        for name, (found, keys) in asked.items()
    }


RESULTS = [
    *(case.name for case in CASES),
    *("again", "more than one batch", "original, step 8", "original, tolerance", "finite again"),
    *("nan in desc1", "inf in desc1", "nan in desc2", "-inf in desc2"),
]
"""What `interpreted` tells of."""


if __name__ == "__main__":
    print(json.dumps(interpreted()))
