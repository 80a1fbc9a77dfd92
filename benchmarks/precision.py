"""What each precision costs in accuracy: errors of a GPU plan's typed graphs against float32, and the overlap of the matches.

    python benchmarks/precision.py BUNDLE [--shape 512x384] [--backend tensorrt|cuda]

BUNDLE is one for CPUs: it holds the float32 graphs. Prints a table in Markdown; run on the two shipped photographs.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import tempfile
import time
from importlib import metadata
from pathlib import Path

from smc.compiler import verify
from smc.compiler.graph_engine import GraphEngine
from smc.compiler.optimize import StageGraph
from smc.compiler.pipeline import FLOAT32_STREAMS, PIPELINES, PipelineTask, Precision
from smc.compiler.source import STAGES, OnnxSource

PRECISIONS: dict[str, tuple[Precision, ...]] = {"tensorrt": ("fp32", "hybrid", "fp16", "bf16"), "cuda": ("fp32", "hybrid", "fp16")}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--shape", default="512x384")
    parser.add_argument("--backend", choices=["tensorrt", "cuda"], default="tensorrt", help="whose passes")
    options = parser.parse_args()
    width, height = map(int, options.shape.split("x"))
    source = OnnxSource(*(options.bundle / f"{stage}.onnx" for stage in STAGES))
    (pair,) = verify.sample_pairs([(height, width)])
    (reference,) = source.run([pair], lambda what, done: None)

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("onnxruntime", "onnx-graphsurgeon"))
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, Python {platform.python_version()}, {versions}.")
    command = f"python benchmarks/precision.py BUNDLE --shape {options.shape} --backend {options.backend}"
    print(f"`{command}`, {source.info.parameters / 1e6:.1f} M parameters\n")
    names = [name for name in reference if not name.startswith("features")]
    print(f"| precision | islands | features | {' | '.join(names)} | matches | overlap | calibration, s |")
    print("|" + "---|" * (len(names) + 6))
    for precision in PRECISIONS[options.backend]:
        start = time.perf_counter()
        engine, islands = typed(source, options.backend, precision, pair, reference)
        seconds = time.perf_counter() - start
        report = verify.compare(reference, verify.run_engine(engine, pair), pair.shapes)
        errors = [f"{report.outputs[name].relative:.1e}" for name in names]
        features = max(report.outputs[f"features{view}"].relative for view in (1, 2))
        print(
            f"| {precision} | {islands} | {features:.1e} | {' | '.join(errors)} | {report.matches_plan} of {report.matches_reference} "
            f"| {report.match_overlap:.3f} | {seconds:.0f} |",
            flush=True,
        )


def typed(
    source: OnnxSource, backend: str, precision: Precision, pair: verify.SamplePair, reference: verify.Outputs
) -> tuple[GraphEngine, int]:
    """A backend's graphs as an engine, and how many of their nodes stay in float32."""
    feeds = {
        "encoder": [[pair.view1], [pair.view2]],
        "decoder": [[reference["features1"][None], reference["features2"][None]]],
    }
    islands = 0
    with tempfile.TemporaryDirectory() as folder:
        for stage, model in source.export(lambda what, done: None).items():
            task = PipelineTask(stage, [pair.shapes[0]], 1, precision, (), (), (backend, stage) in FLOAT32_STREAMS)
            graph = StageGraph(model, task, None, lambda what, done: None)
            graph.run(PIPELINES[backend])
            graph.cast(feeds[stage])
            islands += sum(len(step.islands) for step in graph.write(Path(folder)).passes)
            del graph
        files = {path.name: memoryview(path.read_bytes()) for path in Path(folder).iterdir()}
    return GraphEngine.from_files(files), islands


if __name__ == "__main__":
    main()
