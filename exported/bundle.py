"""A bundle on disk, opened and verified. The format is specified in docs/bundle.md."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from smc.exported.errors import BundleDamaged, DiskError, InputMissing, OutOfMemory
from smc.exported.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileInfo, Manifest, decode_manifest
from smc.exported.threads import in_thread

CHUNK = 8 << 20
READERS = 4

T = TypeVar("T")


@dataclass(frozen=True)
class Bundle:
    """A verified bundle.

    Attributes:
        path: the directory.
        manifest: its manifest.
        files: name -> contents, of the files that were asked for. The bytes that were hashed are these very bytes, whatever
            happens to the files afterwards.
    """

    path: Path
    manifest: Manifest
    files: dict[str, memoryview]


def open_bundle(path: str | os.PathLike[str], *, everything: bool = True) -> Bundle:
    """Read a bundle into memory and verify every byte that is read.

    Args:
        path: the bundle's directory.
        everything: also read the files that only verification needs, as far as they are there: a deployment may lack them.

    Raises:
        InputMissing: there is no bundle, or it cannot be read.
        BundleDamaged: it is not what its manifest says.
        BundleMismatch: its format is newer.
        DiskError: a read failed midway.
        OutOfMemory: it does not fit into memory.
    """
    return _read_settled(Path(path), _read_bundle if everything else _read_plan)


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """Read and check a bundle's manifest alone. Raises as `open_bundle`."""
    return _read_settled(Path(path), _read_manifest)


def _read_settled(path: Path, read: Callable[[Path, int], T]) -> T:
    """Read from a bundle that a build may exchange at any time, which then removes the old one.

    All reads go through one directory descriptor, so they see one bundle; if that one is removed halfway, the new one is read.
    """
    while True:
        directory = _open_directory(path)
        try:
            return read(path, directory)
        except (InputMissing, BundleDamaged, DiskError):
            if not _was_replaced(path, directory):
                raise
        finally:
            os.close(directory)


def _open_directory(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError as error:
        raise InputMissing(f"{path}: a bundle is a directory, this is a file") from error
    except OSError as error:
        raise InputMissing(f"{path}: {error.strerror}", fix="build a bundle: smc build --gpu cpu --checkpoint FILE --out DIR") from error
    except ValueError as error:
        raise InputMissing(f"{str(path)!r} cannot be a directory's name: {error}") from error


def _was_replaced(path: Path, directory: int) -> bool:
    try:
        return os.stat(path).st_ino != os.fstat(directory).st_ino
    except OSError:
        return False


def read_files(path: Path, files: Mapping[str, FileInfo]) -> dict[str, memoryview]:
    """Read and verify files of a directory. Raises as `open_bundle`."""
    directory = _open_directory(path)
    try:
        return _read_files(path, directory, files)
    finally:
        os.close(directory)


def _read_bundle(path: Path, directory: int) -> Bundle:
    manifest = _read_manifest(path, directory)
    present = set(os.listdir(directory))
    wanted = {name: info for name, info in manifest.files.items() if name in present or name not in manifest.verify_only}
    return Bundle(path, manifest, _read_files(path, directory, wanted))


def _read_plan(path: Path, directory: int) -> Bundle:
    manifest = _read_manifest(path, directory)
    return Bundle(path, manifest, _read_files(path, directory, manifest.plan_files))


def _read_files(path: Path, directory: int, files: Mapping[str, FileInfo]) -> dict[str, memoryview]:
    """Read files by several threads at once, each taking the next that none has begun."""
    unread = iter(files.items())

    def read() -> dict[str, memoryview]:
        return {name: _read_verified(path, directory, name, info) for name, info in unread}

    readers: list[Future[dict[str, memoryview]]] = []
    try:
        for _ in range(READERS):
            readers.append(in_thread(read))
        wait(readers, return_when=FIRST_EXCEPTION)
    finally:
        deque(unread, maxlen=0)  # after a failure no further file is begun,
        wait(readers)  # and none is being read when the caller closes the directory
    contents: dict[str, memoryview] = {}
    while readers:
        contents |= readers.pop(0).result()  # not kept: its error and this frame would hold one another, and with them what was read
    return contents


def _read_manifest(path: Path, directory: int) -> Manifest:
    descriptor = _open_regular(path, directory, MANIFEST_NAME, missing=InputMissing)
    try:
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except OSError as error:
        raise DiskError(f"{path / MANIFEST_NAME}: {error.strerror}") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleDamaged(f"{path / MANIFEST_NAME}: over {MAX_MANIFEST_BYTES:,} bytes, which no manifest is")
    return decode_manifest(data)


def _open_regular(path: Path, directory: int, name: str, missing: type[InputMissing] | type[BundleDamaged]) -> int:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError as error:
        raise missing(f"{path}: {name} is missing", fix="build the bundle again, or copy it again from where it was built") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise BundleDamaged(f"{path / name} is a symbolic link, which a bundle may not hold") from error
        if error.errno == errno.ENXIO:  # a socket
            raise BundleDamaged(f"{path / name} is not a regular file") from error
        raise InputMissing(f"{path / name}: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BundleDamaged(f"{path / name} is not a regular file")
    return descriptor


def _read_verified(path: Path, directory: int, name: str, info: FileInfo) -> memoryview:
    """Read one file into anonymous memory, hashing as it goes."""
    descriptor = _open_regular(path, directory, name, missing=BundleDamaged)
    try:
        size = os.fstat(descriptor).st_size
        if size != info.size:
            raise _damaged(path, name, f"{info.size:,} bytes expected, {size:,} found")
        if size == 0:
            return memoryview(b"")
        buffer = _allocate(path, size)
        digest = hashlib.sha256()
        position = 0
        while position < size:
            count = os.readv(descriptor, [buffer[position : position + CHUNK]])
            if count == 0:
                raise _damaged(path, name, f"{info.size:,} bytes expected, {position:,} found")
            digest.update(buffer[position : position + count])
            position += count
    except OSError as error:
        raise DiskError(f"{path / name}: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if digest.hexdigest() != info.sha256:
        raise _damaged(path, name, f"its sha256 is {digest.hexdigest()[:16]}..., the manifest says {info.sha256[:16]}...")
    return buffer.toreadonly()


def _allocate(path: Path, size: int) -> memoryview:
    """Page-aligned memory, which inference libraries want of weights that they use in place."""
    try:
        return memoryview(mmap.mmap(-1, size))
    except OSError as error:
        raise OutOfMemory(f"{path}: {size:,} bytes of memory needed, not to be had ({error.strerror})", fix="free memory") from error


def _damaged(path: Path, name: str, what: str) -> BundleDamaged:
    return BundleDamaged(f"{path / name}: {what}", fix="build the bundle again, or copy it again from where it was built")
