"""The two TensorRT libraries, which share one Python interface: their names, and their logs."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

from smc.exported.errors import NoTarget


@dataclass(frozen=True)
class Library:
    """A library.

    Attributes:
        name: the backend's name.
        title: what messages call it.
        module: the Python module.
        package: what pip installs.
    """

    name: str
    title: str
    module: str
    package: str

    def load(self) -> Any:
        """The Python module. Raises NoTarget where it is not installed, or not whole."""
        try:
            return importlib.import_module(self.module)
        except (ImportError, OSError) as error:  # OSError: a shared library that does not load
            raise NoTarget(f"{self.title} cannot be imported ({error})", fix=f"pip install {self.package}") from error


TENSORRT = Library("tensorrt", "TensorRT", "tensorrt", "tensorrt")
TENSORRT_RTX = Library("tensorrt-rtx", "TensorRT-RTX", "tensorrt_rtx", "tensorrt-rtx-cu13")

LIBRARIES = {library.name: library for library in (TENSORRT, TENSORRT_RTX)}


def make_log(trt: Any, verbose: bool = False) -> Any:
    """A logger for TensorRT that keeps errors in its list `errors`; `verbose` also prints everything to stderr."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base comes with the library
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)
            if verbose:
                print(f"{severity.name}: {message}", file=sys.stderr)

    return Log()


def is_out_of_memory(message: str) -> bool:
    """Whether one of TensorRT's error messages speaks of too little memory."""
    text = message.lower()
    return any(sign in text for sign in ("out of memory", "outofmemory", "memoryallocation", "bad_alloc"))
