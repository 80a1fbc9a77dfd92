"""The model's configuration, read from either published checkpoint layout.

The fields are those of the original's `config.json`; `dpt_dim`, `dpt_level_dims` and `desc_mlp_ratio`, constants there, are
fields here so that a slimmer model of the same architecture can be described.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import os
import re
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smc.exported.errors import BadCheckpoint, BadInput, InputMissing

Mode = tuple[str, float, float]
"""An output activation: its kind and the bounds of its range."""

INFINITY = float("inf")

PATCH_EMBEDS = ("PatchEmbedDust3R", "ManyAR_PatchEmbed")
"""One and the same convolution; the second adds bookkeeping for training batches of mixed aspect ratio, so it reads as the first."""

TRAINING_FIELDS = frozenset({"freeze", "mask_ratio", "landscape_only"})
"""Arguments of the original's constructor that do not change the function computed at inference."""

CLASS_NAME = "AsymmetricMASt3R"

UNSEEN_IN_WEIGHTS = ("enc_num_heads", "dec_num_heads", "desc_conf_mode")
"""Fields that no weight's shape gives away and whose defaults in the original are not ours: a description must state them, or
the model would load and compute something else."""

LARGEST, DEEPEST, LONGEST = 1 << 16, 256, 10_000
"""Limits of a width, a depth and a model string, far above any real model: a hostile file must not exhaust memory or time."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines the network's graph.

    Attributes:
        enc_embed_dim, enc_depth, enc_num_heads: the ViT encoder.
        dec_embed_dim, dec_depth, dec_num_heads: each of the two decoders.
        pos_embed: "RoPE<base>".
        head_type: "catmlp+dpt".
        output_mode: "pts3d+desc<D>", D the descriptor size.
        depth_mode: activation of the points' distance, which has no bounds.
        conf_mode, desc_conf_mode: activations of the two confidences.
        desc_mode: "norm", descriptors of unit length.
        two_confs: whether descriptors have a confidence of their own; if not, `desc_conf` equals `conf`.
        dpt_dim: width of the DPT's fusion path.
        dpt_level_dims: widths of its four levels before the fusion.
        desc_mlp_ratio: hidden width of the descriptors' MLP, over its input's, which is both token widths together.
        img_size: (H, W) the model was trained for, pixels; informative.
    """

    enc_embed_dim: int = 1024
    enc_depth: int = 24
    enc_num_heads: int = 16
    dec_embed_dim: int = 768
    dec_depth: int = 12
    dec_num_heads: int = 12
    mlp_ratio: int = 4
    patch_size: int = 16
    patch_embed_cls: str = "PatchEmbedDust3R"
    pos_embed: str = "RoPE100"
    head_type: str = "catmlp+dpt"
    output_mode: str = "pts3d+desc24"
    depth_mode: Mode = ("exp", -INFINITY, INFINITY)
    conf_mode: Mode = ("exp", 1.0, INFINITY)
    desc_mode: str = "norm"
    desc_conf_mode: Mode = ("exp", 0.0, INFINITY)
    two_confs: bool = True
    dpt_dim: int = 256
    dpt_level_dims: tuple[int, int, int, int] = (96, 192, 384, 768)
    desc_mlp_ratio: float = 4.0
    img_size: tuple[int, int] = (512, 512)

    def __post_init__(self) -> None:
        for name in ("enc", "dec"):
            dim, heads = getattr(self, f"{name}_embed_dim"), getattr(self, f"{name}_num_heads")
            _require(dim % heads == 0, f"{name}_embed_dim {dim} is not a multiple of {name}_num_heads {heads}")
            _require(dim // heads % 4 == 0, f"{name} head size {dim // heads} is not a multiple of 4, which RoPE2D needs")
            depth = getattr(self, f"{name}_depth")
            _require(depth <= DEEPEST, f"{name}_depth {depth}, at most {DEEPEST}")
        _require(self.dec_depth >= 4, f"dec_depth {self.dec_depth}: the DPT head reads four levels, so at least 4")
        _require(self.patch_size == 16, f"patch_size {self.patch_size}: the DPT head's resampling needs 16")
        _require(self.patch_embed_cls == "PatchEmbedDust3R", f"patch_embed_cls {self.patch_embed_cls!r}, known: {PATCH_EMBEDS}")
        _require(self.head_type == "catmlp+dpt", f"head_type {self.head_type!r}, known: 'catmlp+dpt'")
        _require(self.desc_mode == "norm", f"desc_mode {self.desc_mode!r}, known: 'norm'")
        _require(re.fullmatch(r"RoPE[1-9][0-9]{,8}", self.pos_embed), f"pos_embed {self.pos_embed!r}, known: 'RoPE<base>'")
        _require(re.fullmatch(r"pts3d\+desc[1-9][0-9]{,3}", self.output_mode), f"output_mode {self.output_mode!r}, known: 'pts3d+desc<D>'")
        _require(self.dpt_dim % 2 == 0, f"dpt_dim {self.dpt_dim} is odd")
        _require(0 < self.desc_mlp_ratio <= 64, f"desc_mlp_ratio {self.desc_mlp_ratio}, above 0 and at most 64 expected")
        _require(self.desc_mlp_hidden >= 1, f"desc_mlp_ratio {self.desc_mlp_ratio} leaves no hidden channel")
        for name, kinds in (
            ("depth_mode", ("exp", "linear", "square")),
            ("conf_mode", ("exp", "sigmoid")),
            ("desc_conf_mode", ("exp", "sigmoid")),
        ):
            kind, low, high = getattr(self, name)
            _require(kind in kinds, f"{name} {kind!r}, known: {kinds}")
            _require(low < high, f"{name}: bounds {low} to {high} are empty")
            _require(name == "depth_mode" or math.isfinite(low), f"{name}: the lower bound must be finite")
            _require(name != "depth_mode" or (math.isinf(low) and math.isinf(high)), "depth_mode: distances cannot be bounded")
            _require(kind != "sigmoid" or math.isfinite(high), f"{name}: a sigmoid's upper bound must be finite")

    @property
    def rope_base(self) -> float:
        return float(self.pos_embed.removeprefix("RoPE"))

    @property
    def desc_dim(self) -> int:
        return int(self.output_mode.partition("desc")[2])

    @property
    def desc_mlp_hidden(self) -> int:
        return int(self.desc_mlp_ratio * (self.enc_embed_dim + self.dec_embed_dim))

    @property
    def dpt_hooks(self) -> tuple[int, int, int, int]:
        """Which decoder levels the DPT head reads; 0 is the encoder's output."""
        depth = self.dec_depth
        return (0, depth * 2 // 4, depth * 3 // 4, depth)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; infinite bounds become the strings "inf" and "-inf", which strict JSON can hold."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(v) for v in value]
            return str(value) if isinstance(value, float) and math.isinf(value) else value

        return {name: plain(value) for name, value in dataclasses.asdict(self).items()}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> ModelConfig:
        """Check names and types of plain values (from JSON or a model string) and build the configuration.

        Raises:
            BadCheckpoint: an unknown or missing field, or a value that this architecture does not have.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}
        values = {}
        for name, value in fields.items():
            if name in TRAINING_FIELDS:
                continue
            _require(name in known, f"unknown field {reprlib.repr(name)}")
            values[name] = _coerce(name, value, known[name].default)
        for name in UNSEEN_IN_WEIGHTS:
            unused = name == "desc_conf_mode" and values.get("two_confs") is False
            _require(name in values or unused, f"{name} is missing")
        if values.get("patch_embed_cls") in PATCH_EMBEDS:
            values["patch_embed_cls"] = PATCH_EMBEDS[0]
        return cls(**values)


def _require(condition: object, why: str) -> None:
    if not condition:
        raise BadCheckpoint(f"model configuration: {why[:300]}")


def _shown(value: Any) -> str:
    """A short representation, however long or deeply nested the value."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print ints of more than 4300 digits
        return "a number of thousands of digits"


def _coerce(name: str, value: Any, example: Any) -> Any:
    """`value` in the type of the field's default."""
    if name == "img_size" and isinstance(example, tuple) and isinstance(value, int):
        value = (value, value)
    if isinstance(value, int):
        _require(abs(value) <= LARGEST, f"{name} is {_shown(value)}, at most {LARGEST} expected")

    if isinstance(example, tuple):
        if isinstance(value, list | tuple) and len(value) == len(example):
            return tuple(_coerce(name, v, e) for v, e in zip(value, example, strict=True))
    elif isinstance(example, float) and not isinstance(value, bool):
        if isinstance(value, int | float) or value in ("inf", "-inf"):
            return float(value)
    elif type(value) is type(example) and (not isinstance(value, int) or isinstance(value, bool) or value > 0):
        return value
    raise BadCheckpoint(f"model configuration: {name} is {_shown(value)}, expected a value like {example!r}")


def parse_model_string(text: str) -> ModelConfig:
    """Read `AsymmetricMASt3R(enc_depth=24, conf_mode=('exp', 1, inf), ...)` without evaluating it.

    Only a call of that one name with literal keyword arguments (and the name `inf`) passes.

    Raises:
        BadCheckpoint: the text is anything else.
    """
    text = text.strip()
    if len(text) > LONGEST:
        raise BadCheckpoint(f"model string of {len(text):,} characters, at most {LONGEST:,} expected: {text[:80]!r}")
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BadCheckpoint(f"model string is not an expression: {text[:80]!r}") from error
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == CLASS_NAME and not call.args):
        raise BadCheckpoint(f"model string is not {CLASS_NAME}(name=value, ...): {text[:80]!r}")
    fields: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None:
            raise BadCheckpoint("model string unpacks arguments with **")
        if keyword.arg in fields:
            raise BadCheckpoint(f"model string gives {reprlib.repr(keyword.arg)} twice")
        try:
            fields[keyword.arg] = _literal(keyword.value)
        except ValueError as error:
            value = ast.get_source_segment(text, keyword.value) or ""
            raise BadCheckpoint(f"model string: {value[:80]!r} is not a literal") from error
    return ModelConfig.from_fields(fields)


def _literal(node: ast.expr) -> Any:
    """The value of a scalar, or of a tuple or list of scalars; no field nests deeper, so neither does this.

    Raises:
        ValueError: the node is anything else.
    """
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_scalar(item) for item in node.elts)
    return _scalar(node)


def _scalar(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value):
            return value
        case ast.Name(id="inf"):
            return INFINITY
        case ast.Call(func=ast.Name(id="float"), args=[ast.Constant(value="inf" | "-inf" as value)], keywords=[]):
            return float(value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant() | ast.Name() | ast.Call() as operand):
            value = _scalar(operand)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return -value
    raise ValueError(f"a {type(node).__name__} is not a literal")


def read_config_json(path: Path) -> ModelConfig:
    """Read the `config.json` of the Hugging Face layout; Python's own JSON reader takes its `Infinity`.

    Raises:
        InputMissing: no such file, or it cannot be read.
        BadCheckpoint: not JSON, or not a configuration of this architecture.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise BadCheckpoint(f"{path}: not UTF-8 text") from error
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, and ValueError for a number of thousands of digits
        raise BadCheckpoint(f"{path}: not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise BadCheckpoint(f"{path}: a JSON object was expected")
    return ModelConfig.from_fields(fields)


PRESETS = {
    "large": ModelConfig(),
    "small": ModelConfig(
        enc_embed_dim=192,
        enc_depth=6,
        enc_num_heads=3,
        dec_embed_dim=192,
        dec_depth=8,
        dec_num_heads=3,
        dpt_dim=64,
        dpt_level_dims=(24, 48, 96, 192),
    ),
    "pocket": ModelConfig(
        enc_embed_dim=192,
        enc_depth=6,
        enc_num_heads=3,
        dec_embed_dim=128,
        dec_depth=6,
        dec_num_heads=2,
        mlp_ratio=3,
        dpt_dim=32,
        dpt_level_dims=(16, 32, 32, 32),
        desc_mlp_ratio=0.5,
        img_size=(384, 512),
    ),
}
"""Named configurations: the public model's; one that runs in a second on a CPU; and the one that `smc.compiler.training` trains,
7.7 M parameters. Of the latter's size, the two descriptor MLPs take 2.2 M, which the original's ratio would make 17.2 M."""


def resolve_config(name_or_path: str) -> ModelConfig:
    """A preset's name, or the path of a `config.json`.

    Raises:
        BadInput: neither.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]
    if not os.path.exists(name_or_path):  # unlike Path.exists, false for a name too long to be a file's
        raise BadInput(f"model {name_or_path[:200]!r} is neither one of {', '.join(PRESETS)} nor a config.json")
    return read_config_json(Path(name_or_path))
