"""FixShapes: named dimensions of the graph's inputs get sizes, and every shape that follows from them becomes static."""

from __future__ import annotations

import re
from collections.abc import Mapping

import onnx_graphsurgeon as gs

from smc.passes.base import GraphRefused, Pass, PassReport
from smc.passes.prepare import infer_shapes
from smc.passes.tensors import Dim, dim_value


class FixShapes(Pass):
    """Dynamic dimensions of the inputs become static.

    Before: image (batch, 3, 16*rows, 16*cols).
    After, with {"batch": 1, "rows": 24, "cols": 32}: image (1, 3, 384, 512).

    A dimension is a name or arithmetic of names with +, -, * and //; one that has other names than those given stays dynamic.
    Shapes that tensors state as such arithmetic are computed, the others inferred again. No node changes: `FoldConstants` then
    finds the shape arithmetic constant. Counted are the dimensions of inputs that became static.
    """

    def __init__(self, dims: Mapping[str, int]) -> None:
        self._dims = dict(dims)

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        """Raises GraphRefused where a name is in no dimension of the graph's inputs."""
        dynamic = [size for tensor in graph.inputs for size in tensor.shape if isinstance(size, str)]
        names = {name for size in dynamic for name in (size, *re.findall(r"\w+", size))}
        if unknown := sorted(self._dims.keys() - names):
            raise GraphRefused(f"no input has a dimension {', '.join(unknown)}; there are {', '.join(dict.fromkeys(dynamic)) or 'none'}")
        report.rewrites = sum(isinstance(self._fixed(size), int) for size in dynamic)
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Variable) and tensor.shape is not None:
                tensor.shape = [self._fixed(size) for size in tensor.shape]
        infer_shapes(graph)

    def _fixed(self, size: Dim) -> Dim:
        value = dim_value(size, self._dims)
        return size if value is None else value
