"""The files of a run: `state.pt` to go on from, the model in the layout that `smc build --checkpoint` takes, a log, and a record.

Every file but the log is written beside its place and then moved there, so that a run may be cut at any moment.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smc.compiler.checkpoint import HF_CONFIG, HF_WEIGHTS
from smc.compiler.config import ModelConfig

STATE, LOG, RECORD = "state.pt", "log.jsonl", "training.json"


def save_state(folder: Path, state: Mapping[str, Any]) -> None:
    partial = folder / f"{STATE}.partial"
    torch.save(dict(state), partial)
    os.replace(partial, folder / STATE)


def load_state(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """What was saved last, None if nothing was."""
    path = folder / STATE
    return torch.load(path, map_location=device, weights_only=True) if path.exists() else None


def save_model(folder: Path, config: ModelConfig, weights: Mapping[str, Tensor]) -> int:
    """Float16 weights and their configuration; returns the weights' size in bytes."""
    half = {name: tensor.detach().to("cpu", torch.float16).contiguous() for name, tensor in weights.items()}
    partial = folder / f"{HF_WEIGHTS}.partial"
    save_file(half, partial)
    write_json(folder / HF_CONFIG, config.to_json())
    os.replace(partial, folder / HF_WEIGHTS)
    return (folder / HF_WEIGHTS).stat().st_size


def write_json(path: Path, content: Any) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(partial, path)


def append_log(folder: Path, entry: Mapping[str, Any]) -> None:
    with (folder / LOG).open("a") as file:
        file.write(json.dumps(entry) + "\n")


def machine(device: torch.device) -> dict[str, str]:
    """The hardware and software that a run used."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}
