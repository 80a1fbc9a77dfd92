"""Machine code of kernels, compiled in parallel and kept between builds under what it depends on."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec

from smc.plugins.compile import Compiled, compile_kernel, compiler_version, fingerprint, is_gluon
from smc.plugins.launch import Kernel

_PARALLEL = 8  # kernels below which starting workers costs more than it saves
_SUFFIX = ".kernel"


class KernelCache:
    """A directory of compiled kernels, or none. Entries are whole or absent: they are renamed into place."""

    def __init__(self, directory: Path | None, library: Path | None = None) -> None:
        """
        Args:
            directory: what is compiled is kept here.
            library: another such directory, perhaps of another machine, which is asked first, whatever version of Triton filled it.
        """
        self._directory, self._library = directory, library

    def compile_all(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled]:
        """Machine code of each kernel for compute capability `sm` (90 is 9.0), in order.

        Raises:
            ValueError: one does not compile.
        """
        made = self.try_all(kernels, sm)
        for compiled in made:
            if isinstance(compiled, ValueError):
                raise compiled
        return [compiled for compiled in made if isinstance(compiled, Compiled)]

    def try_all(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
        """As `compile_all`, with the error in the place of what does not compile."""
        found = [self._read(kernel, sm) for kernel in kernels]
        missing = [kernel for kernel, compiled in zip(kernels, found, strict=True) if compiled is None]
        made = iter(self._compile(missing, sm))
        return [compiled or next(made) for compiled in found]

    def _compile(self, kernels: Sequence[Kernel], sm: int) -> list[Compiled | ValueError]:
        if len(kernels) < _PARALLEL and not any(is_gluon(kernel) for kernel in kernels):
            return [self._kept(kernel, sm, _try(kernel, sm)) for kernel in kernels]
        # Fresh processes: a fork of one with threads, as torch's, may hang. They leave without tidying up, for Triton's Gluon then
        # complains on stderr of objects that it has itself forgotten.
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), context, initializer=atexit.register, initargs=(os._exit, 0)) as workers:
            made = workers.map(_try, kernels, [sm] * len(kernels), chunksize=4)
            return [self._kept(kernel, sm, compiled) for kernel, compiled in zip(kernels, made, strict=True)]

    def _kept(self, kernel: Kernel, sm: int, compiled: Compiled | ValueError) -> Compiled | ValueError:
        if isinstance(compiled, Compiled):
            self._write(kernel, sm, compiled)
        return compiled

    def _read(self, kernel: Kernel, sm: int) -> Compiled | None:
        key = fingerprint(kernel, sm)
        paths = list(self._library.glob(f"{key}.*{_SUFFIX}")) if self._library else []
        if self._directory:
            paths.append(self._directory / _name(key))
        for path in paths:
            try:
                return msgspec.msgpack.decode(path.read_bytes(), type=Compiled)
            except (OSError, msgspec.DecodeError, msgspec.ValidationError):
                continue  # what cannot be read is compiled again
        return None

    def _write(self, kernel: Kernel, sm: int, compiled: Compiled) -> None:
        if self._directory is None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        path = self._directory / _name(fingerprint(kernel, sm))
        handle, staged = tempfile.mkstemp(dir=self._directory)
        with os.fdopen(handle, "wb") as file:
            file.write(msgspec.msgpack.encode(compiled))
        os.replace(staged, path)


def _try(kernel: Kernel, sm: int) -> Compiled | ValueError:
    try:
        return compile_kernel(kernel, sm)
    except ValueError as error:
        return error


def _name(key: str) -> str:
    return f"{key}.{compiler_version()}{_SUFFIX}"
