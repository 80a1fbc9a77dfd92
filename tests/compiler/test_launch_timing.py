from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from smc.compiler import launch_timing
from smc.compiler.kernel_cache import KernelCache
from smc.compiler.launch_timing import REPEATS, Candidate, Operand, Timing, best, time_job, write_job
from smc.exported.engines import cuda_launch, cuda_memory
from smc.exported.engines.cuda_program import Pointer, decode_plan
from smc.plugins.compile import Compiled
from smc.plugins.elementwise.launches import default_tile, launches
from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.launch import Kernel
from tests.compiler.lowering.compiling import MadeUpKernels


def candidate(name: str = "default", size: int = 1000, cold: bool = True, sm: int = 90) -> Candidate:
    """y = x + y, x from memory."""
    view = View("float16", (1,))
    operation = Elementwise("add", (size,), (view, view), View("float32", (1,)))
    operands = {"x": Operand("float16", (size,), cold=cold), "y": Operand("float16", (size,)), "out": Operand("float32", (size,))}
    return Candidate("add", name, launches(operation, default_tile(operation, sm), sm), operands)


def test_a_job_holds_every_candidate(tmp_path: Path) -> None:
    assert write_job([candidate("one"), candidate("two", 2000)], 90, tmp_path / "job", MadeUpKernels()) == {}
    assert {path.name for path in (tmp_path / "job").iterdir()} == {"plan.json", "kernels.bin", "job.json"}
    plan = decode_plan((tmp_path / "job" / "plan.json").read_bytes())
    job = msgspec.json.decode((tmp_path / "job" / "job.json").read_bytes())
    assert [(entry["operation"], entry["name"], entry["program"]) for entry in job["entries"]] == [("add", "one", 0), ("add", "two", 1)]
    assert [len(program.steps) for program in plan.programs] == [REPEATS, REPEATS]


@pytest.mark.parametrize("cold", [True, False])
def test_what_comes_from_memory_is_another_copy_every_time(tmp_path: Path, cold: bool) -> None:
    write_job([candidate(cold=cold)], 90, tmp_path, MadeUpKernels())
    (program,) = decode_plan((tmp_path / "plan.json").read_bytes()).programs
    pointers = [[argument.offset for argument in step.arguments if isinstance(argument, Pointer)] for step in program.steps]
    xs, ys, outs = (set(column) for column in zip(*pointers, strict=True))
    assert (len(xs), len(ys), len(outs)) == (REPEATS if cold else 1, 1, 1)
    assert not xs & ys


def test_what_says_what_there_is_to_do_is_kept_and_the_rest_is_noise_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up GPU, whose memory is the host's."""
    asked = replace(candidate(cold=False), operands=candidate().operands | {"count": Operand("int32", (2, 2), values=(7, 0, 1, 5))})
    write_job([asked], 90, tmp_path, MadeUpKernels())
    (program,) = decode_plan((tmp_path / "plan.json").read_bytes()).programs
    memory = np.zeros(program.arena_bytes, np.uint8)
    stream = SimpleNamespace(copy=lambda to, source, nbytes: ctypes.memmove(to, source, nbytes), synchronize=lambda: None)
    graph = SimpleNamespace(launch=lambda stream: None)
    for name, value in {
        "use_device": lambda index: None,
        "Stream": lambda: stream,
        "device_pool": lambda: None,
        "DeviceArray": lambda pool, shape, dtype: SimpleNamespace(address=memory.ctypes.data),
        "elapsed": lambda stream, run: (run(), 64e-6)[1],
    }.items():
        monkeypatch.setattr(cuda_memory, name, value)
    monkeypatch.setattr(cuda_launch, "Kernels", lambda code, kernels: None)
    monkeypatch.setattr(cuda_launch, "capture", lambda program, kernels, bases, stream: graph)
    (timing,) = time_job(tmp_path)
    assert (timing.median, timing.failure) == (pytest.approx(64 / REPEATS), "")
    held = {name: memory[region.offset :][: 4 * region.shape[-1]] for name, region in program.inputs.items()}
    assert memory[program.inputs["count.0"].offset :][:16].view(np.int32).tolist() == [7, 0, 1, 5]
    x, y = (held[name].view(np.float16)[:1000] for name in ("x.0", "y.0"))
    assert np.isfinite(x).all()
    assert 0.9 < x.std() < 1.1
    assert 0.9 < y.std() < 1.1
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.2


def test_copies_of_large_operands_do_not_fill_the_gpu(tmp_path: Path) -> None:
    write_job([candidate(size=launch_timing.COLD_BYTES // 8)], 90, tmp_path, MadeUpKernels())
    (program,) = decode_plan((tmp_path / "plan.json").read_bytes()).programs
    assert program.arena_bytes < 3 * launch_timing.COLD_BYTES
    assert sum(name.startswith("x.") for name in program.inputs) == 4


class Greedy(MadeUpKernels):
    """Kernels that need more shared memory than there is, and one that does not compile."""

    def try_all(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
        found = super().try_all(kernels, sm)
        return [
            replace(one, shared_memory=228 << 10)
            if isinstance(one, Compiled) and dict(kernel.types)["x"] == "*fp16"
            else ValueError("no such kernel")
            for kernel, one in zip(kernels, found, strict=True)
        ]


def test_what_does_not_fit_or_compile_is_left_out_with_the_reason(tmp_path: Path) -> None:
    view = View("float32", (1,))
    operation = Elementwise("relu", (64,), (view,), view)
    broken = Candidate(
        "relu", "broken", launches(operation, default_tile(operation, 90), 90), {name: Operand("float32", (64,)) for name in ("x", "out")}
    )
    declined = write_job([candidate("large"), broken], 90, tmp_path, Greedy())
    assert declined.keys() == {"add large", "relu broken"}
    assert "shared memory" in declined["add large"]
    assert declined["relu broken"] == "no such kernel"
    assert decode_plan((tmp_path / "plan.json").read_bytes()).programs == ()
    assert msgspec.json.decode((tmp_path / "job.json").read_bytes())["declined"] == declined


def test_the_fastest_comes_first_and_failures_last() -> None:
    timings = [
        Timing("a", "slow", 3, 2),
        Timing("b", "only", 1, 1),
        Timing("a", "failed", math.inf, math.inf, "out of memory"),
        Timing("a", "fast", 2, 1.5),
    ]
    found = best(timings)
    assert [timing.name for timing in found["a"]] == ["fast", "slow", "failed"]
    assert [timing.name for timing in found["b"]] == ["only"]


@pytest.mark.gpu
def test_candidates_are_timed_on_the_gpu(tmp_path: Path) -> None:
    from smc.exported.engines import cuda_memory

    sm = int(cuda_memory.devices()[0].sm.replace(".", ""))
    write_job([candidate("small", 1 << 12, sm=sm), candidate("large", 1 << 24, sm=sm)], sm, tmp_path, KernelCache(None))
    small, large = time_job(tmp_path)
    assert (small.name, large.name) == ("small", "large")
    assert 0 < small.fastest <= small.median < large.median < 10_000
