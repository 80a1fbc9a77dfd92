"""The matrix product's activation by itself, on the CPU under Triton's interpreter.

    TRITON_INTERPRET=1 python -m tests.plugins.gelu_case

prints its largest error, up to |x| = 12 and beyond, as JSON.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import json
import math

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from smc.plugins.gemm.kernel import gelu

BLOCK = 4096


@triton.jit
def _gelu(x, out, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + place, gelu(tl.load(x + place), False))


def error(x: NDArray[np.float32]) -> float:
    """The largest difference to float64's; `x` is float32, a multiple of BLOCK long."""
    out = torch.full((len(x),), math.nan)
    _gelu[(len(x) // BLOCK,)](torch.from_numpy(x), out, BLOCK)
    exact = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x.tolist()]
    return float(np.abs(out.numpy() - np.array(exact)).max())


if __name__ == "__main__":
    far = np.geomspace(12, 6e4, BLOCK, dtype=np.float32)
    print(json.dumps([error(np.linspace(-12, 12, 8 * BLOCK, dtype=np.float32)), error(np.concatenate([far, -far]))]))
