"""Machine code of kernels, compiled in parallel and kept between builds under what it depends on."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import multiprocessing
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec

from smc.compiler.output_files import replacing
from smc.exported.errors import BackendFailed, CannotWrite, DiskError
from smc.plugins.compile import Compiled, compile_kernel, compiler_version, fingerprint, is_gluon
from smc.plugins.launch import Kernel

_PARALLEL = 8  # kernels below which starting workers costs more than it saves
_SUFFIX = ".kernel"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_DIGEST_SIZE = hashlib.sha256().digest_size


class KernelCache:
    """A directory of compiled kernels, or none.

    An entry is the SHA-256 digest of the rest and, as MessagePack, what was compiled. One that is damaged counts as absent. Where none
    can be written, a warning says so, once, and what was compiled is only returned.
    """

    def __init__(self, directory: Path | None, library: Path | None = None) -> None:
        """
        Args:
            directory: what is compiled is kept here.
            library: another such directory, perhaps of another machine, which is asked first, whatever version of Triton filled it. Where
                several did, the code of this machine's version is taken, or else of the first by name.
        """
        self._directory, self._library = directory, library
        self._writable = True

    def try_all(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
        """Machine code of each kernel for compute capability `sm` (90 is 9.0), in order; in the place of what does not compile, why.

        Raises:
            BackendFailed: a process that compiled them did not live to the end.
        """
        found = [self._read(kernel, sm) for kernel in kernels]
        missing = [kernel for kernel, compiled in zip(kernels, found, strict=True) if compiled is None]
        made = iter(self._compile(missing, sm))
        return [compiled or next(made) for compiled in found]

    def _compile(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
        if len(kernels) < _PARALLEL and not any(is_gluon(kernel) for kernel in kernels):
            return [self._kept(kernel, sm, _try(kernel, sm)) for kernel in kernels]
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as torch's, may hang
        cores = len(os.sched_getaffinity(0))
        try:
            with (
                tempfile.TemporaryDirectory(prefix="speedy-mast3r-", ignore_cleanup_errors=True) as scratch,
                ProcessPoolExecutor(cores, context, initializer=_prepare_worker, initargs=(scratch, os.getpid())) as workers,
                _killed_on_the_way_out(workers),
            ):
                made = [workers.submit(_try, kernel, sm) for kernel in kernels]
                return [self._kept(kernel, sm, future.result()) for kernel, future in zip(kernels, made, strict=True)]
        except BrokenProcessPool as error:
            raise BackendFailed(
                f"one of the processes that compile kernels, up to {cores} at once, crashed or was killed, perhaps for want of memory",
                fix="free memory, or give the command fewer cores, which makes fewer processes: taskset --cpu-list 0 smc ...",
            ) from error

    def _kept(self, kernel: Kernel, sm: int, compiled: Compiled | ValueError) -> Compiled | ValueError:
        if isinstance(compiled, Compiled):
            self._write(kernel, sm, compiled)
        return compiled

    def _read(self, kernel: Kernel, sm: int) -> Compiled | None:
        key = fingerprint(kernel, sm)
        name = _name(key)
        theirs = self._library.glob(f"{key}.*{_SUFFIX}") if self._library else ()
        paths = sorted(theirs, key=lambda path: (path.name != name, path.name))
        if self._directory:
            paths.append(self._directory / name)
        for path in paths:
            with contextlib.suppress(OSError, msgspec.DecodeError):  # what cannot be read is compiled again
                entry = path.read_bytes()
                digest, code = entry[:_DIGEST_SIZE], entry[_DIGEST_SIZE:]
                if hashlib.sha256(code).digest() == digest:
                    return msgspec.msgpack.decode(code, type=Compiled)
        return None

    def _write(self, kernel: Kernel, sm: int, compiled: Compiled) -> None:
        if self._directory is None or not self._writable:
            return
        code = msgspec.msgpack.encode(compiled)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with replacing(self._directory / _name(fingerprint(kernel, sm))) as staged:
                staged.write_bytes(hashlib.sha256(code).digest() + code)
        except (OSError, CannotWrite, DiskError) as error:
            self._writable = False
            warnings.warn(f"compiled kernels cannot be kept, so that the next build compiles them again: {error}", stacklevel=2)


@contextlib.contextmanager
def _killed_on_the_way_out(workers: ProcessPoolExecutor) -> Iterator[None]:
    """End the workers at once where an exception, or a signal, ends the wait for them; leaving the pool waits for all that they do."""
    try:
        yield
    except BaseException:
        for process in list(workers._processes.values()):  # Python 3.14 has `kill_workers` for it
            process.kill()
        raise


def _prepare_worker(scratch: str, parent: int) -> None:
    """Keep a worker's temporary files where they are removed even if it is killed, and have it leave without tidying up: Triton's Gluon
    would complain on stderr of objects that it has itself forgotten. Ctrl-C, which reaches all processes, is the parent's to answer. A
    worker whose parent is killed would wait for work for ever: Linux ends it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was killed before
        os._exit(1)
    tempfile.tempdir = scratch
    atexit.register(os._exit, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _try(kernel: Kernel, sm: int) -> Compiled | ValueError:
    try:
        return compile_kernel(kernel, sm)
    except ValueError as error:
        return error


def _name(key: str) -> str:
    return f"{key}.{compiler_version()}{_SUFFIX}"
