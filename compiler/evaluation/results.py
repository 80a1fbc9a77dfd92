"""A file of results: written line by line, continued after an interruption."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec

from smc.compiler.evaluation.records import SCHEMA, Config, Header, PairResult
from smc.compiler.output_files import writing
from smc.exported.errors import BadInput, Busy, CannotWrite, InputMissing, UsageError

Key = tuple[str, str]
"""A pair: the data's kind, the pair's name."""


class ResultFile:
    """An open file of results, locked. `rows`: the lines that it holds."""

    def __init__(self, path: Path, file: FileIO, rows: dict[Key, PairResult]) -> None:
        self.path, self.rows = path, rows
        self._file = file

    def add(self, row: PairResult) -> None:
        """Write a pair's line, so that it outlives the process. Raises CannotWrite, DiskError."""
        with writing(self.path):
            _write_line(self._file, row)
        self.rows[row.kind, row.name] = row


@contextmanager
def open_results(path: Path, header: Header) -> Iterator[ResultFile]:
    """Open a file to add results to: a new one, or one that the same evaluation has begun.

    A line that was cut off as it was written is dropped.

    Raises:
        CannotWrite, DiskError: it cannot be written, or is no regular file.
        Busy: another evaluation writes to it.
        UsageError: it holds the results of another evaluation.
        BadInput: it is not such a file.
    """
    with writing(path):
        path.touch()
        file = path.open("r+b", buffering=0)  # a buffer would write once more when it is closed, and fail there again
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # a device may be read for ever
            raise CannotWrite(f"{path}: not a regular file")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Busy(f"{path}: another evaluation writes to it", fix="wait for it, or write elsewhere") from error
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        rows: dict[Key, PairResult] = {}
        if whole:
            found, rows = _decode(path, whole)
            check_same(path, found.config, header.config)
        elif not msgspec.json.encode(header).startswith(data[:10]):  # nothing, or the beginning of a header
            raise BadInput(f"{path}: not results of smc eval", fix="write elsewhere")
        with writing(path):
            file.seek(len(whole))
            file.truncate()
            if not whole:
                _write_line(file, header)
        yield ResultFile(path, file, rows)


def read_results(path: Path) -> tuple[Header, dict[Key, PairResult]]:
    """A file's header and lines; a last line that was cut off is left out. Raises InputMissing, BadInput."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}") from error
    return _decode(path, data[: data.rfind(b"\n") + 1])


def check_same(path: Path, found: Config, wanted: Config) -> None:
    """Raise UsageError, naming what differs, where a file is of another config."""
    if other := differences(without_origin(found), without_origin(wanted)):
        raise UsageError(f"{path} holds results of another evaluation: {'; '.join(other)}", fix="write to another file, or remove this one")


def without_origin(config: Config) -> Config:
    """What identifies an evaluation: a data set's digest does, its origin is for readers and names the torch that rendered it."""
    return msgspec.structs.replace(config, data=[msgspec.structs.replace(data, origin="") for data in config.data])


def differences(found: Config, wanted: Config) -> list[str]:
    """What differs between two configs, in words."""
    return list(_differences("", msgspec.to_builtins(found), msgspec.to_builtins(wanted)))


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*found, *wanted]):
            yield from _differences(f"{name}.{key}".lstrip("."), found.get(key), wanted.get(key))
    elif isinstance(found, list) and isinstance(wanted, list) and len(found) == len(wanted):
        for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from _differences(f"{name}[{i}]", one, other)
    elif found != wanted:
        yield f"{name} is {msgspec.json.encode(found).decode()} there, {msgspec.json.encode(wanted).decode()} here"


def _decode(path: Path, data: bytes) -> tuple[Header, dict[Key, PairResult]]:
    rows: dict[Key, PairResult] = {}
    try:
        first, *lines = data.splitlines() or [b""]
        schema = msgspec.json.decode(first, type=dict[str, Any]).get("schema")
        if schema != SCHEMA:
            raise msgspec.DecodeError(f"schema {schema}, {SCHEMA} was expected")
        header = msgspec.json.decode(first, type=Header)
        for line in lines:
            row = msgspec.json.decode(line, type=PairResult)
            rows[row.kind, row.name] = row
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        where = f", line {len(rows) + 2}" if rows else ""
        raise BadInput(f"{path}{where}: not results of smc eval ({error})") from error
    return header, rows


def _write_line(file: FileIO, value: Header | PairResult) -> None:
    line = msgspec.json.encode(value) + b"\n"
    while line:  # of what does not fit, a part may be written before the system says so
        line = line[file.write(line) :]
