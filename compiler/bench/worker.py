"""One contestant's process: `python -m smc.compiler.bench.worker TASK RESULT`, both JSON files."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

from smc.compiler.bench.records import Result
from smc.compiler.bench.tasks import OnnxRuntimeTask, PlanTask, Task, TorchTask, WeightsTask


def main(task_file: Path, result_file: Path) -> None:
    task: Task = msgspec.json.decode(task_file.read_bytes(), type=Task)
    result = Result()

    def save() -> None:
        temporary = result_file.with_suffix(".part")
        temporary.write_bytes(msgspec.json.encode(result))
        os.replace(temporary, result_file)

    try:
        _run(task, result, save)
    except Exception as error:  # whatever a peer's library raises is that peer's result
        traceback.print_exc()
        result.failure = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
    save()


def _run(task: Task, result: Result, save: Callable[[], None]) -> None:
    # Each imports what it measures, and nothing else: the processes' memory is a figure.
    match task:
        case WeightsTask():
            from smc.compiler.bench.measure_torch import write_weights

            write_weights(task)
        case TorchTask():
            from smc.compiler.bench.measure_torch import measure_torch

            measure_torch(task, result, save)
        case PlanTask():
            from smc.compiler.bench.measure_engine import measure_plan

            measure_plan(task, result, save)
        case OnnxRuntimeTask():
            from smc.compiler.bench.measure_engine import measure_onnxruntime

            measure_onnxruntime(task, result, save)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
