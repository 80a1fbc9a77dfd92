"""A stage's graph through the passes into its file, and what they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from smc.compiler.graph_files import GraphDumper, import_graph, write_graph
from smc.compiler.pipeline import Pipeline, PipelineTask, fixed_dims
from smc.compiler.reports import PassSummary, StageReport
from smc.exported.errors import BadInput
from smc.exported.images import as_plan_input
from smc.passes.base import GraphRefused, Pass, PassReport, label

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs
    import onnx_ir as ir

Report = Callable[[str, float], None]


class StageGraph:
    """A stage's graph on its way from the export into its file."""

    def __init__(self, model: ir.Model, task: PipelineTask, dumper: GraphDumper | None, report: Report) -> None:
        """Take over an exported float32 graph, whose weights must stay as they are until the graph is written.

        Args:
            model: the graph.
            task: what it is to become.
            dumper: writes the graph after every pass, or None.
            report: told the progress, from 0 to 1.

        Raises:
            BadInput: the passes cannot work on this graph.
        """
        self.graph = import_graph(model, task.stage)
        self._task, self._dumper, self._report = task, dumper, report
        self._passes: list[PassSummary] = []

    def run(self, pipeline: Pipeline) -> None:
        """Apply a backend's passes. Raises BadInput."""
        for step in pipeline(self._task, fixed_dims(self.graph, self._task)):
            self._apply(step)

    def cast(self, feeds: Sequence[Sequence[NDArray[Any]]]) -> None:
        """Give every tensor its precision.

        Args:
            feeds: samples to calibrate with: for each, the graph's inputs in order, images as float32 pixels.

        Raises:
            BadInput: the graph has a tensor of unknown type, or is to stay in float32 and computes in another type itself.
            BackendFailed, OutOfMemory: the samples could not be run.
        """
        from smc.compiler.calibration import plan_precision

        task = self._task
        if task.precision == "fp32":
            _check_float32(self.graph, task.stage)
            return
        plan = plan_precision(
            self.graph,
            task.precision,
            [_feed(self.graph, values) for values in feeds],
            lambda what: self._report(f"{what} of the {task.stage}", 0.4),
            include=task.include,
            exclude=task.exclude,
            streams=task.streams,
        )
        self._apply(plan)

    def write(self, directory: Path) -> StageReport:
        """Write the graph as `directory`/STAGE.onnx. Raises OSError."""
        self._report(f"writing the {self._task.stage}", 0.9)
        write_graph(self.graph, directory, self._task.stage)
        return StageReport(self._task.stage, self._passes)

    def _apply(self, step: Pass) -> None:
        stage = self._task.stage
        self._report(f"{step.name} on the {stage}", len(self._passes) / 32)
        try:
            self._passes.append(_summary(step(self.graph)))
        except GraphRefused as error:
            raise BadInput(f"{stage}, {step.name}: {error}") from error
        if self._dumper is not None:
            self._dumper.dump(stage, len(self._passes), step.name, self.graph)


def _check_float32(graph: gs.Graph, stage: str) -> None:
    """Raise BadInput where a node computes in float16 or bfloat16. Weights may be stored in these."""
    from onnx import TensorProto

    from smc.compiler.graph_runner import low_precision

    for node in graph.nodes:
        for tensor in node.outputs:
            low = low_precision(tensor)
            if low is not None and node.op != "Constant":
                name = TensorProto.DataType.Name(low).lower()
                raise BadInput(
                    f"{stage}: the model itself computes in {name}, by {label(node)}, and the plan is to be in float32",
                    fix="export the model in float32",
                )


def _summary(report: PassReport) -> PassSummary:
    islands = getattr(report, "islands", ())
    return PassSummary(
        name=report.name,
        rewrites=report.rewrites,
        nodes_before=report.nodes_before,
        nodes_after=report.nodes_after,
        declined=[(declined.node, declined.why) for declined in report.declined],
        islands=[(island.node, island.reason) for island in islands],
    )


def _feed(graph: gs.Graph, values: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The graph's inputs by name; pixels as bytes where the graph takes those."""
    return {tensor.name: as_plan_input(value, tensor.dtype) for tensor, value in zip(graph.inputs, values, strict=True)}
