"""The operation of `specification`, written plainly in float64: what the kernel is compared with."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from smc.plugins.reduction.specification import Reduction


def reduction(operation: Reduction, x: ArrayLike) -> NDArray[np.float64]:
    """The sums or norms of the rows of x (rows, columns)."""
    x = np.asarray(x, np.float64)
    return x.sum(axis=1) if operation.function == "sum" else np.sqrt((x**2).sum(axis=1))
