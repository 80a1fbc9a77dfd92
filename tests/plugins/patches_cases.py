"""Patches for the kernel, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.patches_cases

prints, as JSON, the errors of each small case on the CPU.
"""

from __future__ import annotations

import json

import numpy as np

from smc.plugins.patches import reference
from smc.plugins.patches.launches import Tile, launches
from smc.plugins.patches.specification import Patches
from tests.plugins.small_cases import Case, Expected, errors, loaded, memory, on_cpu, places


def bytes_in(batch: int, height: int, width: int, channels: int = 3, patch: int = 4, out_dtype: str = "float16") -> Patches:
    """Of uint8 pixels, to -1 to 1."""
    sizes = {"batch": batch, "height": height, "width": width, "channels": channels, "patch": patch}
    return Patches(**sizes, layout="nhwc", dtype="uint8", out_dtype=out_dtype, subtract=127.5, multiply=1 / 127.5)


def floats_in(batch: int, height: int, width: int, channels: int = 3, patch: int = 4, dtype: str = "float32") -> Patches:
    sizes = {"batch": batch, "height": height, "width": width, "channels": channels, "patch": patch}
    return Patches(**sizes, layout="nchw", dtype=dtype, out_dtype="float16")


SMALL: dict[str, tuple[Patches, Tile]] = {
    "bytes": (bytes_in(2, 8, 12), Tile(1, 4)),
    "bytes to float32": (bytes_in(1, 8, 12, out_dtype="float32"), Tile(2, 1)),
    "floats": (floats_in(2, 8, 12), Tile(1, 4)),
    "pixels left over": (bytes_in(2, 11, 14), Tile(2, 1)),
    "floats left over": (floats_in(2, 11, 14, dtype="float16"), Tile(4, 2)),
    "odd patches": (bytes_in(2, 10, 15, patch=5), Tile(4, 1)),
    "one channel": (floats_in(1, 6, 6, channels=1, patch=3), Tile(1, 1)),
    "one patch": (bytes_in(1, 16, 16, patch=16), Tile(2, 4)),
}

REAL: dict[str, Patches] = {
    "bytes": bytes_in(2, 384, 512, patch=16),
    "floats": floats_in(2, 384, 512, patch=16),
    "half floats": floats_in(1, 224, 224, patch=16, dtype="float16"),
}
"""Of sizes of the public model."""


def case(operation: Patches, tile: Tile, sm: int) -> Case:
    shape = (operation.batch, operation.height, operation.width, operation.channels)
    if operation.layout == "nchw":
        shape = (operation.batch, operation.channels, operation.height, operation.width)
    count = int(np.prod(shape))
    image = memory([places((count,), (1,))], operation.dtype).reshape(shape)
    exact = reference.patches(operation, loaded(image, operation.dtype).reshape(shape))
    # One subtraction and one multiplication: each rounds float32 once.
    plain = ((exact / operation.multiply).astype(np.float32) * np.float32(operation.multiply)).astype(np.float32)
    out = Expected(operation.out_dtype, places(operation.shape, (operation.shape[1], 1)), exact, plain)
    return Case(launches(operation, tile, sm), {"image": image}, {"out": out})


if __name__ == "__main__":
    print(json.dumps({name: errors(case(operation, tile, 80), on_cpu) for name, (operation, tile) in SMALL.items()}))
