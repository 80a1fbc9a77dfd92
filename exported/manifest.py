"""The bundle's manifest: its schema, and reading and writing it. The format is specified in docs/bundle.md."""

from __future__ import annotations

import hashlib
import json
import math
import re
from typing import Any, Literal

import msgspec

from smc.exported.errors import BundleDamaged, BundleMismatch

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 4 << 20

FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""Files lie directly in the bundle: no separators, so no way out of it."""

_DIGEST = re.compile(rb'"digest": "([0-9a-f]{64})"')
_NO_DIGEST = b"0" * 64


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of the manifest: every member is required, and none that is not listed is taken."""


class Shape(_Record, frozen=True):
    """An input shape in pixels."""

    height: int
    width: int


class ModelInfo(_Record, frozen=True):
    """Which network. `checkpoint_sha256` is None for random weights."""

    source: str
    checkpoint_sha256: str | None
    parameters: int
    config: dict[str, Any]


class TargetInfo(_Record, frozen=True):
    """The machine the plan is for: a name of `smc targets`, and for a GPU its compute capability, such as "8.6"."""

    gpu: str
    sm: str | None


class BackendInfo(_Record, frozen=True):
    """What runs the plan: a backend's name and the version of its library that built it."""

    name: str
    version: str


class FileInfo(_Record, frozen=True):
    size: int
    sha256: str


class OutputError(_Record, frozen=True):
    """How far one output lies from float32.

    relative: ||plan - reference|| / ||reference||, norms over the whole output.
    worst_pixel: the largest error of one pixel (or token), in units of the reference's root mean square pixel norm.
    worst_at: (row, column) of that pixel.
    """

    relative: float
    worst_pixel: float
    worst_at: tuple[int, int]


class PairReport(_Record, frozen=True):
    """One verified pair of images.

    outputs: by name, the encoder's `features1` and `features2` and the decoder's maps.
    matches_reference, matches_plan: number of matches from either's descriptors; overlap: shared / union, 1 if both are empty.
    """

    shapes: tuple[Shape, Shape]
    outputs: dict[str, OutputError]
    matches_reference: int
    matches_plan: int
    match_overlap: float


class Tolerance(_Record, frozen=True):
    """What a plan must reach on every output of every pair."""

    relative: float
    worst_pixel: float
    match_overlap: float


class Verification(_Record, frozen=True):
    """A parity check.

    subject: "plan" if the plan itself was run; "graph" if the graph that it was built from was run instead, in ONNX Runtime.
    reference: what gave the float32 outputs.
    """

    subject: Literal["plan", "graph"]
    reference: str
    tolerance: Tolerance
    pairs: list[PairReport]


class Manifest(_Record, frozen=True):
    """What a bundle is.

    precision: "fp32", "hybrid", "fp16" or "bf16".
    max_batch: pairs at once that the plan takes, None for any number.
    stages: "encoder" and "decoder" -> the plan's file.
    graphs: "encoder" and "decoder" -> the ONNX graph that the plan was built from; the plan itself, for ONNX Runtime.
    recorded: file of the float32 outputs that `verification` compared with, None where the graphs are float32 themselves.
    files: every file but this one.
    verify_only: files that `smc verify` and `smc inspect` read and that matching does not need.
    """

    format: int
    tool_version: str
    created: str
    build_key: str
    model: ModelInfo
    target: TargetInfo
    backend: BackendInfo
    precision: str
    shapes: list[Shape]
    max_batch: int | None
    stages: dict[str, str]
    graphs: dict[str, str]
    recorded: str | None
    files: dict[str, FileInfo]
    verify_only: list[str]
    verification: Verification

    @property
    def plan_files(self) -> dict[str, FileInfo]:
        """The files that matching needs."""
        return {name: info for name, info in self.files.items() if name not in self.verify_only}

    @property
    def input_shapes(self) -> list[tuple[int, int]]:
        """(H, W) of every input shape."""
        return [(shape.height, shape.width) for shape in self.shapes]

    @property
    def random_weights(self) -> bool:
        return self.model.checkpoint_sha256 is None


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialise, with a last member `digest`: the SHA-256 of these very bytes with the digest's 64 characters set to 0."""
    fields = msgspec.to_builtins(manifest) | {"digest": _NO_DIGEST.decode()}
    data = json.dumps(fields, indent=1, ensure_ascii=True, allow_nan=False).encode() + b"\n"
    return _with_digest(data, hashlib.sha256(data).hexdigest().encode())


def decode_manifest(data: bytes) -> Manifest:
    """Check and parse a manifest's bytes.

    Raises:
        BundleMismatch: of a newer format.
        BundleDamaged: anything else that is not a whole and proper manifest.
    """
    # The digest comes first: every format carries it alike, so damage is told from a newer format.
    digests = _DIGEST.findall(data)
    if len(digests) != 1:
        raise _damaged("it holds no digest of itself")
    found = hashlib.sha256(_with_digest(data, _NO_DIGEST)).hexdigest()
    if found != digests[0].decode():
        raise _damaged(f"its bytes hash to {found[:16]}..., it says {digests[0].decode()[:16]}...")
    fields = _parse_json(data)
    if not isinstance(fields, dict) or type(fields.get("format")) is not int or fields.get("digest") != digests[0].decode():
        raise _damaged("it states no format version and digest")
    if fields["format"] != FORMAT_VERSION:
        raise BundleMismatch(
            f"bundle format {fields['format']}, this version of speedy-mast3r reads format {FORMAT_VERSION}",
            fix="upgrade speedy-mast3r, or build the bundle again with this version",
        )
    del fields["digest"]
    try:
        manifest = msgspec.convert(fields, Manifest)
    except msgspec.ValidationError as error:
        raise _damaged(str(error)) from error
    _check_consistency(manifest)
    return manifest


def _with_digest(data: bytes, digest: bytes) -> bytes:
    return _DIGEST.sub(b'"digest": "' + digest + b'"', data)


def _parse_json(data: bytes) -> Any:
    """The value of a JSON text, by the letter of RFC 8259: Python's reader alone takes several encodings and NaN."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_parse_finite)
        json.dumps(value, ensure_ascii=False).encode()  # refuses halves of surrogate pairs, which no printer can print
    except (ValueError, RecursionError) as error:
        raise _damaged(f"not proper JSON ({error})") from error
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text} is out of range")
    return value


def _check_consistency(manifest: Manifest) -> None:
    for name, info in manifest.files.items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST_NAME:
            raise _damaged(f"{name!r} is not a file name that a bundle may hold")
        if info.size < 0 or not re.fullmatch(r"[0-9a-f]{64}", info.sha256):
            raise _damaged(f"the description of {name} is malformed")
    for member, named in (("stages", manifest.stages), ("graphs", manifest.graphs)):
        if named.keys() != {"encoder", "decoder"}:
            raise _damaged(f"its {member} are {', '.join(named)}, not encoder and decoder")
        for stage, name in named.items():
            if name not in manifest.files:
                raise _damaged(f"{member} names no file of the bundle for the {stage}")
    for name in (*manifest.verify_only, *filter(None, [manifest.recorded])):
        if name not in manifest.files:
            raise _damaged(f"{name!r} is no file of the bundle")
    if set(manifest.verify_only) & set(manifest.stages.values()):
        raise _damaged("it lists a plan's file as needed for verification only")
    if not manifest.shapes or any(s.height <= 0 or s.width <= 0 or s.height % 16 or s.width % 16 for s in manifest.shapes):
        raise _damaged("its input shapes are not positive multiples of 16")
    if not manifest.verification.pairs or not all(pair.outputs for pair in manifest.verification.pairs):
        raise _damaged("its verification verified nothing")


def _damaged(what: str) -> BundleDamaged:
    return BundleDamaged(f"{MANIFEST_NAME}: {what}", fix="build the bundle again, or copy it again from where it was built")
