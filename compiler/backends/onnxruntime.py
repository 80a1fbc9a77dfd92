"""Plans for ONNX Runtime: the float32 graphs as they are, for any CPU."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from smc.compiler.targets import Target
from smc.exported.manifest import Tolerance

if TYPE_CHECKING:
    from smc.compiler.bundle_writer import Staging
    from smc.compiler.export import Graphs

NAME = "onnxruntime"

TOLERANCE = Tolerance(relative=2e-5, worst_pixel=1e-3, match_overlap=0.99)
"""Two correct float32 implementations differ by about 2e-6 here; ten times that is a defect."""


def refusal(target: Target) -> str:
    return "" if target.sm is None else "runs on CPUs only"


def version() -> str:
    return metadata.version("onnxruntime")


def write_plan(graphs: Graphs, staging: Staging) -> dict[str, str]:
    """Write `encoder.onnx`, `decoder.onnx` and their weights."""
    import onnx_ir

    from smc.exported.engines.onnxruntime import WEIGHTS_SUFFIX

    stages = {}
    for stage, graph in (("encoder", graphs.encoder), ("decoder", graphs.decoder)):
        with staging.writing() as directory:
            onnx_ir.save(graph, directory / f"{stage}.onnx", external_data=f"{stage}{WEIGHTS_SUFFIX}")
        stages[stage] = f"{stage}.onnx"
    return stages
