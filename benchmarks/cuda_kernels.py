"""Where the time of a cuda plan goes: every kernel of a stage by itself, their sums by the parts of the stage, and all as one graph.

    python benchmarks/cuda_kernels.py BUNDLE [--batch N] [--out FILE.md]

A kernel is launched 32 times in one captured graph, on what the last run left in memory, so that its weights mostly come from the
second-level cache: the sum is a lower bound of what the kernels take one after the other. The stage's own graph overlaps them.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np

from smc.exported.bundle import open_bundle
from smc.exported.engines import cuda_memory as cuda
from smc.exported.engines.cuda_launch import Kernels, capture
from smc.exported.engines.cuda_program import KERNELS, PLAN, WEIGHTS, Program, Step, decode_plan

REPEATS, REPLAYS = 32, 9


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--batch", type=int, default=1, help="pairs")
    arguments.add_argument("--out", type=Path)
    given = arguments.parse_args()
    files = open_bundle(given.bundle, everything=False).files
    plan = decode_plan(files[PLAN])
    device = cuda.devices()[0]
    cuda.use_device(device.index)
    stream, pool = cuda.Stream(), cuda.device_pool()
    weights = cuda.DeviceArray(pool, (plan.weights_bytes,), np.uint8)
    cuda.upload(stream, weights.address, files[WEIGHTS])
    kernels = Kernels(bytes(files[KERNELS]), plan.kernels)
    programs = [program for program in plan.programs if _batch(program) == given.batch and program.stage != "matcher"]
    arena = cuda.DeviceArray(pool, (max(program.arena_bytes for program in programs),), np.uint8)
    bases = {"arena": arena.address, "weights": weights.address}

    def microseconds(program: Program, repeats: int) -> float:
        graph = capture(program, kernels, bases, stream)
        times = [cuda.elapsed(stream, lambda: graph.launch(stream)) for _ in range(REPLAYS + 2)]
        return 1e6 * statistics.median(times[2:]) / repeats

    lines = [f"{date.today()}, {device.name}, {given.bundle.name}, {given.batch} pairs at once", ""]
    for program in programs:
        _write_noise(stream, arena.address, program)
        whole = microseconds(program, 1)
        found: dict[tuple[object, ...], list[Step]] = defaultdict(list)
        for step in program.steps:
            found[step.kernel, step.grid, _sizes(step), step.part].append(step)
        times = {kind: microseconds(_alone(program, steps[0]), REPEATS) for kind, steps in found.items()}
        sums: dict[str, float] = defaultdict(float)
        for kind, steps in found.items():
            sums[steps[0].part] += times[kind] * len(steps)
        shares = ", ".join(f"{part} {together:.0f}" for part, together in sums.items() if part)
        lines += [
            f"## {program.stage}: {whole:.0f} us as one graph, {sum(sums.values()):.0f} us as the sum of {len(program.steps)} kernels"
            + (f" ({shares})" if shares else ""),
            "",
            "| kernel | part | first of them | launches | us each | us together |",
            "|---|---|---|---|---|---|",
        ]
        for kind, steps in sorted(found.items(), key=lambda item: -times[item[0]] * len(item[1])):
            operation, _, node = steps[0].label.partition(" ")
            each = times[kind]
            name = f"{operation} {'x'.join(map(str, steps[0].grid))}"
            lines.append(f"| {name} | {steps[0].part} | {node} | {len(steps)} | {each:.2f} | {each * len(steps):.0f} |")
        lines.append("")
    text = "\n".join(lines)
    print(text)
    if given.out:
        given.out.write_text(text)


def _batch(program: Program) -> int:
    """Pairs: an encoder takes both images of each."""
    batch = next(iter(program.inputs.values())).shape[0]
    return batch // 2 if program.stage == "encoder" else batch


def _sizes(step: Step) -> tuple[object, ...]:
    """What tells two launches of a kernel apart but for where their operands lie."""
    return tuple(getattr(argument, "value", None) for argument in step.arguments)


def _alone(program: Program, step: Step) -> Program:
    """One of a program's launches, over and over, waiting for no other."""
    alone = Step(step.kernel, step.grid, step.arguments, step.overlaps, step.label)
    return Program(program.stage, {}, {}, program.arena_bytes, (alone,) * REPEATS)


def _write_noise(stream: cuda.Stream, address: int, program: Program) -> None:
    random = np.random.default_rng(0)
    for region in program.inputs.values():
        values = (
            random.standard_normal(region.shape).astype(np.float32) if region.dtype != "uint8" else random.integers(0, 256, region.shape)
        )
        pixels = np.ascontiguousarray(values.astype(region.dtype))
        stream.copy(address + region.offset, pixels.ctypes.data, pixels.nbytes)
        stream.synchronize()


if __name__ == "__main__":
    main()
