from __future__ import annotations

import hashlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest

from smc.compiler import kernel_cache
from smc.compiler.kernel_cache import KernelCache
from smc.exported.errors import BackendFailed
from smc.plugins import compile as compiling
from smc.plugins.compile import Compiled, TileBlock, fingerprint
from smc.plugins.elementwise.launches import default_tile, launches
from smc.plugins.elementwise.specification import Elementwise, View
from smc.plugins.launch import Address, Kernel, Value, launch


def kernel(block: int = 64, **changes: Any) -> Kernel:
    values: dict[str, Value] = {"x": Address("x", "float16"), "out": Address("out", "float32"), "count": 32}
    made = launch("smc.plugins.elementwise.kernel:elementwise", (1, 1, 1), values, {"BLOCK": block}, warps=4, stages=2).kernel
    return replace(made, **changes)


def made(kernel: Kernel, sm: int) -> Compiled:
    code = fingerprint(kernel, sm).encode()
    return Compiled(f"kernel_{dict(kernel.constants)['BLOCK']}", code, 128, 1 << 10, (TileBlock(6, 3, (64, 64)),))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Counts what is compiled."""
    stand_in = Mock(side_effect=made)
    monkeypatch.setattr(kernel_cache, "compile_kernel", stand_in)
    return stand_in


def test_what_was_compiled_is_not_compiled_again(compiler: Mock, tmp_path: Path) -> None:
    kernels = [kernel(16), kernel(32), kernel(64)]
    first = KernelCache(tmp_path).try_all(kernels, 90)
    assert first == [made(one, 90) for one in kernels]
    assert compiler.call_count == 3
    assert KernelCache(tmp_path).try_all(kernels, 90) == first
    assert compiler.call_count == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_only_what_is_missing_is_compiled_and_the_order_stays(compiler: Mock, tmp_path: Path) -> None:
    KernelCache(tmp_path).try_all([kernel(32)], 90)
    found = KernelCache(tmp_path).try_all([kernel(16), kernel(32), kernel(64)], 90)
    assert [one.name for one in found] == ["kernel_16", "kernel_32", "kernel_64"]
    assert compiler.call_count == 3


def test_without_a_directory_nothing_is_kept(compiler: Mock) -> None:
    for _ in range(2):
        KernelCache(None).try_all([kernel()], 90)
    assert compiler.call_count == 2


def flipped(entry: bytes, at: int) -> bytes:
    return entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[: len(entry) // 2],
        lambda entry: flipped(entry, 0),
        lambda entry: flipped(entry, entry.index(made(kernel(), 90).cubin) + 5),
        lambda entry: entry[32:],
        lambda entry: hashlib.sha256(b"\x80").digest() + b"\x80",
    ],
    ids=["empty", "half", "a bit of the digest", "a bit of the code", "no digest", "of another kind"],
)
def test_a_damaged_entry_is_compiled_again_and_replaced(compiler: Mock, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    cache = KernelCache(tmp_path)
    (first,) = cache.try_all([kernel()], 90)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert cache.try_all([kernel()], 90) == [first]
    assert compiler.call_count == 2
    assert cache.try_all([kernel()], 90) == [first]
    assert compiler.call_count == 2


@pytest.mark.parametrize("directory", ["file/kernels", "directory"])
def test_kernels_that_cannot_be_kept_are_compiled_all_the_same(compiler: Mock, tmp_path: Path, directory: str) -> None:
    """As in a container whose home is read-only: in a directory that cannot be made, and where an entry cannot be put in its place."""
    (tmp_path / "file").touch()
    kernels = [kernel(16), kernel(32), kernel(64)]
    taken = [tmp_path / "directory" / kernel_cache._name(fingerprint(one, 90)) for one in kernels]
    for path in taken:
        (path / "in its place").mkdir(parents=True)
    with pytest.warns(UserWarning, match="compiled kernels cannot be kept") as warned:
        assert KernelCache(tmp_path / directory).try_all(kernels, 90) == [made(one, 90) for one in kernels]
    assert len(warned) == 1
    assert sorted((tmp_path / "directory").iterdir()) == sorted(taken), "nothing was left behind"


def test_others_may_read_what_the_umask_lets_them(compiler: Mock, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        KernelCache(tmp_path).try_all([kernel()], 90)
    finally:
        os.umask(before)
    (entry,) = tmp_path.iterdir()
    assert entry.stat().st_mode & 0o777 == 0o640


def test_a_library_is_asked_first_whatever_triton_filled_it(compiler: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels of the machine that timed them, which has an older Triton."""
    library = tmp_path / "library"
    monkeypatch.setattr(kernel_cache, "compiler_version", lambda: "1.2.3")
    (theirs,) = KernelCache(library).try_all([kernel()], 90)
    monkeypatch.undo()
    monkeypatch.setattr(kernel_cache, "compile_kernel", Mock(side_effect=AssertionError))
    assert KernelCache(tmp_path / "own", library).try_all([kernel()], 90) == [theirs]
    assert not (tmp_path / "own").exists(), "nothing was compiled, so nothing is kept"


def test_of_several_versions_in_a_library_ones_own_is_taken_and_else_the_first(
    compiler: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "library"
    for version in ("2", "3", "1"):
        monkeypatch.setattr(kernel_cache, "compiler_version", lambda version=version: version)
        compiler.side_effect = lambda one, sm, version=version: replace(made(one, sm), name=version)
        KernelCache(library).try_all([kernel()], 90)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(library.iterdir(), key=lambda path: path.name[::-1], reverse=True)))
    for own, taken in (("1", "1"), ("2", "2"), ("3", "3"), ("4", "1")):
        monkeypatch.setattr(kernel_cache, "compiler_version", lambda own=own: own)
        (found,) = KernelCache(None, library).try_all([kernel()], 90)
        assert isinstance(found, Compiled)
        assert found.name == taken


def test_another_triton_does_not_find_its_own_kernels(compiler: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelCache(tmp_path).try_all([kernel()], 90)
    monkeypatch.setattr(kernel_cache, "compiler_version", lambda: "1.2.3")
    KernelCache(tmp_path).try_all([kernel()], 90)
    assert compiler.call_count == 2


def test_a_library_that_is_not_there_is_none(compiler: Mock, tmp_path: Path) -> None:
    KernelCache(tmp_path, tmp_path / "absent").try_all([kernel()], 90)
    assert compiler.call_count == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"function": "smc.plugins.made_up.kernel:other"},
        {"types": (("x", "*fp32"), ("out", "*fp32"), ("count", "i32"))},
        {"constants": (("BLOCK", 128),)},
        {"constants": (("BLOCK", 64), ("EXACT", True))},
        {"aligned": frozenset()},
        {"warps": 8},
        {"stages": 3},
        {"registers": 128},
        {"overlaps": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_the_key_changes_with_every_ingredient(changes: dict[str, Any]) -> None:
    assert fingerprint(kernel(), 90) == fingerprint(kernel(), 90)
    assert fingerprint(kernel(**changes), 90) != fingerprint(kernel(), 90)


def test_the_key_changes_with_the_gpu_and_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint(kernel(), 90)
    assert fingerprint(kernel(), 89) != before
    monkeypatch.setattr(compiling, "kernel_sources", lambda: "other sources")
    assert fingerprint(kernel(), 90) != before


def test_a_kernel_that_does_not_compile_leaves_the_others(compiler: Mock, tmp_path: Path) -> None:
    def compile_one(one: Kernel, sm: int) -> Compiled:
        if one == kernel(16):
            raise ValueError("does not compile")
        return made(one, sm)

    compiler.side_effect = compile_one
    error, compiled = KernelCache(tmp_path).try_all([kernel(16), kernel(32)], 90)
    assert isinstance(error, ValueError)
    assert compiled == made(kernel(32), 90)
    assert len(list(tmp_path.iterdir())) == 1


def test_many_kernels_are_compiled_by_workers(tmp_path: Path) -> None:
    """Real ones: a process of its own knows nothing of stand-ins."""
    view = View("float32", (1,))
    operations = [Elementwise(function, (size,), (view,), view) for function in ("copy", "relu", "exp", "sqrt") for size in (16, 64)]
    kernels = [launches(operation, default_tile(operation, 80), 80)[0].kernel for operation in operations]
    assert len(set(kernels)) == len(kernels)
    compiled = KernelCache(tmp_path).try_all(kernels, 80)
    assert all(one.cubin.startswith(b"\x7fELF") for one in compiled)
    assert KernelCache(tmp_path).try_all(kernels, 80) == compiled
    assert len(list(tmp_path.iterdir())) == len(kernels)


def test_a_worker_that_is_killed_is_a_failure_of_the_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "killed.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.syspath_prepend(tmp_path)  # workers look for modules where their parent does
    with pytest.raises(BackendFailed, match="killed, perhaps for want of memory") as caught:
        KernelCache(None).try_all([kernel(block, function="killed:kernel") for block in range(8)], 90)
    assert "free memory" in caught.value.fix


def test_workers_end_with_the_wait_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when SIGTERM arrives: what they are at may take a minute, and a container is killed after ten seconds."""
    sleeps = f"import pathlib, time\ntime.sleep(20)\npathlib.Path({str(tmp_path)!r}, 'slept').touch()\n"
    (tmp_path / "sleeping.py").write_text(sleeps)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(KernelCache, "_kept", Mock(side_effect=KeyboardInterrupt))
    others = set(multiprocessing.active_children())
    with pytest.raises(KeyboardInterrupt):
        KernelCache(None).try_all([kernel(types=()), *(kernel(block, function="sleeping:kernel") for block in range(8))], 90)
    assert not (tmp_path / "slept").exists()
    assert set(multiprocessing.active_children()) <= others
    assert list((tmp_path / "temporary").iterdir()) == []


def test_there_are_as_many_workers_as_cores_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Mock(side_effect=BrokenProcessPool)
    monkeypatch.setattr(kernel_cache, "ProcessPoolExecutor", workers)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 8})
    with pytest.raises(BackendFailed, match="up to 3 at once"):
        KernelCache(None).try_all([kernel(block) for block in range(8)], 90)
    assert workers.call_args.args[0] == 3


WORKER = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
from smc.compiler.kernel_cache import _prepare_worker
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(1, context, initializer=_prepare_worker, initargs=(sys.argv[1], os.getpid()))
    print(pool.submit(os.getpid).result(), flush=True)
    time.sleep(600)
"""


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(WORKER)
    with subprocess.Popen([sys.executable, script, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    worker.wait(timeout=60)
