"""The machines that bundles can be built for."""

from __future__ import annotations

import importlib.util
import re

import pytest

from smc.compiler.backends import BACKENDS, choose_backend, cuda
from smc.compiler.targets import TARGETS, Target, find_target
from smc.exported.errors import NoTarget, UsageError

CAPABILITIES = {
    "7.0": ["v100"],
    "7.5": ["t4"],
    "8.0": ["a100", "a30"],
    "8.6": ["a10", "a40", "rtx3090", "rtxa6000"],
    "8.7": ["orin"],
    "8.9": ["l4", "l40s", "rtx4090"],
    "9.0": ["h100", "h200"],
    "10.0": ["b200"],
    "12.0": ["rtx5090"],
}
"""Compute capabilities, by NVIDIA's list."""


def test_every_machine_is_there_with_its_capability() -> None:
    wanted = {name: sm for sm, names in CAPABILITIES.items() for name in names}
    assert {name: target.sm for name, target in TARGETS.items()} == wanted | {"cpu": None}


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_a_target_is_described_in_full(target: Target) -> None:
    assert TARGETS[target.name] is target
    assert re.fullmatch("[a-z0-9]+", target.name)
    assert target.title
    if target.name == "cpu":
        assert (target.sm, target.memory_gib) == (None, None)
    else:
        assert target.title.startswith("NVIDIA ")
        assert target.memory_gib is not None
        assert 16 <= target.memory_gib <= 180


def test_titles_differ() -> None:
    assert len({target.title for target in TARGETS.values()}) == len(TARGETS)


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if not target.refusal])
def test_targets_are_found_in_any_spelling(name: str) -> None:
    for spelling in (name, name.upper(), f"nvidia {name}", f"NVIDIA-{name.upper()}", f" {name} ", "-".join(name)):
        assert find_target(spelling) is TARGETS[name]


@pytest.mark.parametrize("spelling", ["GeForce RTX 4090", "geforce_rtx4090", "rtx-4090", "RTX 4090"])
def test_geforce_cards_are_found_in_any_spelling(spelling: str) -> None:
    assert find_target(spelling) is TARGETS["rtx4090"]


@pytest.mark.parametrize("spelling", ["jetson-orin", "AGX Orin", "Jetson AGX Orin"])
def test_orin_is_found_in_any_spelling(spelling: str) -> None:
    assert find_target(spelling) is TARGETS["orin"]


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if t.sm and not t.refusal], ids=lambda target: target.name)
def test_gpus_are_found_by_their_title(target: Target) -> None:
    assert find_target(target.title) is target


@pytest.mark.parametrize("name", ["", " ", "nvidia", "tpu", "a4", "a4000", "rtx", "4090", "h100x", "[red]", "cpu\0"])
def test_an_unknown_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(UsageError, match=re.escape(repr(name))) as caught:
        find_target(name)
    for known in TARGETS:
        assert known in str(caught.value)


@pytest.mark.parametrize("name", ["v100", "V100", "nvidia-v100"])
def test_v100_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(NoTarget, match=r"NVIDIA V100: sm 7\.0 is no longer supported by CUDA 13") as caught:
        find_target(name)
    assert caught.value.exit_status == 69
    assert "smc targets" in caught.value.fix


def test_the_cpu_has_a_backend() -> None:
    assert choose_backend(find_target("cpu")).NAME == "onnxruntime"


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_our_own_kernels_are_for_gpus_from_compute_capability_8(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anywhere, with or without that GPU: what counts is whether Triton is installed."""
    if target.sm is None:
        assert "NVIDIA GPUs only" in cuda.refusal(target)
    elif target.sm.startswith("7."):
        assert cuda.refusal(target) == f"sm {target.sm} is older than 8.0, the oldest that its kernels are for"
    else:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "Triton" in cuda.refusal(target)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
        assert cuda.refusal(target) == ""
        assert choose_backend(target, "cuda") is cuda
        monkeypatch.setattr(cuda, "version", lambda: "3.7.1")
        assert cuda.refusal(target) == "Triton 3.7.1 is too old to compile its kernels, which takes 3.9"
        monkeypatch.setattr(cuda, "version", lambda: "3.10.0+git")
        assert cuda.refusal(target) == ""


@pytest.mark.parametrize("target", [t for t in TARGETS.values() if not t.refusal], ids=lambda target: target.name)
def test_a_machine_without_a_backend_is_refused_with_each_ones_reason(target: Target) -> None:
    reasons = {backend.NAME: backend.refusal(target) for backend in BACKENDS}
    if not all(reasons.values()):
        assert not reasons[choose_backend(target).NAME]
        return
    with pytest.raises(NoTarget) as caught:
        choose_backend(target)
    assert target.title in str(caught.value)
    for name, reason in reasons.items():
        assert f"{name}: {reason}" in str(caught.value)
