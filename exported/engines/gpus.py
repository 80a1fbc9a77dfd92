"""Which of the machine's GPUs a plan runs on."""

from __future__ import annotations

from smc.exported.engines.cuda_memory import Device
from smc.exported.errors import BundleMismatch
from smc.exported.manifest import Manifest


def choose_device(devices: list[Device], manifest: Manifest) -> Device:
    """The first GPU of the plan's compute capability. Raises BundleMismatch if there is none."""
    for device in devices:
        if device.sm == manifest.target.sm:
            return device
    found = ", ".join(f"{device.name} (sm {device.sm})" for device in devices)
    raise BundleMismatch(
        f"the plan is for {manifest.target.gpu} (sm {manifest.target.sm}), and this machine has {found}",
        fix="build one for this machine: smc build --gpu NAME; smc targets lists the names",
    )
