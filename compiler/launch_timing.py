"""Timing launches on a GPU: candidates are compiled anywhere into a job, a directory, and timed where the GPU is.

Each candidate runs many times in one captured graph, which is replayed and timed by events. What an operation would find in cache in
a plan (activations) stays in place; what it would not (weights) is another copy every time, so that it comes from memory.
Operands hold noise, each its own, but for those whose values say what there is to do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from smc.compiler.kernel_cache import KernelCache
from smc.compiler.launch_program import ALIGNMENT, KernelTable, itemsize
from smc.exported.engines.cuda_program import KERNELS, PLAN, Plan, Program, Region, decode_plan, encode_plan
from smc.plugins.compile import shared_memory_limit
from smc.plugins.launch import Launch

COLD_BYTES = 200 << 20
"""How much memory the copies of cold operands take: several times the largest second-level cache."""

Report = Callable[[str, float], None]

REPEATS = 32
"""Launches in one captured graph."""

_DTYPES = ("float16", "bfloat16", "float32", "uint8", "int32", "int64")


@dataclass(frozen=True)
class Operand:
    """An operand of a candidate.

    Attributes:
        dtype: element type, as numpy names it.
        shape: its sizes.
        cold: whether it comes from memory, not from cache.
        values: for integers that say what there is to do, such as counts and indices: all of them, row by row. Else None.
    """

    dtype: str
    shape: tuple[int, ...]
    cold: bool = False
    values: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Candidate:
    """One way to do an operation.

    Attributes:
        operation: what is computed, the same for all candidates that compete.
        name: which way.
        launches: in order.
        operands: of the launches, by name.
    """

    operation: str
    name: str
    launches: Sequence[Launch]
    operands: dict[str, Operand]


class _Entry(msgspec.Struct):
    operation: str
    name: str
    program: int
    values: dict[str, tuple[int, ...]]


class _Job(msgspec.Struct):
    entries: list[_Entry]
    declined: dict[str, str]


def write_job(candidates: Iterable[Candidate], sm: int, directory: Path, cache: KernelCache | None = None) -> dict[str, str]:
    """Compile candidates into `directory`; those that do not fit the GPU are left out. Returns "operation name" -> why for these."""
    directory.mkdir(parents=True, exist_ok=True)
    candidates = list(candidates)
    table = KernelTable(sm, cache or KernelCache(None))
    table.compile([launch.kernel for candidate in candidates for launch in candidate.launches])
    entries: list[_Entry] = []
    programs: list[Program] = []
    declined: dict[str, str] = {}
    for candidate in candidates:
        try:
            program = _program(candidate, table, sm)
        except ValueError as why:
            declined[f"{candidate.operation} {candidate.name}"] = str(why)
            continue
        values = {f"{name}.0": operand.values for name, operand in candidate.operands.items() if operand.values is not None}
        entries.append(_Entry(candidate.operation, candidate.name, len(programs), values))
        programs.append(program)
    (directory / PLAN).write_bytes(encode_plan(Plan(tuple(table.codes), tuple(programs), 0)))
    (directory / KERNELS).write_bytes(table.code)
    (directory / "job.json").write_bytes(msgspec.json.encode(_Job(entries, declined)))
    return declined


def _program(candidate: Candidate, table: KernelTable, sm: int) -> Program:
    """REPEATS times the launches, each time with other copies of the cold operands."""
    for launch in candidate.launches:
        needed = table.compiled(launch.kernel).shared_memory
        if needed > shared_memory_limit(sm):
            raise ValueError(f"{needed:,} bytes of shared memory a block")
    cold = sum(_size(operand) for operand in candidate.operands.values() if operand.cold)
    copies = min(REPEATS, max(1, COLD_BYTES // max(cold, 1)))
    regions: dict[str, Region] = {}
    end = 0
    for name, operand in candidate.operands.items():
        for copy in range(copies if operand.cold else 1):
            regions[f"{name}.{copy}"] = Region("arena", end, operand.dtype, operand.shape)
            end += _size(operand)
    steps = []
    for repeat in range(REPEATS):
        places: dict[str, Any] = {
            name: ("arena", regions[f"{name}.{repeat % copies if operand.cold else 0}"].offset)
            for name, operand in candidate.operands.items()
        }
        steps += [table.step(launch, places) for launch in candidate.launches]
    return Program(candidate.name, regions, {}, end, tuple(steps))


def _size(operand: Operand) -> int:
    return -(-math.prod(operand.shape) * itemsize(operand.dtype) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Timing:
    """Microseconds for one go of a candidate: the median of replays, and the fastest; `failure` where it did not run."""

    operation: str
    name: str
    median: float
    fastest: float
    failure: str = ""


def time_job(directory: Path, device: int = 0, report: Report = lambda description, fraction: None, replays: int = 7) -> list[Timing]:
    """Time every candidate of a job on this machine's GPU of that number. Raises NoTarget without one."""
    from smc.exported.engines import cuda_launch
    from smc.exported.engines import cuda_memory as cuda
    from smc.exported.errors import BackendFailed, SmcError

    cuda.use_device(device)
    job = msgspec.json.decode((directory / "job.json").read_bytes(), type=_Job)
    plan = decode_plan((directory / PLAN).read_bytes())
    kernels = cuda_launch.Kernels((directory / KERNELS).read_bytes(), plan.kernels)
    stream = cuda.Stream()
    arena = cuda.DeviceArray(cuda.device_pool(), (max(program.arena_bytes for program in plan.programs),), np.uint8)
    noise = {dtype: _noise(np.random.default_rng(0), dtype) for dtype in _DTYPES}
    timings = []
    for done, entry in enumerate(job.entries):
        report(f"timing {entry.operation.partition(' ')[0]}, {done} of {len(job.entries)}", done / len(job.entries))
        program = plan.programs[entry.program]
        try:
            for number, (name, region) in enumerate(program.inputs.items()):
                if name in entry.values:
                    given = np.array(entry.values[name], region.dtype)
                    stream.copy(arena.address + region.offset, given.ctypes.data, given.nbytes)
                    stream.synchronize()
                else:
                    _fill(stream, arena.address + region.offset, region, noise[region.dtype], number)
            graph = cuda_launch.capture(program, kernels, {"arena": arena.address, "weights": 0}, stream)
            times = [1e6 * cuda.elapsed(stream, lambda g=graph: g.launch(stream)) / REPEATS for _ in range(replays + 2)][2:]  # type: ignore[misc]
            timings.append(Timing(entry.operation, entry.name, statistics.median(times), min(times)))
        except SmcError as error:
            try:
                stream.synchronize()
            except SmcError as broken:  # nothing runs any more in this process, and no later candidate is to blame
                raise BackendFailed(f"{entry.operation}, {entry.name}: it broke the GPU's work: {error}") from broken
            timings.append(Timing(entry.operation, entry.name, math.inf, math.inf, str(error)))
    return timings


def best(timings: Iterable[Timing]) -> dict[str, list[Timing]]:
    """Operation -> its candidates, the fastest first."""
    found: dict[str, list[Timing]] = {}
    for timing in timings:
        found.setdefault(timing.operation, []).append(timing)
    return {operation: sorted(ways, key=lambda timing: timing.median) for operation, ways in found.items()}


def _noise(random: np.random.Generator, dtype: str) -> np.ndarray[Any, Any]:
    """4 MiB of values as a network has them; zeros would run faster than real data."""
    count = (4 << 20) // itemsize(dtype)
    if dtype == "bfloat16":
        return (random.standard_normal(count).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if np.dtype(dtype).kind == "f":
        return random.standard_normal(count).astype(dtype)
    return np.zeros(count, dtype) if dtype.startswith("int") else random.integers(0, 256, count).astype(dtype)


def _fill(stream: Any, address: int, region: Region, noise: np.ndarray[Any, Any], number: int) -> None:
    """Fill a region with noise, over and over; regions of different numbers with different noise."""
    left = math.prod(region.shape) * itemsize(region.dtype)
    first = number * 65_537 * noise.itemsize % noise.nbytes
    while left > 0:
        piece = min(left, noise.nbytes - first)
        stream.copy(address, noise.ctypes.data + first, piece)
        address, left, first = address + piece, left - piece, 0
