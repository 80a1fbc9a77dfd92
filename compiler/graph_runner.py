"""Runs the graphs that passes work on in ONNX Runtime on the CPU, in float32 or as a low precision would compute."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from smc.exported.engines.onnxruntime import is_out_of_memory
from smc.exported.errors import BackendFailed, OutOfMemory
from smc.passes.tensors import Editor, is_output, producer, redirect

_LARGE = 1024
"""Bytes from which a constant is handed over beside the model; shape inference needs the values of smaller ones."""

_LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_TYPED_BY_ATTRIBUTE = frozenset({"Cast", "Constant", "ConstantOfShape"})
_EXACT = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Max", "Min", "Neg", "Relu", "Reshape", "Slice"}
    | {"Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"}
)
"""Operations whose results are values, or negated values, of operands: rounded operands give rounded results."""


class GraphRunner:
    """A session over a graph of any size: weights do not go through a serialised model, which ends at 2 GiB.

    A typed graph is run as `emulated` has it.
    """

    def __init__(self, graph: gs.Graph, *, optimize: bool = False, threads: int | None = None) -> None:
        """Load `graph`, which stays as it is.

        Args:
            graph: what to run; its weights are copied once, into the session.
            optimize: let ONNX Runtime rewrite the graph; otherwise it runs node by node as written.
            threads: CPU threads; None for all cores.

        Raises:
            BackendFailed: ONNX Runtime does not take the graph.
            OutOfMemory: the weights do not fit into memory.
        """
        self._name = graph.name or "graph"
        self.inputs = [tensor.name for tensor in graph.inputs]
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # the exception says it all
        if threads is not None:
            options.intra_op_num_threads = threads
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            # Packing would copy every weight once more.
            options.add_session_config_entry("session.disable_prepacking", "1")
        with _translated(self._name):
            model, weights = _without_weights(emulated(graph))
            if weights:
                options.add_external_initializers(list(weights), list(weights.values()))
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        """Outputs of the graph by name: those asked for, or all. Raises BackendFailed or OutOfMemory."""
        names = [output.name for output in self._session.get_outputs()] if outputs is None else list(outputs)
        with _translated(self._name):
            return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))


def emulated(graph: gs.Graph) -> gs.Graph:
    """A float32 copy of a typed graph in which float16 and bfloat16 tensors are rounded to their type after every operation.

    ONNX Runtime's CPU provider computes few operations in float16 and hardly any in bfloat16. A GPU multiplies in these types,
    sums up in float32 and rounds the result; so does this copy, and what overflows float16 becomes infinite in it. Within an
    operation nothing is rounded: the scores and the weights of an Attention stay float32.

    Constants keep their type and are widened when read. Inputs and outputs of the graph keep names and types.
    """
    graph = graph.copy()
    typed = [(tensor, low) for tensor in graph.tensors().values() if (low := low_precision(tensor)) is not None]
    if not typed:
        return graph
    edit = Editor(graph)
    for tensor, low in typed:
        node = producer(tensor)
        if node is not None and node.op in _EXACT and not is_output(graph, tensor):
            tensor.dtype = np.dtype(np.float32)
            continue
        widened = gs.Variable(edit.fresh(f"{tensor.name}/widened"), dtype=np.dtype(np.float32), shape=tensor.shape)
        redirect(tensor, widened)
        if node is not None and node.op not in _TYPED_BY_ATTRIBUTE:
            exact = gs.Variable(edit.fresh(f"{tensor.name}/exact"), dtype=np.dtype(np.float32), shape=tensor.shape)
            node.outputs[next(i for i, made in enumerate(node.outputs) if made is tensor)] = exact
            edit.node("Cast", [exact], name=f"{tensor.name}/round", output=tensor, to=low)
        if widened.outputs:
            edit.node("Cast", [tensor], name=f"{tensor.name}/widen", output=widened, to=TensorProto.FLOAT)
    return graph.toposort()


def low_precision(tensor: gs.Tensor) -> int | None:
    """The ONNX code of a float16 or bfloat16 tensor's type; None for any other tensor."""
    if tensor.is_empty() or tensor.dtype is None:
        return None
    # graphsurgeon gives bfloat16, which NumPy lacks, as its ONNX code.
    code = tensor.dtype if isinstance(tensor.dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    return code if code in _LOW else None


def constant_array(constant: gs.Constant) -> NDArray[Any]:
    """A constant's values. `Constant.values` would keep a second copy of them in the graph."""
    values = constant._values
    return numpy_helper.to_array(values.tensor) if isinstance(values, LazyValues) else values


def _without_weights(graph: gs.Graph) -> tuple[onnx.ModelProto, dict[str, onnxruntime.OrtValue]]:
    """The model of `graph`, its large constants declared as external data, and their values. Empties the graph's constants."""
    weights, declared = {}, {}
    for name, tensor in graph.tensors().items():
        if not isinstance(tensor, gs.Constant) or tensor._values.nbytes <= _LARGE:
            continue
        values = np.ascontiguousarray(constant_array(tensor))
        code = helper.np_dtype_to_tensor_dtype(values.dtype)
        weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, code)
        declared[name] = TensorProto(name=name, data_type=code, dims=values.shape, data_location=TensorProto.EXTERNAL)
        declared[name].external_data.add(key="location", value="in memory")
        tensor.values = np.empty(0, dtype=values.dtype)
    model = gs.export_onnx(graph)
    for initializer in model.graph.initializer:
        if initializer.name in declared:
            initializer.CopyFrom(declared[initializer.name])
    return model, weights


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into this package's."""
    try:
        yield
    except Exception as error:  # the library raises plain RuntimeError and a dozen classes of its own
        text = str(error)
        if is_out_of_memory(error):
            raise OutOfMemory(f"{what}: not enough memory ({text[:200]})", fix="free memory, or use smaller images") from error
        raise BackendFailed(f"{what}: ONNX Runtime failed: {text[:500]}") from error
