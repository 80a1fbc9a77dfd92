from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from smc.compiler import kernel_cache
from smc.compiler.kernel_cache import KernelCache
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
    first = KernelCache(tmp_path).compile_all(kernels, 90)
    assert first == [made(one, 90) for one in kernels]
    assert compiler.call_count == 3
    assert KernelCache(tmp_path).compile_all(kernels, 90) == first
    assert compiler.call_count == 3
    assert len(list(tmp_path.iterdir())) == 3


def test_only_what_is_missing_is_compiled_and_the_order_stays(compiler: Mock, tmp_path: Path) -> None:
    KernelCache(tmp_path).compile_all([kernel(32)], 90)
    found = KernelCache(tmp_path).compile_all([kernel(16), kernel(32), kernel(64)], 90)
    assert [one.name for one in found] == ["kernel_16", "kernel_32", "kernel_64"]
    assert compiler.call_count == 3


def test_without_a_directory_nothing_is_kept(compiler: Mock) -> None:
    for _ in range(2):
        KernelCache(None).compile_all([kernel()], 90)
    assert compiler.call_count == 2


@pytest.mark.parametrize("damage", [b"", b"\xc1", b"\x80", b"half"])
def test_a_damaged_entry_is_compiled_again_and_replaced(compiler: Mock, tmp_path: Path, damage: bytes) -> None:
    cache = KernelCache(tmp_path)
    (first,) = cache.compile_all([kernel()], 90)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[: len(entry.read_bytes()) // 2] if damage == b"half" else damage)
    assert cache.compile_all([kernel()], 90) == [first]
    assert compiler.call_count == 2
    assert cache.compile_all([kernel()], 90) == [first]
    assert compiler.call_count == 2


def test_a_library_is_asked_first_whatever_triton_filled_it(compiler: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernels of the machine that timed them, which has an older Triton."""
    library = tmp_path / "library"
    monkeypatch.setattr(kernel_cache, "compiler_version", lambda: "1.2.3")
    (theirs,) = KernelCache(library).compile_all([kernel()], 90)
    monkeypatch.undo()
    monkeypatch.setattr(kernel_cache, "compile_kernel", Mock(side_effect=AssertionError))
    assert KernelCache(tmp_path / "own", library).compile_all([kernel()], 90) == [theirs]
    assert not (tmp_path / "own").exists(), "nothing was compiled, so nothing is kept"


def test_another_triton_does_not_find_its_own_kernels(compiler: Mock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    KernelCache(tmp_path).compile_all([kernel()], 90)
    monkeypatch.setattr(kernel_cache, "compiler_version", lambda: "1.2.3")
    KernelCache(tmp_path).compile_all([kernel()], 90)
    assert compiler.call_count == 2


def test_a_library_that_is_not_there_is_none(compiler: Mock, tmp_path: Path) -> None:
    KernelCache(tmp_path, tmp_path / "absent").compile_all([kernel()], 90)
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
    with pytest.raises(ValueError, match="does not compile"):
        KernelCache(tmp_path).compile_all([kernel(16), kernel(32)], 90)


def test_many_kernels_are_compiled_by_workers(tmp_path: Path) -> None:
    """Real ones: a process of its own knows nothing of stand-ins."""
    view = View("float32", (1,))
    operations = [Elementwise(function, (size,), (view,), view) for function in ("copy", "relu", "exp", "sqrt") for size in (16, 64)]
    kernels = [launches(operation, default_tile(operation, 80), 80)[0].kernel for operation in operations]
    assert len(set(kernels)) == len(kernels)
    compiled = KernelCache(tmp_path).compile_all(kernels, 80)
    assert all(one.cubin.startswith(b"\x7fELF") for one in compiled)
    assert KernelCache(tmp_path).compile_all(kernels, 80) == compiled
    assert len(list(tmp_path.iterdir())) == len(kernels)
