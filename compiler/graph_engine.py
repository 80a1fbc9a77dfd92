"""Typed graphs as an engine: what stands in for a GPU's engine where that cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.graph_files import read_graph
from smc.compiler.graph_runner import GraphRunner
from smc.exported.engines import Maps
from smc.exported.images import as_plan_input


class GraphEngine:
    """Encoder and decoder graphs in ONNX Runtime on the CPU, every operation rounded to its tensors' types.

    Implements `smc.exported.engines.Engine`.
    """

    def __init__(self, graphs: Mapping[str, gs.Graph]) -> None:
        self._image = graphs["encoder"].inputs[0]
        self._features = [tensor.name for tensor in graphs["decoder"].inputs]
        self._encoder = GraphRunner(graphs["encoder"])
        self._decoder = GraphRunner(graphs["decoder"])

    @classmethod
    def from_files(cls, files: Mapping[str, memoryview]) -> GraphEngine:
        """Over the graphs among a bundle's files, given by their contents. Raises BundleDamaged where they are none."""
        return cls({stage: read_graph(files, stage) for stage in ("encoder", "decoder")})

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[Any]:
        pixels = as_plan_input(images, self._image.dtype)
        (features,) = self._encoder.run({self._image.name: pixels}).values()
        return features

    def decode(self, features1: NDArray[Any], features2: NDArray[Any]) -> Maps:
        return self._decoder.run(dict(zip(self._features, (features1, features2), strict=True)))
