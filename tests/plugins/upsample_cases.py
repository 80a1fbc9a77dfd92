"""Enlargements for the kernel, on the CPU under Triton's interpreter and on a GPU.

    TRITON_INTERPRET=1 python -m tests.plugins.upsample_cases

prints, as JSON, each small case's errors on the CPU and those of a plain computation of the same precision.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from smc.plugins.conv.specification import Dtype, contiguous
from smc.plugins.upsample import launches, reference
from smc.plugins.upsample.launches import Tile
from smc.plugins.upsample.specification import Upsample
from tests.plugins.conv_cases import LAYOUTS, Errors, gather, relative, run, scatter


@dataclass(frozen=True)
class Case:
    height: int
    width: int
    out_height: int
    out_width: int
    channels: int
    groups: int = 2
    batch: int = 1
    dtype: Dtype = "float16"
    layout: str = "contiguous"
    residual: bool = False
    both: bool = False
    tile: Tile | None = None

    @property
    def name(self) -> str:
        sizes = f"{self.groups}x{self.batch}x{self.height}x{self.width}-{self.out_height}x{self.out_width}x{self.channels}"
        return "-".join(
            [
                sizes,
                self.dtype,
                self.layout,
                *(n for n in ("residual", "both") if getattr(self, n)),
                *([str(self.tile)] if self.tile else []),
            ]
        )

    @property
    def operation(self) -> Upsample:
        make, large = LAYOUTS[self.layout], (self.dtype, self.batch, self.out_height, self.out_width, self.channels)
        x = make(self.dtype, self.batch, self.height, self.width, self.channels)
        sizes = (self.groups, self.batch, self.height, self.width, self.out_height, self.out_width, self.channels)
        return Upsample(*sizes, x, make(*large), make(*large) if self.residual else None, contiguous(*large) if self.both else None)


SMALL = [
    Case(3, 4, 6, 8, 32),
    Case(5, 7, 10, 14, 24, batch=2, layout="spread", residual=True, both=True),
    Case(4, 3, 8, 6, 40, layout="turned", both=True, tile=Tile(4, 4, 16, 4)),
    Case(1, 1, 2, 2, 16, groups=1),
    Case(6, 5, 1, 3, 16, groups=1, residual=True),
    Case(4, 5, 11, 9, 8, groups=1),
    Case(4, 5, 8, 9, 16, groups=1, batch=2, residual=True, both=True),
    Case(2, 3, 6, 10, 16, groups=1),
    Case(9, 7, 18, 14, 8, groups=3, batch=2, tile=Tile(2, 2, 16, 1)),
    Case(3, 3, 6, 6, 16, dtype="float32", residual=True),
]


LARGE = [
    Case(48, 64, 96, 128, 256, residual=True, both=True),
    Case(37, 50, 74, 100, 128, batch=2, layout="spread", both=True),
    Case(24, 32, 50, 70, 96, layout="turned", tile=Tile(4, 8, 64, 8)),
    Case(33, 20, 66, 40, 64, dtype="float32", residual=True),
]


def errors(case: Case, on_gpu: bool, seed: int = 0) -> Errors:
    op, random = case.operation, np.random.default_rng(seed)
    shape = (op.groups, op.batch, op.out_height, op.out_width, op.channels)
    x = random.standard_normal((op.groups, op.batch, op.height, op.width, op.channels)).astype(case.dtype)
    residual = random.standard_normal(shape).astype(case.dtype) if op.residual else None
    results = {"out": op.out} | ({"out_relu": op.out_relu} if op.out_relu else {})
    flat = {"x": scatter(op.x, x)} | {name: scatter(place, np.full(shape, np.nan, case.dtype)) for name, place in results.items()}
    if op.residual and residual is not None:
        flat["residual"] = scatter(op.residual, residual)
    after = run(launches.launches(op, case.tile or launches.default_tile(op, 90), 90), flat, on_gpu)

    exact = reference.upsample(x, op.out_height, op.out_width, residual)
    wide = torch.from_numpy(x).float().flatten(0, 1).permute(0, 3, 1, 2)
    plain = (
        F.interpolate(wide, (op.out_height, op.out_width), mode="bilinear", align_corners=True).permute(0, 2, 3, 1).reshape(shape).numpy()
    )
    if residual is not None:
        plain = plain + residual.astype(np.float32)
    found: Errors = {}
    for name, place in results.items():
        limit = 0.0 if name == "out_relu" else -np.inf
        want = np.maximum(exact, limit)
        found[name] = relative(gather(place, after[name], shape), want), relative(np.maximum(plain, limit).astype(case.dtype), want)
    return found


if __name__ == "__main__":
    print(json.dumps({case.name: errors(case, on_gpu=False) for case in SMALL}))
