"""Which tile each operation takes: what was timed on the GPU, or on this GPU for the most similar size, or else a rule.

A tuning file is JSON: {"gpu", "sm", "when", "made_with", "tiles": {operation: {"tile": {..}, "microseconds": ..}}}. Those of this
project lie in `compiler/tuned/`, one for each GPU that was at hand; `smc tune` makes them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import msgspec

from smc.compiler.operations import default_tile, tile_type
from smc.exported.errors import BadInput

SHIPPED = Path(__file__).parent / "tuned"

_PLACE = re.compile(r"\w+_(row|group|offset)")
"""Names of attributes that say where an operand lies."""

_OF_PLACES = ("dtype", "strides")
"""Attributes of an operand's place that matter for speed: its type, and for elementwise work the order of its elements."""

_SIMILAR = 4.0
"""How much larger or smaller an operation may be than one that was timed, to take its tile."""

_LARGEST = 1 << 200
"""More than any operation's sizes multiply to: they are a handful of 32-bit integers."""


class Tuned(msgspec.Struct):
    """The fastest tile of an operation: its attributes, and how long the operation took, in microseconds."""

    tile: dict[str, Any]
    microseconds: float


class TuningFile(msgspec.Struct):
    """A tuning file's content.

    Attributes:
        gpu: the target's name; sm: its compute capability, 90 for 9.0.
        when: ISO date; made_with: versions of what compiled and ran the candidates.
        tiles: `describe(operation)` -> its fastest tile.
    """

    gpu: str
    sm: int
    when: str
    made_with: dict[str, str]
    tiles: dict[str, Tuned]


def describe(operation: Any) -> str:
    """An operation as text: its kind, sizes, types and options, without where its operands lie and the constants of its mathematics."""
    return f"{type(operation).__name__} {_fields(operation)}"


def _fields(value: Any) -> str:
    """The fields of an operation, or of an attribute that is a dataclass itself: `offset` marks one that is a place in memory."""
    is_place = hasattr(value, "offset")
    parts = []
    for field in dataclasses.fields(value):
        given = getattr(value, field.name)
        if (
            given == field.default
            or isinstance(given, float)
            or (field.name not in _OF_PLACES if is_place else _PLACE.fullmatch(field.name))
        ):
            continue
        parts.append(f"{field.name}={_text(given)}")
    return " ".join(parts)


def _text(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return f"({_fields(value)})"
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))})"
    return str(value)


class Tuning:
    """What is known of one GPU."""

    def __init__(self, sm: int, file: TuningFile | None = None) -> None:
        """`sm` is 90 for 9.0; a file for another compute capability is no use.

        Raises BadInput: the file has a tile, or an operation, that is impossible.
        """
        self.sm = sm
        self._file = file if file is not None and file.sm == sm else None
        self._tiles: dict[str, Any] = {}
        self._sizes: dict[str, dict[str, int]] = {}  # of an operation without sizes: each that was timed, and the product of its sizes
        for key, tuned in (self._file.tiles if self._file else {}).items():
            self._tiles[key] = _made(key.partition(" ")[0], tuned)
            kind, size = _split_timed(key)
            self._sizes.setdefault(kind, {})[key] = size

    @property
    def digest(self) -> str:
        """Changes with what is known."""
        return hashlib.sha256(b"" if self._file is None else msgspec.json.encode(self._file)).hexdigest()

    def tile(self, operation: Any) -> Any:
        """The tile to use for an operation."""
        key = describe(operation)
        found = self._tiles.get(key) or self._similar(key) or self._similar(key, any_types=True)
        return found or default_tile(operation, self.sm)

    def _similar(self, key: str, any_types: bool = False) -> Any:
        """The tile of the timed operation that differs in nothing but sizes of the image or the batch, the nearest in amount of work,
        or None.

        `any_types`: it may also differ in the types of bias, residual and result.
        """
        reduced = _without_types if any_types else str
        kind, size = _split(key)
        nearest, best = None, math.log(_SIMILAR)
        alike = [timed for other, group in self._sizes.items() if reduced(other) == reduced(kind) for timed in group.items()]
        for timed, theirs in alike if size else ():  # nothing is similar to what is empty
            distance = abs(math.log(size / theirs))
            if distance <= best:
                nearest, best = self._tiles[timed], distance
        return nearest


_SIZES = re.compile(
    r"\b(?:m|rows|batch|height|width|h|w|out_height|out_width|tokens|shape[12]?|kv_shift)=(\d+|\([\d, ]*\))|\bn=(\d+)(?= m=)"
)


def _split(key: str) -> tuple[str, int]:
    """An operation without the sizes that an image or batch gives it, and the product of these sizes."""
    numbers = [number for match in _SIZES.finditer(key) for number in re.findall(r"\d+", match[0].partition("=")[2])]
    return _SIZES.sub("", key), math.prod(int(number) for number in numbers)


def _split_timed(key: str) -> tuple[str, int]:
    """`_split` of what a tuning file has. Raises BadInput."""
    try:
        kind, size = _split(key)
        if not 0 < size < _LARGEST:
            raise ValueError("a size of 0, or far too large")
    except ValueError as error:  # Python's own, of numbers of thousands of digits
        raise BadInput(f"the tuning file has an impossible operation, {key[:200]} ({error})", fix="smc tune makes one") from error
    return kind, size


_EPILOGUE_TYPE = re.compile(r"(?<= bias)=\w+|(?<= residual)=\w+| out_dtype=\w+")


def _without_types(kind: str) -> str:
    """An operation without the types of what it reads and writes once: how the work is cut hangs on the operands of its products."""
    return _EPILOGUE_TYPE.sub("", kind)


def tile_fields(tile: Any) -> dict[str, Any]:
    """A tile as a tuning file has it."""
    return {"kind": type(tile).__name__, **dataclasses.asdict(tile)}


def _made(name: str, tuned: Tuned) -> Any:
    fields = dict(tuned.tile)
    try:
        tile: Any = msgspec.convert(fields, tile_type(name, str(fields.pop("kind", "Tile"))))
        for field in dataclasses.fields(tile):
            number = getattr(tile, field.name)
            if type(number) is int and number < 1 and number != field.default:  # by default, 0 stands for none
                raise ValueError(f"{field.name} is {number}")
        return tile
    except (KeyError, ValueError) as error:  # msgspec's are ValueErrors
        raise BadInput(f"the tuning file has no tile of {name} in {tuned.tile} ({error})", fix="smc tune makes one") from error


def shipped_tuning(gpu: str, sm: int) -> Tuning:
    """What the project knows of a GPU: its own file, or one of the same compute capability."""
    files = sorted(SHIPPED.glob("*.json"), key=lambda path: path.stem != gpu)
    for path in files:
        file = read_tuning(path)
        if file.sm == sm:
            return Tuning(sm, file)
    return Tuning(sm)


def read_tuning(path: Path) -> TuningFile:
    """Raises BadInput: it is no tuning file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=TuningFile)
    except (OSError, msgspec.DecodeError, msgspec.ValidationError) as error:
        raise BadInput(f"{path}: no tuning file that can be read ({error})") from error
