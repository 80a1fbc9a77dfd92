"""torch model -> ONNX: one `encoder` and one `decoder` graph, whose batch, heights and widths are all dynamic.

    encoder: image (batch, 3, 16*rows, 16*cols) -> features (batch, rows, cols, C)
    decoder: features1, features2               -> pts3d{1,2}, conf{1,2}, desc{1,2}, desc_conf{1,2}

Features keep the token grid's shape, so the decoder knows it from its inputs, and one pair of graphs with one set of weights
serves every image shape and every mix of shapes. A backend that wants fixed shapes fixes the inputs' dimensions and folds.
"""

from __future__ import annotations

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

import onnx_ir as ir
import onnxscript.optimizer
import torch
from onnx_ir.passes.common import CommonSubexpressionEliminationPass, RemoveUnusedNodesPass
from torch import Tensor, nn
from torch.export import Dim

from smc.compiler.model import Mast3r
from smc.exported.errors import BackendFailed

OPSET = 23
"""The first opset whose standard operations include Attention and RotaryEmbedding, which the passes fuse into."""

OUTPUTS = tuple(f"{name}{view}" for view in (1, 2) for name in ("pts3d", "conf", "desc", "desc_conf"))

# The smallest grid is what DPT's halving and doubling need; the largest bounds torch's symbolic reasoning, not the graph.
_MIN_GRID, _MAX_GRID = 3, 512


@dataclass(frozen=True)
class Graphs:
    """The exported float32 graphs. Their initializers share the torch model's memory."""

    encoder: ir.Model
    decoder: ir.Model


class _Encoder(nn.Module):
    def __init__(self, model: Mast3r) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return self.model.encode(image)


class _Decoder(nn.Module):
    def __init__(self, model: Mast3r) -> None:
        super().__init__()
        self.model = model

    def forward(self, features1: Tensor, features2: Tensor) -> tuple[Tensor, ...]:
        maps = self.model.decode(features1, features2)
        return tuple(maps[name] for name in OUTPUTS)


def export_encoder(model: Mast3r) -> ir.Model:
    """Export `Mast3r.encode`. Raises BackendFailed."""
    rows, cols = _grid_dims("")
    dims = {"image": {0: _batch_dim(), 2: 16 * rows, 3: 16 * cols}}
    # Odd, unequal example sizes, so that no coincidence of sizes is taken for a rule.
    example = (torch.zeros(2, 3, 16 * 9, 16 * 13),)
    return _export(_Encoder(model), example, dims, ["features"])


def export_decoder(model: Mast3r) -> ir.Model:
    """Export `Mast3r.decode`. Raises BackendFailed."""
    batch, dim = _batch_dim(), model.config.enc_embed_dim
    dims = {f"features{view}": {0: batch} | dict(zip((1, 2), _grid_dims(str(view)), strict=True)) for view in (1, 2)}
    example = (torch.zeros(2, 9, 13, dim), torch.zeros(2, 11, 7, dim))
    return _export(_Decoder(model), example, dims, list(OUTPUTS))


def _batch_dim() -> Dim:
    return Dim("batch", min=1, max=4096)


def _grid_dims(view: str) -> tuple[Dim, Dim]:
    return Dim(f"rows{view}", min=_MIN_GRID, max=_MAX_GRID), Dim(f"cols{view}", min=_MIN_GRID, max=_MAX_GRID)


def _export(module: nn.Module, example: tuple[Tensor, ...], dims: dict[str, dict[int, Dim]], output_names: list[str]) -> ir.Model:
    try:
        with _quiet(), torch.no_grad():
            # Guards on parity and the like hold for every grid here; deferring them keeps the dimensions free.
            program = torch.export.export(
                module.eval(), example, dynamic_shapes=dims, strict=False, prefer_deferred_runtime_asserts_over_guards=True
            )
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=list(dims), output_names=output_names, optimize=False, verbose=False
            )
    except Exception as error:  # the exporter raises whatever its many stages raise
        raise BackendFailed(f"torch could not export the {type(module).__name__[1:].lower()}: {type(error).__name__}: {error}") from error
    assert onnx_program is not None  # only a debugging flag of the exporter makes it None
    model = onnx_program.model
    # Cleaned by hand: the exporter's own `optimize` also tries a hundred rewrite rules, which takes as long as the rest of the
    # export and finds nothing more in this graph.
    onnxscript.optimizer.fold_constants(model)
    RemoveUnusedNodesPass()(model)
    CommonSubexpressionEliminationPass()(model)
    for node in model.graph:
        node.metadata_props.clear()  # stack traces of the building machine
    _name_dimensions(model, dims)
    return model


def _name_dimensions(model: ir.Model, dims: dict[str, dict[int, Dim]]) -> None:
    """Call the dynamic dimensions by our names everywhere, where torch made up its own."""
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, dim in dims[str(value.name)].items():
            assert value.shape is not None
            names[str(value.shape[axis]).removeprefix("16*")] = dim.__name__.removeprefix("16*")
    for value in (*model.graph.inputs, *(output for node in model.graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else _renamed(size, names) for size in value.shape])


def _renamed(size: ir.SymbolicDim, names: dict[str, str]) -> ir.SymbolicDim:
    return ir.SymbolicDim(re.sub(r"\w+", lambda word: names.get(word[0], word[0]), str(size)))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's progress prints, and its remarks about torchvision, off the user's terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
