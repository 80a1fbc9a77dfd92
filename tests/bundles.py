"""Small fabricated bundles, and fail points: what the tests of the bundle's reader and writer share."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from unittest import mock

from hypothesis import HealthCheck, settings

from smc.compiler import bundle_writer
from smc.compiler.bundle_writer import Staging, target_lock
from smc.exported.manifest import (
    FORMAT_VERSION,
    BackendInfo,
    FileInfo,
    Manifest,
    ModelInfo,
    OutputError,
    PairReport,
    Shape,
    TargetInfo,
    Tolerance,
    Verification,
)

FILES = {"encoder.onnx": b"graph", "encoder.weights": bytes(range(256)), "decoder.onnx": b"\0", "empty": b""}
FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""Settings of every hypothesis test: machines may be slow."""

NO_DIGEST = b'"digest": "' + b"0" * 64 + b'"'


def sample_manifest(files: dict[str, FileInfo], key: str = "key") -> Manifest:
    """A manifest with something in every field."""
    shape = Shape(height=96, width=128)
    error = OutputError(relative=1.5e-6, worst_pixel=0.25, worst_at=(3, 4))
    pair = PairReport(shapes=(shape, shape), outputs={"conf1": error}, matches_reference=7, matches_plan=6, match_overlap=0.5)
    return Manifest(
        format=FORMAT_VERSION,
        tool_version="0.1",
        created="2025-01-01T00:00:00+00:00",
        build_key=key,
        model=ModelInfo(source="größe.pth", checkpoint_sha256="ab" * 32, parameters=12, config={"depth": 2, "conf": ["exp", 1, "inf"]}),
        target=TargetInfo(gpu="cpu", sm=None),
        backend=BackendInfo(name="onnxruntime", version="1.23"),
        precision="fp32",
        shapes=[shape],
        max_batch=None,
        stages={"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        graphs={"encoder": "encoder.onnx", "decoder": "decoder.onnx"},
        recorded=None,
        files=files,
        verify_only=[],
        verification=Verification(
            subject="plan", reference="torch", tolerance=Tolerance(relative=1e-5, worst_pixel=1e-3, match_overlap=0.99), pairs=[pair]
        ),
    )


def describe(files: dict[str, bytes]) -> dict[str, FileInfo]:
    return {name: FileInfo(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in files.items()}


def reseal(text: bytes) -> bytes:
    """Give a manifest's text, whose digest is zeros, its right digest."""
    return text.replace(NO_DIGEST, b'"digest": "' + hashlib.sha256(text).hexdigest().encode() + b'"')


def write_bundle(target: Path, files: dict[str, bytes] = FILES, key: str = "key") -> None:
    """Write a bundle as a build does."""
    with Staging(target) as staging:
        with staging.writing() as directory:
            for name, data in files.items():
                (directory / name).write_bytes(data)
        staging.commit(sample_manifest(staging.seal(), key))


def locked(target: Path) -> Any:
    """The target's lock; Busy if it is taken."""
    return target_lock(target, wait=False, on_wait=lambda: None)


def leftovers(target: Path) -> list[str]:
    """What lies beside a target, its lock aside."""
    return sorted(path.name for path in target.parent.iterdir() if path != target and path.suffix != ".lock")


class Crash(BaseException):
    """The end of a process: nothing after it touches the disk."""


class FailPoints:
    """Lets the n-th call that changes the disk go wrong, n counted from 0.

    kind: "error": the call fails with `error`. "crash": it and all later ones raise Crash, so nothing is cleaned up.
    "kill": the process kills itself.
    """

    def __init__(self, n: int, kind: Literal["error", "crash", "kill"] = "error", error: int = errno.ENOSPC) -> None:
        self.left, self.kind, self.error = n, kind, error
        self.fired = ""

    def reach(self, name: str) -> None:
        if self.fired and self.kind == "crash":
            raise Crash
        if self.left == 0 and not self.fired:
            self.fired = name
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "crash":
                raise Crash
            raise OSError(self.error, os.strerror(self.error), name)
        self.left -= 1

    def guard(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def guarded(*args: Any, **kwargs: Any) -> Any:
            self.reach(name)
            return call(*args, **kwargs)

        return guarded

    def sheltered(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def safe(*args: Any, **kwargs: Any) -> None:
            left, self.left = self.left, -1
            call(*args, **kwargs)
            self.left = left

        return safe

    def guard_open(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode not in ("wb", "r+b"):
                return call(file, mode, *args, **kwargs)
            self.reach("open")
            return _Stream(call(file, mode, *args, **kwargs), self)

        return guarded

    @contextmanager
    def active(self) -> Iterator[FailPoints]:
        names = ("mkdir", "open", "fsync", "rename", "chmod", "unlink", "rmdir")
        patches = [mock.patch.object(os, name, self.guard(getattr(os, name), name)) for name in names]
        patches.append(mock.patch.object(io, "open", self.guard_open(io.open)))
        patches.append(mock.patch.object(bundle_writer, "_exchange", self.guard(bundle_writer._exchange, "exchange")))
        if self.kind == "error":  # removing may be cut short, but errors in it are ignored: the next build sweeps what they leave
            patches.append(mock.patch.object(shutil, "rmtree", self.sheltered(shutil.rmtree)))
        for patch in patches:
            patch.start()
        try:
            yield self
        finally:
            for patch in patches:
                patch.stop()


class _Stream:
    """A file whose writes are fail points."""

    def __init__(self, stream: Any, points: FailPoints) -> None:
        self._stream = stream
        self.write = points.guard(stream.write, "write")
        self.flush = points.guard(stream.flush, "flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()
