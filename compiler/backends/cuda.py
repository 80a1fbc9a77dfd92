"""Plans for the project's own engine: cubins, weights and launch programs, for any NVIDIA GPU from compute capability 8.0.

Nothing here needs a GPU. There is a program for each stage, input shape and batch, and for the decoder for each pair of shapes. For one
pair there are two more: the describer, which is the decoder without what only the 3D points and their confidence need, and the matcher
of what either leaves.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from smc.compiler.backends.plan_job import PlanJob, Precision
from smc.compiler.packages import OLDEST_TRITON, is_old_triton
from smc.compiler.targets import Target
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS, Plan, Program, Resize, encode_plan
from smc.exported.errors import BackendFailed, BadInput, NoTarget

if TYPE_CHECKING:  # a plain installation, which only lists backends, has none of what is imported where it is used
    import onnx_graphsurgeon as gs

    from smc.compiler.launch_program import KernelTable
    from smc.compiler.tuning import Tuning
    from smc.passes.base import Pass

NAME = "cuda"

_OLDEST = 8.0
Shape = tuple[int, int]


def caveat(target: Target) -> str:
    return "" if target.sm == "9.0" else "not run on hardware yet"


def refusal(target: Target) -> str:
    if target.sm is None:
        return "runs on NVIDIA GPUs only"
    if float(target.sm) < _OLDEST:
        return f"sm {target.sm} is older than {_OLDEST}, the oldest that its kernels are for"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which compiles its kernels, is not installed"
    if is_old_triton(version()):
        return f"Triton {version()} is too old to compile its kernels, which takes {OLDEST_TRITON}"
    return ""


def precisions(target: Target) -> Sequence[Precision]:
    return ("hybrid", "fp16", "fp32")


def version() -> str:
    """Of the compiler of the kernels: plans carry their machine code and need nothing of it to run."""
    return metadata.version("triton")


def ingredients(target: Target, tuning: Path | None) -> Sequence[str]:
    return (_tuning(target, tuning).digest,)


def runs_here(target: Target) -> bool:
    try:
        from smc.exported.engines import cuda_memory

        return any(device.sm == target.sm for device in cuda_memory.devices())
    except NoTarget:
        return False


def write_plan(job: PlanJob) -> dict[str, str]:
    """Write `plan.json`, `kernels.bin` and `weights.bin`.

    Raises:
        BadInput: a graph holds what no kernel does.
        BackendFailed: a kernel does not compile, or a process that compiled them was killed.
        OSError: a file cannot be written.
    """
    from smc.compiler.kernel_cache import KernelCache
    from smc.compiler.launch_program import KernelTable
    from smc.compiler.lowering.context import CannotLower
    from smc.compiler.lowering.lower import lower
    from smc.compiler.lowering.parts import DESCRIPTORS
    from smc.compiler.lowering.program import ProgramWriter
    from smc.compiler.lowering.weight_file import WeightFile

    tuning = _tuning(job.target, job.tuning)
    table = KernelTable(tuning.sm, KernelCache(job.cache / "kernels", job.kernels))
    programs: list[Program] = []
    kinds = list(program_kinds(job))
    with WeightFile(job.output / WEIGHTS) as weights:
        writer = ProgramWriter(table, weights, tuning)
        for done, (stage, shapes, batch) in enumerate(kinds):
            title = " and ".join(dict.fromkeys(f"{width}x{height}" for height, width in shapes))
            job.report(f"lowering the {stage} for {title}, batch {batch}", done / len(kinds))
            try:
                lowered = lower(fixed_graph(job, stage, shapes, batch))
                programs.append(writer.write(stage, lowered))
                if stage == "decoder" and batch == 1:
                    decoder = programs[-1]
                    programs.append(writer.write("describer", lowered.only(DESCRIPTORS), like=decoder))
                    programs.append(writer.write_matcher(decoder))
            except CannotLower as error:
                raise BadInput(f"{stage}: {error}", fix="--backend tensorrt or tensorrt-rtx may take this graph") from error
            except ValueError as error:
                raise BackendFailed(f"{stage}: {error}") from error
    resize = _resize(table)
    (job.output / KERNELS).write_bytes(table.code)
    (job.output / PLAN).write_bytes(encode_plan(Plan(tuple(table.codes), tuple(programs), weights.size, resize)))
    return dict.fromkeys(job.graphs, PLAN)


def _resize(table: KernelTable) -> Resize:
    """The kernels for it. Raises BackendFailed: one does not compile."""
    from smc.plugins.resize.kernels import ACROSS, BYTES, DOWN, ROWS

    try:
        table.compile([ACROSS, DOWN])
        return Resize(table.number(ACROSS), table.number(DOWN), ROWS, BYTES)
    except ValueError as error:
        raise BackendFailed(f"resizing images: {error}") from error


def _tuning(target: Target, file: Path | None) -> Tuning:
    """A tuning file's, or what the project knows of the GPU. Raises BadInput: the file cannot be used, or is for another GPU."""
    from smc.compiler.tuning import Tuning, read_tuning, shipped_tuning

    sm = target.sm_number
    if file is None:
        return shipped_tuning(target.name, sm)
    found = read_tuning(file)
    if found.sm != sm:
        raise BadInput(f"{file}: tuned for sm {found.sm / 10}, and {target.title} has sm {target.sm}", fix="smc tune makes one for it")
    return Tuning(sm, found)


def program_kinds(job: PlanJob) -> Iterator[tuple[str, tuple[Shape, ...], int]]:
    """The programs of a plan: stage, the shape of each input, and batch. Equal shapes first: they stack weights that others share."""
    from smc.compiler.graph_files import read_onnx

    batches = sorted({1 << i for i in range(job.max_batch.bit_length())} | {job.max_batch})
    (image,) = read_onnx(job.graphs["encoder"]).graph.inputs
    assert image.shape is not None  # a build's graphs state those of their inputs
    # An encoder of one image serves any number of pairs: the engine gives it one after the other.
    images = {1} if image.shape[0] == 1 else {1, *(2 * batch for batch in batches)}
    for shape in job.shapes:
        for batch in sorted(images):
            yield "encoder", (shape,), batch
    pairs = sorted(itertools.product(job.shapes, repeat=2), key=lambda pair: pair[0] != pair[1])
    for pair in pairs:
        for batch in batches:
            yield "decoder", pair, batch


def fixed_graph(job: PlanJob, stage: str, shapes: Sequence[Shape], batch: int) -> gs.Graph:
    """A stage's typed graph with every dimension static and, for two views of one shape, both as one stream.

    Raises:
        BadInput: the graph does not take images of these shapes, or this batch.
    """
    from smc.compiler.graph_files import import_graph, read_onnx
    from smc.compiler.stage_inputs import dynamic_dims
    from smc.passes.batch_twins import BatchTwins
    from smc.passes.cancel_layout import CancelLayout
    from smc.passes.common_subexpressions import CommonSubexpressions
    from smc.passes.fix_shapes import FixShapes
    from smc.passes.fold_constants import FoldConstants

    graph = import_graph(read_onnx(job.graphs[stage]), stage)
    areas = {height * width for height, width in job.shapes}
    if stage == "decoder" and len(graph.inputs[0].shape) == 3 and len(areas) < len(job.shapes):
        raise BadInput("features without a grid, of input shapes of one area, cannot be told apart", fix="give one --shape of each area")
    passes: list[Pass] = [FixShapes(dynamic_dims(graph, stage, shapes, batch)), FoldConstants(), CancelLayout(), CommonSubexpressions()]
    if stage == "decoder" and shapes[0] == shapes[1]:
        passes.append(BatchTwins())
    for step in passes:
        step(graph)
    return graph
