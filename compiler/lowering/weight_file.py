"""The weights of all programs of a plan, each once."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from smc.compiler.launch_program import ALIGNMENT
from smc.compiler.lowering.views import Buffer

_POINTERS = 16  # bytes that pointers and tensor maps are aligned to


class WeightFile:
    """`weights.bin` while it is written. Equal weights are stored once, also where one program stacks what another one reads apart.

    A context manager; the file is whole when it is left.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = path.open("wb")
        self._offsets: dict[bytes, int] = {}
        self.size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def add(self, buffer: Buffer) -> int:
        """Where a constant buffer's values are, in bytes; they are written if they are new. Raises OSError."""
        assert buffer.values is not None
        values = np.ascontiguousarray(buffer.values)
        key = _key(values)
        if key not in self._offsets:
            self._write(values, key)
        return self._offsets[key]

    def _write(self, values: NDArray[Any], key: bytes) -> None:
        self._file.write(bytes(-self.size % ALIGNMENT))
        self.size += -self.size % ALIGNMENT
        self._offsets[key] = self.size
        self._file.write(_bytes(values))
        if values.ndim > 1 and 1 < len(values) <= 2 and values[0].nbytes % _POINTERS == 0:
            for i, part in enumerate(values):
                self._offsets.setdefault(_key(part), self.size + i * part.nbytes)
        self.size += values.nbytes


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data  # as they are: a buffer of bfloat16 is not to be had


def _key(values: NDArray[Any]) -> bytes:
    """The same for the same bytes, whatever shape they are seen in."""
    digest = hashlib.sha1(_bytes(values), usedforsecurity=False)
    digest.update(str(values.dtype).encode())
    return digest.digest()
