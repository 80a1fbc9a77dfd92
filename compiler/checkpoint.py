"""Checkpoints in: the two published layouts, and remade random weights. Nothing in a checkpoint ever runs.

- The original's `.pth`: a torch zip with `args` (an `argparse.Namespace` whose `model` is the model string), `model` (the
  state dict) and training leftovers. Read with torch's weights-only unpickler, `Namespace` being the one class allowed.
- The Hugging Face layout: a folder with `config.json` and `model.safetensors`.

Names and shapes must match the model exactly.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import pickletools
import re
import reprlib
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smc.compiler.config import ModelConfig, parse_model_string, read_config_json
from smc.compiler.model import Mast3r
from smc.exported.errors import BadCheckpoint, InputMissing

UNUSED = re.compile(r"mask_token|downstream_head[12]\.dpt\.scratch\.refinenet4\.resConfUnit1\..*")
"""Names that checkpoints hold and inference never reads: the pre-training mask, and the skip unit of the deepest fusion step,
which has no skip input."""

ALIAS = re.compile(r"(.*\.scratch\.)layer([1-4])_rn(\.weight)")
"""`layer<i>_rn` and `layer_rn.<i-1>` are one tensor under two names; a file may hold both or only the first."""

WEB_PAGE = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|!--|\?xml|html|head)", re.IGNORECASE)
"""The start of an HTML or XML page. A mere "<" would not do: a safetensors file starts with its header's length, any byte."""

EXPECTED_GLOBAL = re.compile(r"torch\..*|collections\.OrderedDict|argparse\.Namespace")
"""What the pickle of an honest checkpoint refers to."""

PICKLE_LIMIT = 8 << 20
"""As much of a pickle as is ever looked at for an error's message, in bytes."""

HF_WEIGHTS, HF_CONFIG = "model.safetensors", "config.json"


@dataclass(frozen=True)
class Weights:
    """A model's configuration and parameters, with their origin.

    Attributes:
        config: the architecture.
        tensors: parameter name -> float32 tensor, exactly the names of `Mast3r(config)`.
        source: what to tell a reader: a file name, or "random weights, seed N".
        sha256: of the weight file; None for random weights.
    """

    config: ModelConfig
    tensors: dict[str, Tensor]
    source: str
    sha256: str | None

    def build_model(self) -> Mast3r:
        """The torch model over these very tensors (no copy), in evaluation mode."""
        with torch.device("meta"):
            model = Mast3r(self.config)
        model.load_state_dict(self.tensors, assign=True)
        return model.eval().requires_grad_(False)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in Mast3r(config).state_dict().items()}


def random_weights(config: ModelConfig, seed: int) -> Weights:
    """Deterministic weights of a trained network's scale, remade anywhere from the parameters' names.

    Every parameter draws from its own generator, `RandomState(crc32(name) + seed)`, and is scaled so that activations keep
    their size through the network. Matches made with them mean nothing.
    """

    def remake(item: tuple[str, tuple[int, ...]]) -> tuple[str, Tensor]:
        name, shape = item
        generator = np.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
        x = generator.standard_normal(math.prod(shape)).reshape(shape)
        if name.endswith(".bias"):
            x *= 0.02
        elif len(shape) == 1:
            x = 1 + 0.1 * x
        elif len(shape) == 2:
            x /= math.sqrt(shape[1])
        else:
            transposed = re.search(r"\.act_postprocess\.[01]\.1\.weight$", name)
            x /= math.sqrt(shape[0] if transposed else math.prod(shape[1:]))
        if name.endswith(".dpt.head.4.weight"):
            x *= 0.1  # the points' distance is the exponential of this layer's output
        return name, torch.from_numpy(x.astype(np.float32))

    with ThreadPoolExecutor(2) as pool:  # bounded, as each parameter passes through float64
        tensors = dict(pool.map(remake, parameter_shapes(config).items()))
    return Weights(config, tensors, f"random weights, seed {seed}", None)


def load_checkpoint(path: Path) -> Weights:
    """Read a checkpoint: a `.pth` file, a `.safetensors` file with `config.json` beside it, or the folder of those two.

    Raises:
        InputMissing: a file is absent or unreadable.
        BadCheckpoint: damaged, unsafe, of another architecture, or with weights that are not finite.
    """
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name too long to be a file's
        path = path / HF_WEIGHTS
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(512)
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputMissing(
            f"{path}: {error.strerror or error}", fix="give a .pth file, or the folder of model.safetensors and config.json"
        ) from error
    if size == 0:
        raise BadCheckpoint(f"{path}: the file is empty (0 bytes)", fix="download it again")
    if WEB_PAGE.match(head):
        raise BadCheckpoint(
            f"{path}: an HTML or XML page of {size:,} bytes, not a checkpoint", fix="download the file itself, not its web page"
        )

    if path.suffix == ".safetensors":
        config = read_config_json(path.with_name(HF_CONFIG))
        state = _read_safetensors(path, size)
    else:
        config, state = _read_pth(path, size)
    return Weights(config, _match_names(path, config, state), path.name, sha256)


def _read_safetensors(path: Path, size: int) -> dict[str, Tensor]:
    expected = _safetensors_size(path)
    if expected is not None and expected != size:
        raise BadCheckpoint(f"{path}: {expected:,} bytes expected from its header, {size:,} found", fix="download it again")
    try:
        return load_file(path)
    except (SafetensorError, ValueError) as error:
        raise BadCheckpoint(f"{path}: not a valid safetensors file of {size:,} bytes ({error})", fix="download it again") from error


def _safetensors_size(path: Path) -> int | None:
    """The size that a safetensors file's header calls for, the header's own where that is cut, None if it makes no sense."""
    with path.open("rb") as file:
        length_bytes = file.read(8)
        if len(length_bytes) < 8:
            return None
        length = int.from_bytes(length_bytes, "little")
        if length > 100_000_000:  # the format's own limit
            return None
        header = file.read(length)
    if len(header) < length:
        return 8 + length
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    return 8 + length + max(ends, default=0) if all(type(end) is int and 0 <= end < 1 << 63 for end in ends) else None


def _read_pth(path: Path, size: int) -> tuple[ModelConfig, dict[Any, Any]]:
    zipped = _ends_like_zip(path)
    if not zipped and _starts_like_zip(path):
        raise BadCheckpoint(
            f"{path}: truncated, at least {_torch_zip_size(path):,} bytes expected, {size:,} found", fix="download it again"
        )
    try:
        content = _load_pickle(path, mmap=zipped and _is_stored(path))
    except pickle.UnpicklingError as error:
        if name := _refused_global(error) or _unexpected_global(path, zipped):
            raise BadCheckpoint(
                f"{path}: its pickle wants to run {name}; only weights are loaded, so nothing ran",
                fix="use a checkpoint from the model's authors",
            ) from error
        raise BadCheckpoint(f"{path}: not a torch checkpoint ({size:,} bytes; {_reason(error)})", fix="download it again") from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, ValueError and more on damaged files
        raise BadCheckpoint(
            f"{path}: damaged or not a torch checkpoint ({size:,} bytes; {_reason(error)})", fix="download it again"
        ) from error

    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise BadCheckpoint(f"{path}: a dictionary with 'args' and 'model' was expected")
    model_string = getattr(content.get("args"), "model", None)
    if not isinstance(model_string, str):
        raise BadCheckpoint(f"{path}: 'args' holds no model string")
    return parse_model_string(model_string), content["model"]


def _load_pickle(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
        # torch warns of unusual pickles; whether one can be used is known a moment later, as it loads or raises.
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _is_stored(path: Path) -> bool:
    """Whether no member of a zip is compressed; torch would map compressed bytes as if they were the weights."""
    with zipfile.ZipFile(path) as archive:
        return all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())


def _reason(error: Exception) -> str:
    """The first line of what went wrong, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error:")[2].partition("In PyTorch 2.6")[0]
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0]}"[:200]


def _refused_global(error: pickle.UnpicklingError) -> str | None:
    name = re.search(r"GLOBAL ([\w.]+)", str(error))
    return name[1] if name else None


def _unexpected_global(path: Path, zipped: bool) -> str | None:
    """The first name outside of torch that a file's pickle refers to, for pickles that torch refuses before it gets there."""
    recent = deque[str](maxlen=2)
    for opcode, argument in _pickle_opcodes(_pickle_bytes(path, zipped)):
        if opcode in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
        elif opcode == "STACK_GLOBAL":
            name = ".".join(recent)
        else:
            if isinstance(argument, str):
                recent.append(argument)
            continue
        if not EXPECTED_GLOBAL.fullmatch(name):
            return name[:200]
    return None


def _pickle_bytes(path: Path, zipped: bool) -> bytes:
    """The start of a file's pickle: of a torch zip's `data.pkl`, or of the file itself; nothing where that cannot be read."""
    if not zipped:
        with path.open("rb") as file:
            return file.read(PICKLE_LIMIT)
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as member:
                return member.read(PICKLE_LIMIT)
    except Exception:  # zipfile raises as many kinds on damaged files as torch, whose error is then the one to tell
        return b""


def _pickle_opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """(opcode, argument) of one pickle after the other, references to the memo resolved, up to where the data is cut or damaged.

    Nothing is run. Opcodes that store into the memo are left out.
    """
    stream = io.BytesIO(data)
    try:
        while True:
            memo, last = dict[Any, Any](), None
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
                    memo[argument] = last
                elif opcode.name == "MEMOIZE":
                    memo[len(memo)] = last
                else:
                    last = memo.get(argument) if opcode.name in ("GET", "BINGET", "LONG_BINGET") else argument
                    yield opcode.name, last
    except ValueError:
        return


def _ends_like_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # an end that contradicts itself
        return True


def _starts_like_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def _torch_zip_size(path: Path) -> int:
    """A lower bound of the size of a torch zip whose end is missing.

    The archive's first member is the pickle that names every storage with its element count.
    """
    item_sizes = {"Double": 8, "Long": 8, "Float": 4, "Int": 4, "Half": 2, "BFloat16": 2, "Short": 2}
    with path.open("rb") as file:
        header = file.read(30)
        start = 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")  # past a name and extra fields
        file.seek(start)
        data = file.read(PICKLE_LIMIT)

    storages, since_mark = dict[str, int](), list[Any]()  # tensors may share a storage, which is in the file once
    for opcode, argument in _pickle_opcodes(data):
        if opcode == "MARK":
            since_mark = []
        elif opcode == "BINPERSID":
            match since_mark:
                case ["storage", str(kind), str(key), _, int(count), *_] if 0 <= count < 1 << 40:
                    storages[key] = item_sizes.get(kind.removeprefix("torch ").removesuffix("Storage"), 1) * count
        elif opcode == "STOP":
            break
        else:
            since_mark.append(argument)
    return max(start + sum(storages.values()), path.stat().st_size + 1)


def _match_names(path: Path, config: ModelConfig, state: dict[Any, Any]) -> dict[str, Tensor]:
    """The state dict under the model's own names, as float32; every name, shape and value checked."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            shown = reprlib.repr(name)
            raise BadCheckpoint(f"{path}: its state dict maps {shown} to a {type(tensor).__name__}, a name and a tensor were expected")
        if UNUSED.fullmatch(name):
            continue
        if alias := ALIAS.fullmatch(name):
            # Where a file holds both, the original's loader ends up with the second name's value.
            found.setdefault(f"{alias[1]}layer_rn.{int(alias[2]) - 1}{alias[3]}", tensor)
        else:
            found[name] = tensor

    expected = parameter_shapes(config)
    plain = {name: tensor for name, tensor in found.items() if _is_plain(tensor)}
    complaints = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [name for name in found if name not in expected],
        "not dense floating-point": [name for name in expected if name in found and name not in plain],
        "misshapen": [
            f"{name} (expected {list(shape)}, found {list(plain[name].shape)})"
            for name, shape in expected.items()
            if name in plain and tuple(plain[name].shape) != shape
        ],
    }
    if any(complaints.values()):
        parts = [f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in complaints.items() if names]
        raise BadCheckpoint(
            f"{path}: not the architecture of its configuration; {'; '.join(parts)}",
            fix="use the config.json or model string that the weights were saved with",
        )

    tensors = {name: found[name].detach().float() for name in expected}
    bad = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise BadCheckpoint(f"{path}: NaN or infinite values in {_name_some(bad)}")
    return tensors


def _is_plain(tensor: Tensor) -> bool:
    """Neither sparse, nested, quantized, complex, integer nor without data."""
    return tensor.layout is torch.strided and not tensor.is_nested and tensor.is_floating_point() and tensor.device.type == "cpu"


def _name_some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
