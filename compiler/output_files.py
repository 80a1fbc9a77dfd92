"""Files that commands write: refused before any work where that can be known, and never left half written."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smc.compiler.bundle_writer import DISK_ERRNOS
from smc.exported.errors import CannotWrite, DiskError, UsageError


def check_output(path: Path | None, option: str, endings: tuple[str, ...]) -> None:
    """Raise UsageError for a file of another ending, CannotWrite for one that could not be written."""
    if path is None:
        return
    if path.suffix.lower() not in endings:
        raise UsageError(f"{option} {path}: a name that ends in {' or '.join(endings)} was expected")
    if not (os.path.isdir(path.parent) and os.access(path.parent, os.W_OK)):
        raise CannotWrite(f"{path}: its folder is missing or read-only")
    if os.path.isdir(path):  # unlike Path.is_dir, false for a name that is too long
        raise CannotWrite(f"{path} is a directory")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system refuses within becomes a CannotWrite that names `path`, or where it failed midway, as on a full disk, a DiskError."""
    try:
        yield
    except OSError as error:
        kind = DiskError if error.errno in DISK_ERRNOS else CannotWrite
        raise kind(f"{path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that becomes it at the end, so that no reader sees half a file. Raises CannotWrite, DiskError."""
    temporary = path.with_name(f".smc-{secrets.token_hex(8)}{path.suffix}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with suppress(OSError):  # it is gone, or was never there
            temporary.unlink()
