"""Fixtures that several test files share. `conformance.py` beside this remakes the reference data's inputs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

import smc
from smc.compiler.build import BuildRequest, build
from smc.exported.engines import cuda_memory
from tests.conformance import DATA

os.environ.setdefault("NO_COLOR", "1")  # plain command-line output, whatever the terminal

TINY_SHAPES = ((96, 128), (128, 96), (80, 112))
"""(H, W) shapes of the tiny bundle: those of the conformance cases."""


LARGE_BYTES = 4 * 10**9
"""Disk that a test of the public model needs."""


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A bundle of the tiny conformance model. Read-only: copy it before changing anything.

    Parallel test workers share it: the build itself makes the others wait and reuse.
    """
    base = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        base = base.parent
    config = DATA / "tiny_landscape.config.json"
    return build(BuildRequest(gpu="cpu", out=base / "tiny-bundle", random_seed=0, model=str(config), shapes=TINY_SHAPES)).path


@pytest.fixture(scope="session")
def tiny_graphs(tiny_bundle: Path) -> tuple[Path, Path]:
    """The tiny model as ONNX files, the encoder's and the decoder's. Read-only; test workers share them.

    No other hard links point at them, which onnx_ir would refuse and which some tests make of the bundle's files.
    """
    folder = tiny_bundle.with_name("tiny-graphs")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            shutil.copytree(tiny_bundle, folder)
    return folder / "encoder.onnx", folder / "decoder.onnx"


@pytest.fixture(scope="session")
def tiny_matcher(tiny_bundle: Path) -> smc.Matcher:
    return smc.load(tiny_bundle)


@pytest.fixture(scope="module")
def module_tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """`tmp_path` for all tests of a module, removed after the last of them: bundles are too large to be kept to the end."""
    folder = tmp_path_factory.mktemp("module")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: tests of small tensors that run beside others gain nothing by more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not has_gpu():
        missing["gpu"] = "this machine has no NVIDIA GPU"
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < LARGE_BYTES:
        missing["large"] = f"needs {LARGE_BYTES / 1e9:.0f} GB in {tempfile.gettempdir()}, which has {free / 1e9:.1f}; TMPDIR names another"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def has_gpu() -> bool:
    try:
        return bool(cuda_memory.devices())
    except smc.NoTarget:
        return False


@pytest.fixture(scope="session")
def examples() -> Path:
    return Path(__file__).parent.parent / "examples"
