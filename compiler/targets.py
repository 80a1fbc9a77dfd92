"""The machines that plans can be built for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from smc.exported.errors import NoTarget, UsageError


@dataclass(frozen=True)
class Target:
    """A machine.

    Attributes:
        name: what `--gpu` takes.
        title: the vendor's name.
        sm: CUDA compute capability, such as "8.6"; None for a CPU.
        memory_gib: memory on the card, GiB; for Orin shared with the CPU; None for a CPU.
        refusal: why nothing is built for it, or empty.
    """

    name: str
    title: str
    sm: str | None
    memory_gib: int | None
    refusal: str = ""

    @property
    def sm_number(self) -> int:
        """The compute capability as a number to compare, such as 86; 0 for a CPU."""
        return int((self.sm or "0").replace(".", ""))


_VOLTA = "sm 7.0 is no longer supported by CUDA 13, TensorRT 11 or TensorRT-RTX"

TARGETS = {
    target.name: target
    for target in (
        Target("cpu", "any 64-bit CPU", None, None),
        Target("t4", "NVIDIA T4", "7.5", 16),
        Target("v100", "NVIDIA V100", "7.0", 32, _VOLTA),
        Target("a10", "NVIDIA A10", "8.6", 24),
        Target("a30", "NVIDIA A30", "8.0", 24),
        Target("a40", "NVIDIA A40", "8.6", 48),
        Target("a100", "NVIDIA A100", "8.0", 80),
        Target("rtxa6000", "NVIDIA RTX A6000", "8.6", 48),
        Target("rtx3090", "NVIDIA GeForce RTX 3090", "8.6", 24),
        Target("orin", "NVIDIA Jetson AGX Orin", "8.7", 64),
        Target("l4", "NVIDIA L4", "8.9", 24),
        Target("l40s", "NVIDIA L40S", "8.9", 48),
        Target("rtx4090", "NVIDIA GeForce RTX 4090", "8.9", 24),
        Target("h100", "NVIDIA H100", "9.0", 80),
        Target("h200", "NVIDIA H200", "9.0", 141),
        Target("b200", "NVIDIA B200", "10.0", 180),
        Target("rtx5090", "NVIDIA GeForce RTX 5090", "12.0", 32),
    )
}


def find_target(name: str) -> Target:
    """The target of a name or title, in any case, with or without spaces, dashes, vendor and family ("RTX 4090", "nvidia-a40").

    Raises:
        UsageError: no such target.
        NoTarget: a known machine that nothing can be built for.
    """
    key = re.sub(r"[\s_-]|nvidia|geforce|jetson|agx", "", name.lower())
    if key not in TARGETS:
        raise UsageError(f"unknown target {name!r}, known: {', '.join(TARGETS)}", fix="smc targets lists them")
    target = TARGETS[key]
    if target.refusal:
        raise NoTarget(f"{target.title}: {target.refusal}", fix="smc targets lists the machines that can be built for")
    return target
