"""Tuning: the fastest tile of every operation of a bundle, by timing on the GPU that it is for.

Candidates are compiled where there is time and cores (`prepare`), and timed where there is the GPU (`measure`); both may be one machine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from smc.compiler.backends import cuda
from smc.compiler.backends.plan_job import PlanJob
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.launch_timing import Candidate, Operand, best, time_job, write_job
from smc.compiler.lowering.context import Call
from smc.compiler.lowering.lower import Lowered, lower
from smc.compiler.operations import launches, tiles, workspace
from smc.compiler.output_files import replacing, writing
from smc.compiler.targets import find_target
from smc.compiler.tuning import Tuned, TuningFile, describe, tile_fields
from smc.exported.bundle import open_bundle
from smc.exported.errors import BackendFailed, BadInput, UsageError
from smc.exported.matching import starting_points
from smc.plugins.compile import compiler_version
from smc.plugins.matching import launches as matching
from smc.plugins.matching.specification import GRID_STEP, Matching

Report = Callable[[str, float], None]

_ABOUT = "about.json"


class _About(msgspec.Struct):
    """What a job of candidates is for."""

    gpu: str
    sm: int
    triton: str


def prepare(bundle: Path, directory: Path, cache: Path, report: Report = lambda description, fraction: None) -> int:
    """Compile every candidate for every operation of a bundle into `directory`. Returns how many there are.

    Args:
        bundle: built with the cuda backend; its shapes and batches are what is tuned.
        directory: takes the job.
        cache: of compiled kernels.
        report: told what is being done, and how far it is.

    Raises:
        UsageError: the bundle is of another backend.
        BundleDamaged, InputMissing: files cannot be read.
        CannotWrite, DiskError: the directory cannot be made or written.
    """
    manifest = open_bundle(bundle).manifest
    if manifest.backend.name != cuda.NAME:
        raise UsageError(f"{bundle} is a {manifest.backend.name} plan, which has nothing to tune", fix="build one with --backend cuda")
    with writing(directory, refused="choose another --prepare"):
        directory.mkdir(parents=True, exist_ok=True)
    target = find_target(manifest.target.gpu)
    sm = target.sm_number
    job = PlanJob(
        graphs={stage: bundle / name for stage, name in manifest.graphs.items()},
        target=target,
        shapes=manifest.input_shapes,
        max_batch=manifest.max_batch or 1,
        output=directory,
        cache=cache,
    )
    operations: dict[str, tuple[Any, dict[str, Operand]]] = {}
    # The smallest and the largest batch; those between are similar to one of them.
    pairs = {1, job.max_batch}
    kinds = list(cuda.program_kinds(job))
    images = {2 * count for count in pairs} & {batch for stage, _, batch in kinds if stage == "encoder"} or {1}  # encoders may take but one
    kinds = [kind for kind in kinds if kind[2] in (pairs if kind[0] == "decoder" else images)]
    for done, kind in enumerate(kinds):
        report(f"operations of the {kind[0]}", 0.2 * done / len(kinds))
        lowered = lower(cuda.fixed_graph(job, *kind))
        for call in lowered.calls:
            operations.setdefault(describe(call.operation), (call.operation, _operands(call)))
        if kind[0] == "decoder":
            operation = _matching(lowered)
            operations.setdefault(describe(operation), (operation, _matching_operands(operation)))
    report(f"compiling the candidates of {len(operations)} operations", 0.2)
    candidates = [candidate for operation, operands in operations.values() for candidate in _candidates(operation, operands, sm)]
    with writing(directory, refused="choose another --prepare"):
        declined = write_job(candidates, sm, directory, KernelCache(cache / "kernels"))
        (directory / _ABOUT).write_bytes(msgspec.json.encode(_About(target.name, sm, compiler_version())))
    return len(candidates) - len(declined)


def measure(directory: Path, report: Report = lambda description, fraction: None) -> TuningFile:
    """Time a job of `prepare` on this machine's GPU.

    Raises:
        BadInput: there is no such job.
        NoTarget: no GPU.
        BackendFailed: it is not the GPU that the job is for, or nothing ran.
    """
    from smc.exported.engines import cuda_memory

    try:
        about = msgspec.json.decode((directory / _ABOUT).read_bytes(), type=_About)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"{directory}: no candidates that can be timed ({error})", fix="make them: smc tune BUNDLE --prepare DIR") from error
    devices = cuda_memory.devices()
    device = next((device for device in devices if int(device.sm.replace(".", "")) == about.sm), None)
    if device is None:
        found_here = ", ".join(f"{device.name} (sm {device.sm})" for device in devices)
        raise BackendFailed(f"the candidates are for sm {about.sm / 10}, and this machine has {found_here}")
    try:
        timings = time_job(directory, device.index, report)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadInput(
            f"{directory}: candidates that cannot be read ({error})", fix="make them anew: smc tune BUNDLE --prepare DIR"
        ) from error
    found = {operation: ways[0] for operation, ways in best(timings).items() if not ways[0].failure}
    if not found:
        raise BackendFailed("no candidate ran")
    driver = ".".join(map(str, cuda_memory.driver_version()))
    return TuningFile(
        gpu=about.gpu,
        sm=about.sm,
        when=datetime.date.today().isoformat(),
        made_with={"triton": about.triton, "device": device.name, "cuda driver": driver},
        tiles={operation: Tuned(json.loads(way.name), round(way.median, 2)) for operation, way in sorted(found.items())},
    )


def write(file: TuningFile, path: Path) -> None:
    """Raises CannotWrite, DiskError."""
    with replacing(path) as out:
        out.write_bytes(msgspec.json.format(msgspec.json.encode(file)) + b"\n")


def _operands(call: Call) -> dict[str, Operand]:
    """Memory of the sizes that a call has in its program."""
    return {name: Operand(buffer.dtype, (buffer.size,), cold=buffer.values is not None) for name, buffer in call.operands.items()}


def _matching(lowered: Lowered) -> Matching:
    """The matching of one pair of a decoder's descriptors."""
    (_, *shape1, size), (_, *shape2, _) = (lowered.outputs[name].shape for name in ("desc1", "desc2"))
    return Matching((shape1[0], shape1[1]), (shape2[0], shape2[1]), size)


def _matching_operands(operation: Matching) -> dict[str, Operand]:
    """A new list of matches from the first image's usual grid. The maps are noise, which gives about the work of real ones: walks close in
    fewer round trips, but more of them stay open in the first."""
    operands = {name: Operand(dtype, shape) for name, (dtype, shape) in matching.operand_shapes(operation).items()}
    (_, capacity), (options,) = (operands[name].shape for name in ("starts", "options"))
    grid = starting_points(*operation.shape1, GRID_STEP, None)[:capacity].tolist()
    starts = (*grid, *[0] * (2 * capacity - len(grid)))
    return operands | {
        "starts": Operand("int32", (2, capacity), values=starts),
        "options": Operand("int32", (options,), values=(len(grid), 0, 1, *[0] * (options - 3))),
    }


def _candidates(operation: Any, operands: Mapping[str, Operand], sm: int) -> Iterable[Candidate]:
    """The ways to do an operation on its operands."""
    for tile in dict.fromkeys(tiles(operation, sm)):
        extra = {name: Operand(dtype, shape) for name, (dtype, shape) in workspace(operation, tile).items()}
        try:
            launched = launches(operation, tile, sm)
        except ValueError:
            continue  # a tile that does not go with this operation
        if launched:  # nothing is, for what is empty
            yield Candidate(describe(operation), _name(tile), launched, {**operands, **extra})


def _name(tile: Any) -> str:
    return json.dumps(tile_fields(tile))
