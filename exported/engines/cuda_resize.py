"""Images of any size to the network's on an NVIDIA GPU: Pillow's resize, to the last bit, and a crop."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines.cuda_launch import Kernels, launch
from smc.exported.engines.cuda_memory import DeviceArray, MemoryPool, Stream, pinned_array
from smc.exported.engines.cuda_program import Resize
from smc.exported.images import FramedImage, Framing
from smc.exported.resampling import is_across_first, resampling

_ALIGNMENT = 256
_CHANNELS = 3


class Resizer:
    """A plan's kernels for it. Used by any number of threads at once."""

    def __init__(self, resize: Resize, kernels: Kernels, memory: MemoryPool, staging: MemoryPool) -> None:
        """`memory` is a pool of the GPU's, `staging` one of page-locked memory."""
        self._resize, self._kernels, self._memory, self._staging = resize, kernels, memory, staging

    def takes(self, framing: Framing) -> bool:
        """Whether it gives what Pillow does, and there is something to do."""
        return framing.resized_size != framing.image_size and is_across_first(framing.image_size, framing.resized_size)

    def enqueue(self, image: FramedImage, out: int, stream: Stream) -> object:
        """Queue what makes an image the network's input, uint8 (H, W, 3) at the address `out`.

        Returns:
            What has to be kept until the stream is done with it.

        Raises:
            OutOfMemory, BackendFailed: CUDA refused.
        """
        framing = image.framing
        left, top, right, bottom = framing.crop
        across = resampling(framing.image_size[0], framing.resized_size[0], left, right, framing.filter)
        down = resampling(framing.image_size[1], framing.resized_size[1], top, bottom, framing.filter)
        begin, end = down.source  # rows of the image that the crop leaves out are not even copied
        given: tuple[NDArray[Any], ...] = (image.rgb[begin:end], across.first, across.weights, down.first - np.int32(begin), down.weights)
        layout = _Layout.of([values.nbytes for values in given] + [(end - begin) * (right - left) * _CHANNELS])

        staged = pinned_array(self._staging, (layout.nbytes,), np.uint8)
        for values, offset in zip(given, layout.offsets, strict=False):
            staged[offset : offset + values.nbytes].view(values.dtype).reshape(values.shape)[...] = values
        block = DeviceArray(self._memory, (layout.nbytes,), np.uint8)
        stream.copy(block.address, staged.ctypes.data, layout.offsets[-1])

        source, *tables, between = (block.address + offset for offset in layout.offsets)
        rows, width, height = end - begin, right - left, bottom - top
        self._launch(self._resize.across, rows, width, (source, *tables[:2], between), framing.image_size[0], across.weights, stream)
        self._launch(self._resize.down, height, width, (between, *tables[2:], out), rows, down.weights, stream)
        return staged, block

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


@dataclass(frozen=True)
class _Layout:
    """Arrays one behind the other in a block: where each begins, and the block's size."""

    offsets: list[int]
    nbytes: int

    @staticmethod
    def of(sizes: list[int]) -> _Layout:
        offsets, end = [], 0
        for size in sizes:
            offsets.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        # Of few sizes, since pools keep blocks of every size that was ever asked for.
        return _Layout(offsets, 1 << (end - 1).bit_length())
