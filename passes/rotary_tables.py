"""RotaryTables: the rotation tables of a dynamic token grid become slices of constant ones."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import Array, Editor, dim_value, dims, producer, run_node

_TOLERANCE = 1e-6
"""On cos and sin, whose last bit depends on where in an array a vectorised library finds the number."""


class RotaryTables(Pass):
    """cos and sin of a `RotaryEmbedding` are computed for the largest grid, once, and cut to the actual one.

    Before: cos = Expand(f(rows, cols), (batch, 1, 1)), f being arithmetic on the sizes of rows x cols tokens, as Range, Mul and
    Cos, that makes (1, rows*cols, head_dim/2) or (rows*cols, head_dim/2).
    After: cos = Expand(Reshape(Slice(table, end=(rows, cols)), (1, -1, head_dim/2)), (batch, 1, 1)), table being constant and of
    max_rows x max_cols x head_dim/2.

    What f computes is found out by running it: for the largest grid, and for others, where it must be the part of the table that
    the slice takes. A larger grid than the largest cannot run: its tables would have fewer positions than its tokens. Counted are
    the tables.
    """

    def __init__(self, max_rows: int, max_cols: int) -> None:
        self._max_rows = max_rows
        self._max_cols = max_cols

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit = Editor(graph)
        seen: set[str] = set()
        for rotary in [node for node in graph.nodes if node.op == "RotaryEmbedding"]:
            for cache in rotary.inputs[1:3]:
                tensor = _unbatched(cache)
                if tensor.name not in seen and not isinstance(tensor, gs.Constant):
                    seen.add(tensor.name)
                    with report.attempt(rotary):
                        self._replace(edit, tensor)
                        report.rewrites += 1

    def _replace(self, edit: Editor, tensor: gs.Tensor) -> None:
        formula = _Formula(edit.graph, tensor)
        grid, values = self._find(formula)
        lead, table = values.shape[:-2], values.reshape(self._max_rows, self._max_cols, -1)
        name = tensor.name
        ends = edit.node(
            "Shape", [grid.tensor], name=f"{name}/grid", dtype=np.dtype(np.int64), shape=[2], start=grid.axis, end=grid.axis + 2
        )
        bounds = [edit.integers([0, 0], "front"), ends, edit.integers([0, 1], "rows_and_cols")]
        constant = edit.constant(table, f"{name}/largest")
        part = edit.node("Slice", [constant, *bounds], name=f"{name}/part", dtype=table.dtype, shape=[grid.rows, grid.cols, table.shape[2]])
        shape = edit.integers([*lead, -1, table.shape[2]], "table_shape")
        edit.node("Reshape", [part, shape], name=f"{name}/by_token", output=tensor)

    def _find(self, formula: _Formula) -> tuple[_Grid, Array]:
        """The grid whose rows and columns a table depends on, and the table of the largest."""
        why = Refusal(f"{formula.tensor.name} depends on no two neighbouring dimensions of a tensor")
        for grid in formula.grids():
            try:
                return grid, self._checked(formula, grid)
            except Refusal as found:
                why = found
        raise why

    def _checked(self, formula: _Formula, grid: _Grid) -> Array:
        largest = formula.value(grid, self._max_rows, self._max_cols, others=1)
        tokens = self._max_rows * self._max_cols
        if largest.ndim < 2 or largest.size != tokens * largest.shape[-1] or largest.shape[-2] != tokens:
            raise Refusal(f"{formula.tensor.name} is of shape {list(largest.shape)} for {tokens} tokens")
        table = largest.reshape(self._max_rows, self._max_cols, -1)
        for rows, cols in ((1, 1), (1, self._max_cols), (self._max_rows, 1), (2, 3), (3, 2)):
            if rows <= self._max_rows and cols <= self._max_cols:
                value = formula.value(grid, rows, cols, others=3)
                part = table[:rows, :cols].reshape(*largest.shape[:-2], rows * cols, -1)
                if value.shape != part.shape or np.abs(value - part).max() > _TOLERANCE:
                    grids = f"{rows} x {cols} tokens is not part of that of {self._max_rows} x {self._max_cols}"
                    raise Refusal(f"{formula.tensor.name} for {grids}")
        return largest


def _unbatched(cache: gs.Tensor) -> gs.Tensor:
    """The table below its repetition for the batch."""
    node = producer(cache)
    return node.inputs[0] if node is not None and node.op == "Expand" else cache


@dataclass(frozen=True)
class _Grid:
    """Axes `axis` and `axis` + 1 of a tensor, whose sizes are named `rows` and `cols`."""

    tensor: gs.Tensor
    axis: int
    rows: str
    cols: str


class _Formula:
    """What computes a tensor from the sizes of others. Raises Refusal where it depends on more than sizes."""

    def __init__(self, graph: gs.Graph, tensor: gs.Tensor) -> None:
        self.tensor = tensor
        self._nodes: list[gs.Node] = []
        needed = {tensor.name}
        for node in reversed(graph.nodes):
            if any(output.name in needed for output in node.outputs):
                self._nodes.insert(0, node)
                if node.op != "Shape":
                    needed |= {operand.name for operand in node.inputs}
        for operand in graph.inputs:
            if operand.name in needed:
                raise Refusal(f"{tensor.name} depends on the values of {operand.name}")
        self._measured = list({node.inputs[0].name: node.inputs[0] for node in self._nodes if node.op == "Shape"}.values())
        words = [re.findall(r"\w+", size) for measured in self._measured for size in dims(measured) or [] if isinstance(size, str)]
        self._names = {word for found in words for word in found}

    def grids(self) -> list[_Grid]:
        """Neighbouring named dimensions of the tensors whose sizes are used."""
        return [
            _Grid(tensor, axis, rows, cols)
            for tensor in self._measured
            for axis, (rows, cols) in enumerate(pairwise(dims(tensor) or []))
            if isinstance(rows, str) and isinstance(cols, str) and rows != cols and {rows, cols} <= self._names
        ]

    def value(self, grid: _Grid, rows: int, cols: int, others: int) -> Array:
        """The tensor for a grid of rows x cols, all `others` of the named dimensions being of that size."""
        sizes = dict.fromkeys(self._names, others) | {grid.rows: rows, grid.cols: cols}
        values: dict[str, Array] = {}
        for node in self._nodes:
            values |= {tensor.name: tensor.values for tensor in node.inputs if isinstance(tensor, gs.Constant)}
            results = [_sizes(node, sizes)] if node.op == "Shape" else run_node(node, values)
            values |= zip((output.name for output in node.outputs), results, strict=True)
        return values[self.tensor.name]


def _sizes(node: gs.Node, sizes: dict[str, int]) -> Array:
    """What a Shape makes where the named dimensions have `sizes`."""
    shape = dims(node.inputs[0])
    used = [None] if shape is None else shape[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    found = [dim_value(size, sizes) for size in used]
    if any(size is None for size in found):
        raise Refusal(f"{label(node)} takes the size of a dimension of {node.inputs[0].name} that is not known")
    return np.array(found, dtype=np.int64)
