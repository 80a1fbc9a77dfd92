"""Images of any size to the network's on an NVIDIA GPU: Pillow's resize, to the last bit, and a crop."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines.cuda_launch import Kernels, launch
from smc.exported.engines.cuda_memory import DeviceArray, MemoryPool, Stream, pinned_array
from smc.exported.engines.cuda_program import Resize
from smc.exported.images import FramedImage
from smc.exported.resampling import is_down_first, resampling

_ALIGNMENT = 256
_CHANNELS = 3


class Resizer:
    """A plan's kernels for it. Used by any number of threads at once."""

    def __init__(self, resize: Resize, kernels: Kernels, memory: MemoryPool, staging: MemoryPool) -> None:
        """`memory` is a pool of the GPU's, `staging` one of page-locked memory."""
        self._resize, self._kernels, self._memory, self._staging = resize, kernels, memory, staging

    def enqueue(self, image: FramedImage, out: int, stream: Stream, held: list[Any]) -> None:
        """Queue what makes an image the network's input, uint8 (H, W, 3) at the address `out`.

        Args:
            held: takes what has to be kept until the stream is done with it, also where this fails.

        Raises:
            OutOfMemory, BackendFailed: CUDA refused.
        """
        for kernel in (self._resize.across, self._resize.down):
            self._kernels[kernel]  # loaded now: what fails half-way leaves work behind
        framing = image.framing
        left, top, right, bottom = framing.crop
        across = resampling(framing.image_size[0], framing.resized_size[0], left, right, framing.filter)
        down = resampling(framing.image_size[1], framing.resized_size[1], top, bottom, framing.filter)
        begin, end = down.source  # rows of the image that the crop leaves out are not even copied
        rows, columns, (height, width) = end - begin, framing.image_size[0], framing.shape
        down_first = is_down_first(framing.image_size, framing.resized_size)

        given: tuple[NDArray[Any], ...] = (image.rgb[begin:end], across.first, across.weights, down.first - np.int32(begin), down.weights)
        between_bytes = (height * columns if down_first else rows * width) * _CHANNELS
        *offsets, between_offset, nbytes = _offsets([*(values.nbytes for values in given), between_bytes])
        staged = pinned_array(self._staging, (_block(between_offset),), np.uint8)
        block = DeviceArray(self._memory, (_block(nbytes),), np.uint8)
        held += [staged, block]
        for values, offset in zip(given, offsets, strict=True):
            staged[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
        stream.copy(block.address, staged.ctypes.data, between_offset)

        between = block.address + between_offset
        source, *tables = (block.address + offset for offset in offsets)
        if down_first:
            self._launch(self._resize.down, height, columns, (source, *tables[2:], between), rows, down.weights, stream)
            self._launch(self._resize.across, height, width, (between, *tables[:2], out), columns, across.weights, stream)
        else:
            self._launch(self._resize.across, rows, width, (source, *tables[:2], between), columns, across.weights, stream)
            self._launch(self._resize.down, height, width, (between, *tables[2:], out), rows, down.weights, stream)

    def _launch(
        self,
        kernel: int,
        rows: int,
        width: int,
        addresses: tuple[int, ...],
        extent: int,
        weights: NDArray[np.int32],
        stream: Stream,
    ) -> None:
        """One direction: `rows` times `width` pixels, made of `extent` neighbours across or down."""
        grid = (-(-_CHANNELS * width // self._resize.bytes), -(-rows // self._resize.rows), 1)
        integers = (rows, extent, width, len(weights))
        arguments: list[Any] = [*map(ctypes.c_uint64, addresses), *map(ctypes.c_int32, integers)]
        launch(self._kernels, kernel, grid, arguments, stream, "resizing an image")


def _offsets(sizes: list[int]) -> list[int]:
    """Where arrays of so many bytes begin, one behind the other, and where the last one ends."""
    return list(itertools.accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))


def _block(nbytes: int) -> int:
    """A power of two: of few sizes, since pools keep blocks of every size that was ever asked for."""
    return 1 << (nbytes - 1).bit_length()
