"""What a machine has and lacks."""

from __future__ import annotations

import ctypes
import os
import re
from importlib import metadata
from typing import Any

import pytest

from smc.compiler import doctor
from smc.compiler.doctor import Finding, examine
from smc.version import VERSION


def finding(subject: str) -> Finding:
    """The one whose subject holds `subject`."""
    (found,) = [item for item in examine() if subject in item.subject]
    return found


def test_this_machine_can_build_and_run() -> None:
    findings = examine()
    assert findings[0] == Finding("speedy-mast3r", "ok", VERSION)
    for subject in ("Python", "run bundles", "build bundles"):
        assert finding(subject).state == "ok"
    assert f"onnxruntime {metadata.version('onnxruntime')}" in finding("run bundles").detail
    assert len({item.subject for item in findings}) == len(findings)
    for item in findings:
        assert item.detail
        assert item.state == "ok" or item.fix


def test_every_requirement_of_the_distribution_is_looked_at() -> None:
    declared: dict[str, set[str]] = {}
    for line in metadata.requires("speedy-mast3r") or []:
        name = re.match(r"[\w.-]+", line)
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", line)
        assert name
        declared.setdefault(extra[1] if extra else "", set()).add(name[0].lower().replace("_", "-"))
    del declared["dev"]
    assert {extra: set(packages) for extra, packages in doctor.PACKAGES.items()} == declared
    assert doctor.PURPOSES.keys() == doctor.PACKAGES.keys()


@pytest.mark.parametrize(
    ("absent", "subject", "state", "fix"),
    [
        ("onnxruntime", "run bundles [plain install]", "missing", "pip install speedy-mast3r"),
        ("torch", "build bundles [compile]", "missing", "pip install 'speedy-mast3r[compile]'"),
        ("tensorrt", "TensorRT plans [tensorrt]", "absent", "pip install 'speedy-mast3r[tensorrt]'"),
        ("cuda-bindings", "CUDA plans [cuda]", "absent", "pip install 'speedy-mast3r[cuda]'"),
        ("triton", "building CUDA plans", "absent", "pip install 'triton>=3.9'"),
    ],
)
def test_what_is_not_installed_is_named(absent: str, subject: str, state: str, fix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == absent:
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    assert finding(subject) == Finding(subject, state, f"lacks {absent}", fix)  # type: ignore[arg-type]


def test_a_triton_that_is_too_old_is_no_compiler_of_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "3.7.1")
    wanted = Finding("building CUDA plans", "absent", "triton 3.7.1 is too old", "pip install 'triton>=3.9'")
    assert finding("building CUDA plans") == wanted


@pytest.mark.parametrize(("gib", "state"), [(4, "missing"), (11.9, "missing"), (12, "ok"), (64, "ok")])
def test_memory(gib: float, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(gib * 2**30 / 4096)}.__getitem__)
    found = finding("machine")
    assert found.state == state
    assert f"{gib:.0f} GiB" in found.detail
    assert bool(found.fix) == (state == "missing")


# --- the NVIDIA driver -------------------------------------------------------------------------------------------------------


class Driver:
    """The calls of libcuda that are made, for GPUs of (name, (major, minor)). `broken` names the call that fails."""

    def __init__(self, gpus: list[tuple[bytes, tuple[int, int]]], broken: str = "") -> None:
        self.gpus, self.broken = gpus, broken

    def _result(self, name: str) -> int:
        return 100 if name == self.broken else 0  # CUDA_ERROR_NO_DEVICE

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self._result("cuInit")

    def cuDriverGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = 13020
        return self._result("cuDriverGetVersion")

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return self._result("cuDeviceGetCount")

    def cuDeviceGetName(self, name: Any, length: int, device: int) -> int:  # noqa: N802
        name.value = self.gpus[device][0]
        return 0

    def cuDeviceComputeCapability(self, major: Any, minor: Any, device: int) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = self.gpus[device][1]
        return 0


def driver_finding(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> Finding:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    return finding("NVIDIA driver")


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    found = driver_finding(monkeypatch, None)
    assert (found.state, found.detail) == ("absent", "none; bundles for CPUs run without")


@pytest.mark.parametrize("call", ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount"])
def test_a_driver_without_an_answer(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = driver_finding(monkeypatch, Driver([], broken=call))
    assert found.state == "absent"
    assert "nvidia-smi" in found.fix


@pytest.mark.parametrize(
    ("gpus", "detail"),
    [
        ([], "CUDA 13.2; no GPU"),
        ([(b"NVIDIA H200", (9, 0))], "CUDA 13.2; NVIDIA H200 (sm 9.0)"),
        ([(b"NVIDIA A40", (8, 6)), (b"Tesla \xff T4", (7, 5))], "CUDA 13.2; NVIDIA A40 (sm 8.6), Tesla \ufffd T4 (sm 7.5)"),
    ],
)
def test_gpus_are_listed(gpus: list[tuple[bytes, tuple[int, int]]], detail: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver_finding(monkeypatch, Driver(gpus)) == Finding("NVIDIA driver", "ok", detail)
