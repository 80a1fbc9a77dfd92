"""Writing a bundle so that nobody ever sees half of one.

A build takes the target's lock, writes into a staging directory beside the target, and puts it in place with one rename. The
manifest is written last. Whatever kills a build, the target is absent, or the old bundle, or the new one.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smc.compiler.output_files import writing
from smc.exported.errors import Busy, CannotWrite
from smc.exported.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, FileInfo, Manifest, encode_manifest


def prepare_target(target: Path) -> Path:
    """The absolute target, after checking, before any work, that a bundle can be put there.

    Raises:
        CannotWrite: it cannot.
    """
    with _writing(target):
        # What lies beside the target is named after it, so it must have a name: `..` and `/` have none.
        target = target.absolute() if target.name not in ("", "..") else target.resolve()
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise CannotWrite(f"{target.parent} is read-only", fix="choose another --out, or make it writable")
        # The proof: some file systems let nothing be made in them, whatever their permissions say.
        shutil.rmtree(_make_staging(target), ignore_errors=True)
    return target


def _check_replaceable(target: Path) -> None:
    """Raise CannotWrite unless the target is absent, or an empty directory or a bundle that can be exchanged."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CannotWrite(f"{target} exists and is not a directory", fix="choose another --out")
    if not target.exists():
        return
    if os.path.ismount(target):
        raise CannotWrite(
            f"{target} is a mount point, which cannot be replaced", fix=f"choose a directory in it, such as {target / 'bundle'}"
        )
    if not os.access(target, os.R_OK | os.W_OK | os.X_OK):
        raise CannotWrite(f"{target} is read-only, or cannot be read", fix="choose another --out, or make it writable")
    if any(target.iterdir()) and not _holds_a_bundle(target):
        raise CannotWrite(f"{target} holds files and is no bundle; it is not replaced", fix="choose another --out, or empty it")


def _holds_a_bundle(directory: Path) -> bool:
    """Whether a directory is a bundle, even of another format or damaged. Other programs write a `manifest.json` as well."""
    manifest = directory / MANIFEST_NAME
    if not manifest.is_file():
        return False
    with manifest.open("rb") as stream:
        text = stream.read(MAX_MANIFEST_BYTES)
    return b'"build_key"' in text or b'"digest": "' in text  # one damaged byte does not hide both


@contextmanager
def target_lock(target: Path, wait: bool, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a target; the operating system frees it when the process dies.

    Raises:
        Busy: another build holds it and `wait` is false.
        CannotWrite: the lock file cannot be made.
    """
    lock = FileLock(target.parent / f".{_short(target)}.lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise Busy(f"another build of {target} is running", fix="wait for it, or leave out --no-wait") from None
            on_wait()
            lock.acquire()
    except OSError as error:
        raise CannotWrite(f"{lock.lock_file}: {error.strerror}", fix="choose another --out") from error
    try:
        yield
    finally:
        lock.release()


def sweep_stale(target: Path) -> None:
    """Remove what killed builds of this target left behind. Call it with the target's lock held."""
    with _writing(target):
        for stale in _beside(target, "old"):
            if target.exists():
                shutil.rmtree(stale, ignore_errors=True)
            else:
                os.rename(stale, target)  # killed between the renames of `_replace_in_two_steps`
        for stale in _beside(target, "staging"):
            shutil.rmtree(stale, ignore_errors=True)


def _beside(target: Path, kind: str) -> list[Path]:
    """The directories of a kind that builds of this target made beside it."""
    prefix = f".{_short(target)}.{kind}-"
    found = target.parent.glob(f"{glob.escape(prefix)}*")
    # A dot in the rest means that they are those of another target, whose name begins like these.
    return [path for path in found if "." not in path.name.removeprefix(prefix)]


def _make_staging(target: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f".{_short(target)}.staging-", dir=target.parent))


class Staging:
    """A bundle being written. Use as a context manager; without `commit`, leaving it removes everything."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Staging:
        with _writing(self.target):
            self.path = _make_staging(self.target)
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def writing(self) -> Iterator[Path]:
        """The directory to write files into; operating system errors inside become DiskError."""
        with _writing(self.target):
            yield self.path

    def seal(self) -> dict[str, FileInfo]:
        """Flush every file to disk; returns their sizes and hashes."""
        infos = {}
        with _writing(self.target):
            for file in sorted(self.path.iterdir()):
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                infos[file.name] = FileInfo(size=file.stat().st_size, sha256=sha256)
        return infos

    def commit(self, manifest: Manifest) -> None:
        """Write the manifest and put the bundle in the target's place. If any of it fails, the target is as it was."""
        with _writing(self.target):
            with (self.path / MANIFEST_NAME).open("wb") as stream:
                stream.write(encode_manifest(manifest))
                stream.flush()
                os.fsync(stream.fileno())
            self.path.chmod(0o755)
            _fsync_directory(self.path)
            _check_replaceable(self.target)  # again: the build took minutes
            replaces = self.target.exists()
            if replaces:
                _exchange(self.path, self.target)  # the old bundle is now in the staging place, and goes with it
            else:
                os.rename(self.path, self.target)
            try:
                _fsync_directory(self.target.parent)
            except OSError:
                if replaces:
                    _exchange(self.path, self.target)
                else:
                    os.rename(self.target, self.path)
                raise


def _writing(target: Path) -> AbstractContextManager[None]:
    return writing(target, refused="choose another --out", midway="free disk space; nothing of this build was kept")


def _exchange(one: Path, other: Path) -> None:
    """Swap two directories in one atomic step, where the system can."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is not None:
        if renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # what file systems without exchange answer
            raise OSError(code, os.strerror(code), str(other))
    _replace_in_two_steps(one, other)


def _replace_in_two_steps(staged: Path, target: Path) -> None:
    """For file systems without exchange: the target is absent for a moment; a kill in it is mended by `sweep_stale`."""
    old = target.parent / f".{_short(target)}.old-{staged.name.rpartition('-')[2]}"
    try:
        os.rename(target, old)
        os.rename(staged, target)
        os.rename(old, staged)  # not removed here: what is called old is always whole, and fit to be put back
    except BaseException:  # a signal as well
        if old.exists():
            if target.exists():
                os.rename(target, staged)
            os.rename(old, target)
        raise


def _short(target: Path) -> str:
    """The target's name, cut so that what is added to it stays within a file name's limit of 255 bytes."""
    name = target.name
    if len(os.fsencode(name)) <= 200:
        return name
    return f"{os.fsdecode(os.fsencode(name)[:150])}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def _fsync_directory(path: Path) -> None:
    """Flush a directory, where the system can: some cannot, and a directory may be writable but not readable."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
