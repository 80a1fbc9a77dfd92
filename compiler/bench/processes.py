"""Running contestants, each in a process of its own: one that fails, hangs or runs out of memory takes nothing else with it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from smc.compiler.bench.records import Figure, Result
from smc.compiler.bench.sampling import summarise
from smc.compiler.bench.tasks import Task
from smc.exported.errors import BackendFailed

COLD_STARTS = 3


def run_task(task: Task, folder: Path, timeout: float) -> Result:
    """Measure in a process of its own. What it found before it failed, or before `timeout` seconds were over, is kept."""
    task_file, result_file = folder / "task.json", folder / "result.json"
    task_file.write_bytes(msgspec.json.encode(task))
    result_file.unlink(missing_ok=True)
    failure = _run(["smc.compiler.bench.worker", str(task_file), str(result_file)], folder, timeout)[1]
    result = msgspec.json.decode(result_file.read_bytes(), type=Result) if result_file.exists() else Result()
    result.failure = result.failure or failure
    return result


def cold_starts(bundle: Path, folder: Path, timeout: float) -> dict[str, Figure]:
    """Times of fresh processes that load a bundle and match once; its files are in the system's cache. Raises BackendFailed."""
    seconds: dict[str, list[float]] = {}
    for _ in range(COLD_STARTS):
        out, failure = _run(["smc.compiler.bench.cold", str(bundle), repr(time.time())], folder, timeout)
        if failure:
            raise BackendFailed(f"{bundle}: loading it and matching once failed: {failure}")
        for part, value in json.loads(out).items():
            seconds.setdefault(part, []).append(value)
    return {part: summarise(values) for part, values in seconds.items()}


def _run(module_and_arguments: Sequence[str], folder: Path, timeout: float) -> tuple[str, str]:
    """Run a module. Returns what it printed, and why it failed, or ""."""
    # -P: a folder named like the package, in the current directory, is not it.
    command = [sys.executable, "-P", "-m", *module_and_arguments]
    log = folder / "errors.txt"
    with log.open("wb") as errors:
        # A session of its own, so that compilers that it starts end with it.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, start_new_session=True)
        try:
            out, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return "", f"stopped after {timeout:.0f} seconds"
        finally:
            _end(process)
    if process.returncode == 0:
        return out.decode(), ""
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit status {process.returncode}"
    return "", f"{how}: {last[0][:300]}" if last else how


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all of its session, if they still run."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.stdout is not None
    process.stdout.close()
