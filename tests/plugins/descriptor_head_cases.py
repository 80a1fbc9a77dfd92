"""Descriptor heads for the kernel, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.descriptor_head_cases

prints, as JSON, the errors of each small case on the CPU.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from smc.plugins.descriptor_head import reference
from smc.plugins.descriptor_head.launches import Tile, launches
from smc.plugins.descriptor_head.specification import DescriptorHead
from tests.plugins.small_cases import Case, Expected, errors, loaded, memory, on_cpu, places


def contiguous(groups: int, batch: int, h: int, w: int, channels: int, patch: int, **more: Any) -> DescriptorHead:
    """Contiguous tokens, but where `more` says otherwise."""
    row = (channels + 1) * patch**2
    made: dict[str, Any] = {"dtype": "float16", "f_row": row, "f_group": batch * h * w * row, "confidence": 1.0}
    sizes = {"groups": groups, "batch": batch, "h": h, "w": w, "channels": channels, "patch": patch}
    return DescriptorHead(**sizes, **made | more)


SMALL: dict[str, tuple[DescriptorHead, Tile]] = {
    "plain": (contiguous(1, 1, 2, 3, 24, 4), Tile(16, 4)),
    "groups and batch": (contiguous(2, 2, 3, 2, 8, 4, confidence=0.5), Tile(16, 4)),
    "parts of tokens": (contiguous(2, 1, 2, 3, 24, 4, desc16=True), Tile(8, 1)),
    "larger than a token": (contiguous(1, 1, 2, 2, 5, 3, desc16=True), Tile(32, 1)),
    "strided": (contiguous(2, 1, 2, 3, 6, 4, f_row=128, f_group=6 * 128 + 16, f_offset=8), Tile(16, 4)),
    "other group's tokens": (contiguous(2, 1, 2, 2, 6, 4, f_group=-4 * 112, f_offset=4 * 112), Tile(16, 4)),
    "float32": (contiguous(1, 1, 2, 3, 24, 4, dtype="float32", desc16=True), Tile(16, 4)),
    "least norm": (contiguous(1, 1, 2, 3, 6, 4, least_norm=2.0), Tile(16, 4)),
    "no padding": (contiguous(1, 1, 2, 3, 16, 4, desc16=True), Tile(16, 4)),
}

REAL: dict[str, DescriptorHead] = {
    "a pair": contiguous(2, 1, 24, 32, 24, 16, desc16=True),
    "desc alone": contiguous(2, 1, 24, 32, 24, 16),
    "two pairs, float32": contiguous(2, 2, 14, 14, 24, 16, dtype="float32", desc16=True),
}
"""Of sizes of the public model."""


def case(operation: DescriptorHead, tile: Tile, sm: int) -> Case:
    tokens = operation.batch * operation.h * operation.w
    columns = (operation.channels + 1) * operation.patch**2
    read = places((operation.groups, tokens, columns), (operation.f_group, operation.f_row, 1), operation.f_offset)
    f = memory([read], operation.dtype)
    values = loaded(f, operation.dtype)[read]
    desc, confidence = reference.descriptor_head(operation, values)
    plain, plain_confidence = _plain(operation, values)
    pixels = desc.shape[:-1]
    outputs = {
        "desc": Expected("float32", _contiguous(desc.shape), desc, plain),
        "desc_conf": Expected("float32", _contiguous(pixels), confidence, plain_confidence),
    }
    if operation.desc16:
        padding = [(0, 0)] * 3 + [(0, operation.padded - operation.channels)]
        outputs["desc16"] = Expected("float16", _contiguous((*pixels, operation.padded)), np.pad(desc, padding), np.pad(plain, padding))
    return Case(launches(operation, tile, sm), {"f": f}, outputs)


def _contiguous(shape: tuple[int, ...]) -> Any:
    return np.arange(int(np.prod(shape))).reshape(shape)


def _plain(operation: DescriptorHead, values: Any) -> tuple[Any, Any]:
    """The reference in float32: pixels of (channel, i, j) columns, in the same order as there."""
    images, size = operation.groups * operation.batch, operation.patch
    split = values.astype(np.float32).reshape(images, operation.h, operation.w, -1, size, size)
    pixels = split.transpose(0, 1, 4, 2, 5, 3).reshape(images, operation.h * size, operation.w * size, -1)
    desc, last = pixels[..., : operation.channels], pixels[..., operation.channels]
    norm = np.sqrt((desc * desc).sum(-1, keepdims=True))
    return desc / np.maximum(norm, np.float32(operation.least_norm or 0)), np.float32(operation.confidence) + np.exp(last)


if __name__ == "__main__":
    print(json.dumps({name: errors(case(operation, tile, 80), on_cpu) for name, (operation, tile) in SMALL.items()}))
