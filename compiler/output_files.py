"""Files that commands write: refused before any work where that can be known, and never left half written."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from smc.exported.errors import CannotWrite, DiskError, UsageError

_DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


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
def writing(path: Path, *, refused: str = "", midway: str = "free disk space") -> Iterator[None]:
    """What the system refuses within becomes a CannotWrite that names `path`, or where it failed midway, as on a full disk, a DiskError.

    Args:
        refused, midway: the advice that goes with either.
    """
    try:
        yield
    except OSError as error:
        # Without a number it comes from a library whose write fell short: numpy's, of a full disk.
        failed_midway = error.errno is None or error.errno in _DISK_ERRNOS
        kind, fix = (DiskError, midway) if failed_midway else (CannotWrite, refused)
        raise kind(f"writing {path}: {error.strerror or error}", fix=fix) from error


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
