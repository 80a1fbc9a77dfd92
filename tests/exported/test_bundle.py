"""The bundle reader: what is on disk may be damaged, odd, or exchanged while it is read."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import smc
from smc.exported import bundle as bundle_module
from smc.exported.bundle import open_bundle, read_manifest
from smc.exported.engines.onnxruntime import OnnxRuntimeEngine
from smc.exported.errors import BundleDamaged, DiskError, InputMissing
from smc.exported.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileInfo, encode_manifest
from tests.bundles import FILES, describe, sample_manifest, write_bundle
from tests.conformance import case_images, load_case


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle, whose graphs are none."""
    write_bundle(tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What engines are constructed with. None is made."""
    seen: list[Any] = []
    monkeypatch.setattr(OnnxRuntimeEngine, "__init__", lambda self, *arguments: seen.append(arguments))
    return seen


def flip(path: Path, position: int) -> None:
    """Change one bit of a byte in place, or change it back."""
    with path.open("r+b") as stream:
        stream.seek(position)
        (byte,) = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 16]))


def replace_by_link(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


def replace_by_socket(path: Path) -> None:
    path.unlink()
    before = Path.cwd()
    os.chdir(path.parent)  # a socket's path may have 108 bytes only
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(before)


def replace_by(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        path.unlink()
        make(path)

    return damage


DAMAGES: dict[str, Callable[[Path], None]] = {
    "first byte": lambda path: flip(path, 0),
    "middle byte": lambda path: flip(path, path.stat().st_size // 2),
    "last byte": lambda path: flip(path, path.stat().st_size - 1),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "emptied": lambda path: os.truncate(path, 0),
    "extended": lambda path: os.truncate(path, path.stat().st_size + 1),
    "missing": Path.unlink,
    "symlink": replace_by_link,
    "dangling symlink": replace_by(lambda path: path.symlink_to("nowhere")),
    "directory": replace_by(Path.mkdir),
    "FIFO": replace_by(os.mkfifo),
    "socket": replace_by_socket,
}
NEED_BYTES = ("first byte", "middle byte", "last byte", "truncated", "emptied")


def test_a_whole_bundle_reaches_the_engine(bundle: Path, engines: list[Any]) -> None:
    smc.load(bundle)
    ((files, stages, _),) = engines
    assert {name: bytes(data) for name, data in files.items()} == FILES
    assert stages == {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in (*FILES, MANIFEST_NAME) for damage in DAMAGES if name != "empty" or damage not in NEED_BYTES],
)
def test_damage_to_any_file_is_found_before_an_engine_sees_a_byte(bundle: Path, engines: list[Any], name: str, damage: str) -> None:
    DAMAGES[damage](bundle / name)
    absent = name == MANIFEST_NAME and damage == "missing"  # then it is no bundle at all
    with pytest.raises(InputMissing if absent else BundleDamaged) as caught:
        smc.load(bundle)
    assert caught.value.exit_status == (66 if absent else 76)
    assert not engines


def test_damage_to_a_real_bundle_is_found(tiny_bundle: Path, tmp_path: Path, engines: list[Any]) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    for file in copy.iterdir():
        position = file.stat().st_size * 3 // 4
        flip(file, position)
        with pytest.raises(BundleDamaged, match=re.escape(file.name)):
            open_bundle(copy)
        if file.name != "passes.json":  # which matching does not read
            with pytest.raises(BundleDamaged, match=re.escape(file.name)):
                smc.load(copy)
        flip(file, position)
    assert not engines
    open_bundle(copy)


def test_a_deployment_may_lack_what_only_verification_needs(tiny_bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    (only,) = open_bundle(copy).manifest.verify_only
    (copy / only).unlink()
    smc.load(copy)
    assert only not in open_bundle(copy).files


def test_what_is_no_bundle(tmp_path: Path, bundle: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    paths = ("absent", "absent/deeper", "file", "file/deeper", "empty", "dangling", "loop")
    for name in (*paths, "x" * 256, "nul\0", "half of a pair \ud800"):
        for read in (open_bundle, read_manifest):
            with pytest.raises(InputMissing) as caught:
                read(tmp_path / name)
            assert caught.value.exit_status == 66
    (tmp_path / "link").symlink_to(bundle)
    assert open_bundle(tmp_path / "link").files == FILES


def test_files_that_the_manifest_does_not_list_are_not_read(bundle: Path) -> None:
    (bundle / "notes").write_text("a user's")
    os.mkfifo(bundle / "fifo")
    assert open_bundle(bundle).files == FILES


def test_a_manifest_that_is_too_large(bundle: Path) -> None:
    files = describe(FILES) | {f"file{i}": FileInfo(size=0, sha256="0" * 64) for i in range(MAX_MANIFEST_BYTES // 100)}
    data = encode_manifest(sample_manifest(files))
    assert len(data) > MAX_MANIFEST_BYTES
    (bundle / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(BundleDamaged, match="bytes, which no manifest is"):
        open_bundle(bundle)


def test_read_errors_are_disk_errors(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for owner, name in ((os, "readv"), (bundle_module.os, "fdopen")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fail)
            with pytest.raises(DiskError, match="Input/output error") as caught:
                open_bundle(bundle)
            assert caught.value.exit_status == 74


def test_a_bundle_larger_than_memory(bundle: Path) -> None:
    size = 1 << 32
    with (bundle / "encoder.weights").open("wb") as stream:
        stream.truncate(size)
    files = describe(FILES) | {"encoder.weights": FileInfo(size=size, sha256="0" * 64)}
    (bundle / MANIFEST_NAME).write_bytes(encode_manifest(sample_manifest(files)))
    script = (
        "import resource, sys, smc\n"
        "resource.setrlimit(resource.RLIMIT_AS, (1 << 32, 1 << 32))\n"
        "try: smc.load(sys.argv[1])\n"
        "except smc.OutOfMemory as error: print(error.exit_status, error)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(bundle)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("75 ")
    assert f"{size:,}" in run.stdout


def test_what_a_refused_bundle_took_is_freed_with_the_error(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory(mmap.mmap):
        """As `mmap.mmap`, but one may have weak references to it."""

    taken = []

    def allocate(path: Path, size: int) -> memoryview:
        memory = Memory(-1, size)
        taken.append(weakref.ref(memory))
        return memoryview(memory)

    monkeypatch.setattr(bundle_module, "_allocate", allocate)
    flip(bundle / "encoder.weights", 0)
    gc.disable()  # which would free it sooner or later
    try:
        with pytest.raises(BundleDamaged):
            open_bundle(bundle)
        deadline = time.monotonic() + 60
        while any(memory() for memory in taken) and time.monotonic() < deadline:
            time.sleep(0.001)  # the readers' threads are about to end
        assert taken
        assert not any(memory() for memory in taken)
    finally:
        gc.enable()


def test_no_file_is_read_any_more_when_one_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = [], []

    def read(path: Path, directory: int, name: str, info: FileInfo) -> memoryview:
        if name == "encoder.onnx":
            raise BundleDamaged(name)
        begun.append(name)
        time.sleep(0.1)
        os.fstat(directory)  # still open
        ended.append(name)
        return memoryview(b"")

    monkeypatch.setattr(bundle_module, "_read_verified", read)
    with pytest.raises(BundleDamaged, match=r"encoder\.onnx"):
        open_bundle(bundle)
    assert sorted(ended) == sorted(begun)


@pytest.mark.parametrize("files", [0, 1, 3, 50])
def test_any_number_of_files(tmp_path: Path, files: int) -> None:
    contents = {f"file{i}": bytes([i]) * (100 * i) for i in range(files)} | FILES
    write_bundle(tmp_path / "bundle", contents)
    assert open_bundle(tmp_path / "bundle").files == contents


def test_without_further_threads_a_bundle_is_read_all_the_same(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert open_bundle(bundle).files == FILES
    flip(bundle / "decoder.onnx", 0)
    with pytest.raises(BundleDamaged, match=r"decoder\.onnx"):
        open_bundle(bundle)


def test_a_bundle_is_loaded_after_the_main_thread_has_ended(tiny_bundle: Path) -> None:
    script = """
import sys, threading, time
import smc
def late():
    threading.main_thread().join()
    time.sleep(0.2)
    smc.load(sys.argv[1])
    print("loaded")
threading.Thread(target=late).start()
"""
    found = subprocess.run([sys.executable, "-P", "-c", script, str(tiny_bundle)], capture_output=True, text=True, timeout=120, check=True)
    assert (found.stdout, found.stderr) == ("loaded\n", "")


def test_the_bytes_stay_those_that_were_verified(bundle: Path) -> None:
    opened = open_bundle(bundle)
    for file in bundle.iterdir():
        with file.open("r+b") as stream:  # the same inode
            stream.write(b"changed")
        file.write_bytes(b"")
    shutil.rmtree(bundle)
    assert opened.files == FILES
    with pytest.raises(TypeError):
        opened.files["encoder.onnx"][0] = 0


def test_a_loaded_matcher_needs_its_files_no_more(tiny_bundle: Path, tiny_matcher: smc.Matcher, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    matcher = smc.load(copy)
    for file in copy.iterdir():
        with file.open("r+b") as stream:
            stream.write(bytes(1 << 20))
    shutil.rmtree(copy)
    views = case_images(load_case("tiny_landscape"))
    for name, expected in tiny_matcher.infer(*views).items():
        assert np.array_equal(matcher.infer(*views)[name], expected), name


@pytest.mark.parametrize("read", [open_bundle, read_manifest])
@pytest.mark.parametrize("moment", ["_open_directory", "_read_manifest", "_open_regular"])
def test_a_bundle_exchanged_halfway_is_read_anew(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], Any], moment: str
) -> None:
    call = getattr(bundle_module, moment)

    def call_and_exchange(*arguments: Any, **options: Any) -> Any:
        result = call(*arguments, **options)
        monkeypatch.setattr(bundle_module, moment, call)
        write_bundle(bundle, {**FILES, "encoder.onnx": b"new"}, "new")
        return result

    monkeypatch.setattr(bundle_module, moment, call_and_exchange)
    opened = read(bundle)
    manifest = opened if read is read_manifest else opened.manifest
    # The old bundle is removed: once anything of it is still to be read, only the new one can be.
    done = read is read_manifest and moment != "_open_directory"
    assert manifest.build_key == ("key" if done else "new")
    assert read is read_manifest or opened.files["encoder.onnx"] == b"new"


def test_a_bundle_damaged_after_an_exchange_is_refused(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_directory = bundle_module._open_directory
    opened = []

    def open_and_exchange(path: Path) -> int:
        opened.append(open_directory(path))
        if len(opened) == 1:
            write_bundle(bundle)
            flip(bundle / "encoder.onnx", 0)
        return opened[-1]

    monkeypatch.setattr(bundle_module, "_open_directory", open_and_exchange)
    with pytest.raises(BundleDamaged):
        open_bundle(bundle)
    assert len(opened) == 2


def test_a_loader_sees_one_whole_bundle_while_a_writer_exchanges_it(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    generations = {f"generation {i}": {name: data + b"!" * i for name, data in FILES.items()} for i in range(4)}
    ended = threading.Event()
    exchanges = 0

    def exchange() -> None:
        nonlocal exchanges
        while not ended.is_set():
            for key, files in generations.items():
                write_bundle(target, files, key)
                exchanges += 1

    write_bundle(target, FILES, "generation 0")
    writer = threading.Thread(target=exchange)
    writer.start()
    try:
        seen = set()
        while exchanges < 60 and writer.is_alive():
            opened = open_bundle(target)
            assert opened.files == generations[opened.manifest.build_key]
            seen.add(opened.manifest.build_key)
            assert read_manifest(target).build_key in generations
    finally:
        ended.set()
        writer.join()
    assert len(seen) > 1
    assert exchanges >= 60
