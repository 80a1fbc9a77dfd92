"""The ONNX Runtime engine: any CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from smc.exported.engines import Files, Maps
from smc.exported.errors import BackendFailed, BundleMismatch, NoTarget, OutOfMemory
from smc.exported.images import as_plan_input

try:
    import onnxruntime
except ImportError as error:
    raise NoTarget(f"the bundle needs onnxruntime, which cannot be imported ({error})", fix="pip install onnxruntime") from error

WEIGHTS_SUFFIX = ".weights"
"""A graph `x.onnx` has its weights in `x.weights`."""


class OnnxRuntimeEngine:
    """Two sessions, encoder and decoder, whose shapes and batch are dynamic."""

    def __init__(self, files: Files, stages: Mapping[str, str], threads: int | None = None, optimize: bool = True) -> None:
        """Load both graphs.

        Args:
            files: contents of the bundle's files; not needed after the constructor.
            stages: the file names of "encoder" and "decoder".
            threads: CPU threads; None for all cores.
            optimize: False runs the graphs node by node as written, the parity oracle.
        """
        self._encoder = _load_session(files, stages["encoder"], threads, optimize)
        self._decoder = _load_session(files, stages["decoder"], threads, optimize)
        (self._image,) = (node.name for node in self._encoder.get_inputs())
        self._features1, self._features2 = (node.name for node in self._decoder.get_inputs())
        self._outputs = [output.name for output in self._decoder.get_outputs()]

    def encode(self, images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
        """images -> features (B, H/16, W/16, C), float32."""
        pixels = as_plan_input(images, np.float32)
        with _translated("encoder"):
            return self._encoder.run(None, {self._image: pixels})[0]

    def decode(self, features1: NDArray[np.float32], features2: NDArray[np.float32]) -> Maps:
        with _translated("decoder"):
            maps = self._decoder.run(self._outputs, {self._features1: features1, self._features2: features2})
        return dict(zip(self._outputs, maps, strict=True))


def _load_session(files: Files, graph_name: str, threads: int | None, optimize: bool) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # The verified bytes themselves: the library opens no file.
    weights_name = graph_name.removesuffix(".onnx") + WEIGHTS_SUFFIX
    if weights_name in files:
        weights = files[weights_name]
        options.add_external_initializers_from_files_in_memory([weights_name], [weights], [len(weights)])
    with _translated(graph_name, needed=sum(map(len, files.values()))):
        return onnxruntime.InferenceSession(bytes(files[graph_name]), options, providers=["CPUExecutionProvider"])


def is_out_of_memory(error: Exception) -> bool:
    """Whether one of ONNX Runtime's exceptions speaks of too little memory."""
    signs = ("bad_alloc", "bad allocation", "Failed to allocate memory")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@contextlib.contextmanager
def _translated(what: str, needed: int = 0) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into this package's."""
    try:
        yield
    except Exception as error:  # the library raises plain RuntimeError and a dozen classes of its own
        text = str(error)
        if is_out_of_memory(error):
            size = f"; its weights alone take {needed:,} bytes" if needed else ""
            raise OutOfMemory(
                f"{what}: not enough memory{size} ({text[:200]})", fix="free memory, or use smaller images or batches"
            ) from error
        if any(sign in text for sign in ("opset", "ir_version", "IR version")):
            raise BundleMismatch(
                f"{what}: ONNX Runtime {onnxruntime.__version__} does not know the plan's operations ({text[:200]})",
                fix="pip install --upgrade onnxruntime",
            ) from error
        raise BackendFailed(f"{what}: ONNX Runtime failed: {text[:500]}") from error
