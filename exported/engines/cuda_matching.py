"""FastNN-Lite on an NVIDIA GPU: what `smc.exported.matching` computes, from maps that are already in its memory.

The plan's matching program does everything up to the sorted list. Its inputs are the maps desc1, desc2 (H, W, D) and conf1, conf2 (H, W),
float32; the starting points, int32 (2, S), pixels of image 1 and of image 2; and eight int32 options: how many starting points of
image 1 and of image 2, 1 to begin a list of matches or 0 to add to it, 1 for one round trip only, and the tolerance in squared
pixels, 0 for none. Its outputs are the status, int32 (4,): matches, and the bits of the largest squared norm of either map's descriptors;
and xy1, xy2 and confidence, int64 (H1 * W1, 2) twice and float32 (H1 * W1,), of which the matches fill the first rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines.cuda_launch import Kernels, capture
from smc.exported.engines.cuda_memory import MemoryPool, Stream, pinned_array
from smc.exported.engines.cuda_program import Program, Space
from smc.exported.errors import BadInput
from smc.exported.matching import Indices, starting_points

Found = tuple[Indices, Indices, NDArray[np.float32]]
"""xy1, xy2: int64 (K, 2), and the float32 (K,) confidence of each match, the smaller of its two pixels'."""

_INFINITY = 0x7F800000  # bits of float32 infinity; those of NaN are above
_LARGEST = 2**31 - 1


class CudaMatcher:
    """Matching of maps of one pair of shapes. It serves one thread at a time, whose device is the arena's."""

    def __init__(self, program: Program, kernels: Kernels, bases: Mapping[Space, int], stream: Stream, staging: MemoryPool) -> None:
        """Capture the program.

        Args:
            program: the plan's, for this pair of shapes.
            kernels: of its plan.
            bases: where each space starts in the GPU's memory. The program's part of the arena is its own between calls.
            stream: which the maps are written on, or the work that writes them is done.
            staging: a pool of page-locked memory.

        Raises:
            BackendFailed, OutOfMemory: CUDA refused.
        """
        self._inputs, self._outputs = program.inputs, program.outputs
        self._arena, self._stream, self._staging = bases["arena"], stream, staging
        self._graph = capture(program, kernels, bases, stream)
        (height1, width1, _), (height2, width2, _) = (program.inputs[name].shape for name in ("desc1", "desc2"))
        self._shape1, self._shape2 = (height1, width1), (height2, width2)

    def fast_reciprocal_nn(self, subsample: int = 8, pixel_tol: float = 0, start_xy: Any = None) -> Found:
        """`smc.exported.matching.fast_reciprocal_nn` of the maps that are in place, and the matches' confidence.

        Raises:
            BadInput: as there; descriptors whose squared norm is not finite count as infinite.
            BackendFailed: the GPU failed.
        """
        if not pixel_tol >= 0:
            raise BadInput(f"pixel_tol must be 0 or more, found {pixel_tol}")
        starts = _grid(self._shape1, subsample) if start_xy is None else starting_points(*self._shape1, subsample, start_xy)
        one_trip = pixel_tol > 0 or start_xy is not None
        return self._match(starts, starts[:0], one_trip, squared_limit(pixel_tol) if pixel_tol > 0 else 0)

    def reciprocal_nn_both_ways(self, subsample: int = 8) -> Found:
        """`smc.exported.matching.reciprocal_nn_both_ways` of the maps that are in place. Raises as above."""
        starts1, starts2 = (_grid(shape, subsample) for shape in (self._shape1, self._shape2))
        return self._match(starts1, starts2, False, 0)

    def _match(self, starts1: Indices, starts2: Indices, one_trip: bool, limit: int) -> Found:
        """Matches from all starting points, as many at a time as the program takes. The GPU keeps those of earlier batches."""
        capacity = self._inputs["starts"].shape[1]
        batches = max(1, *(math.ceil(len(starts) / capacity) for starts in (starts1, starts2)))
        staged = pinned_array(self._staging, (batches, 2, capacity), np.int32)
        options = pinned_array(self._staging, (batches, *self._inputs["options"].shape), np.int32)
        options[:] = 0
        for batch in range(batches):
            for image, starts in enumerate((starts1, starts2)):
                taken = starts[batch * capacity : (batch + 1) * capacity]
                staged[batch, image, : len(taken)] = taken
                options[batch, image] = len(taken)
            options[batch, 2:5] = batch == 0, one_trip, limit
            self._put("starts", staged[batch])
            self._put("options", options[batch])
            self._graph.launch(self._stream)

        most = min(self._outputs["confidence"].shape[0], len(starts1) + len(starts2))  # of a walk comes one match at most
        status, xy1, xy2, confidence = (self._get(name, most) for name in ("status", "xy1", "xy2", "confidence"))
        self._stream.synchronize()
        if (status[1:3] >= _INFINITY).any():
            raise BadInput("descriptors hold NaN or infinite values")
        count = int(status[0])
        return xy1[:count].copy(), xy2[:count].copy(), confidence[:count].copy()

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self._stream.copy(self._arena + self._inputs[name].offset, values.ctypes.data, values.nbytes)

    def _get(self, name: str, most: int) -> NDArray[Any]:
        """Queue a copy of an output's first values, all of the few of `status`, to memory of the host."""
        region = self._outputs[name]
        rows = region.shape[0] if name == "status" else most
        values = pinned_array(self._staging, (rows, *region.shape[1:]), region.dtype)
        if values.nbytes:
            self._stream.copy(values.ctypes.data, self._arena + region.offset, values.nbytes)
        return values


def squared_limit(tolerance: float) -> int:
    """The smallest whole number whose root is not below a positive tolerance: distances below that are below the tolerance."""
    if tolerance * tolerance >= _LARGEST:
        return _LARGEST
    limit = max(1, math.ceil(tolerance * tolerance))
    while math.sqrt(limit) < tolerance:
        limit += 1
    while limit > 1 and math.sqrt(limit - 1) >= tolerance:
        limit -= 1
    return limit


def _grid(shape: tuple[int, int], subsample: Any) -> Indices:
    """The usual starting points, made once: that takes as long as the GPU takes to match them."""
    return _usual_grid(shape, int(subsample)) if isinstance(subsample, int | np.integer) else starting_points(*shape, subsample, None)


@lru_cache(maxsize=16)
def _usual_grid(shape: tuple[int, int], subsample: int) -> Indices:
    return starting_points(*shape, subsample, None)
