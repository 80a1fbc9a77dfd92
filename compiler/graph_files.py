"""Graphs in and out of the passes: exported models, ONNX files of any origin, the graphs in a bundle, and dumps of passes.

A file `x.onnx` of ours keeps its weights beside it in `x.weights`, as ONNX external data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper

from smc.compiler.output_files import writing
from smc.exported.engines.onnxruntime import WEIGHTS_SUFFIX
from smc.exported.errors import BadInput, BundleDamaged, InputMissing
from smc.passes.base import GraphRefused
from smc.passes.prepare import prepare

_SMALL = 1024  # bytes; smaller weights stay in the graph's own file


def import_graph(model: ir.Model, name: str) -> gs.Graph:
    """The graph that passes work on. Its weights are the model's own memory: leave the model as it is meanwhile.

    Args:
        model: what an exporter made.
        name: what messages call it, and the graph's name.

    Raises:
        BadInput: the passes cannot work on this model.
    """
    light = model.clone()
    weights: dict[str, NDArray[np.generic]] = {}
    for weight, value in list(light.graph.initializers.items()):
        assert value.const_value is not None
        values = value.const_value.numpy()
        value.const_value = ir.tensor(values, name=weight)  # wherever it was
        if values.nbytes > _SMALL:
            weights[weight] = values
            del light.graph.initializers[weight]
            value.const_value = None
            light.graph.inputs.append(value)
    try:
        graph = prepare(ir.to_proto(light), weights)
    except GraphRefused as error:
        raise BadInput(f"{name}: {error}") from error
    graph.name = name
    return graph


def read_onnx(path: Path) -> ir.Model:
    """Read somebody's ONNX file. Its initializers' external data must lie in the file's own folder or below; other tensors have none.

    Raises:
        InputMissing: a file is absent or unreadable.
        BadInput: it is not a whole ONNX model, its weights lie elsewhere, or data of nodes lie in other files.
    """
    try:
        proto = onnx.load(path, load_external_data=False)
        for part in (*proto.graph.node, *proto.functions):
            if _refers_to_files(part):
                # Whatever comes to read them would look in the working directory, and take what is there.
                raise BadInput(
                    f"{path}: values in {part.name or part.op_type} lie in another file, which those of the graph's initializers alone may",
                    fix="load it with onnx.load, and save it with onnx.save_model: that leaves them inside",
                )
        model = ir.from_proto(proto)
        # With a relative path onnx_ir would take the folder for unknown, and check no weights' place against it.
        ir.external_data.set_base_dir(model.graph, path.absolute().parent)
        if not len(model.graph):
            raise BadInput(f"{path}: it holds no operations")
        for value in model.graph.initializers.values():
            if value.const_value is None:
                raise BadInput(f"{path}: the initializer {value.name} has no value")
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value.numpy()  # maps the file, and checks where it is
    except OSError as error:
        raise InputMissing(f"{error.filename or path}: {error.strerror or error}") from error
    except BadInput:
        raise
    except Exception as error:  # protobuf's and onnx_ir's, of many kinds
        raise BadInput(
            f"{path}: not an ONNX model that can be used ({type(error).__name__}: {str(error)[:300]})",
            fix="copy the file and its weights into one folder, without links (cp -L)" if "outside the base" in str(error) else "",
        ) from error
    return model


def _refers_to_files(message: Any) -> bool:
    """Whether any tensor in a protobuf message, however deep, has its values in another file."""
    if isinstance(message, TensorProto):
        return message.data_location == TensorProto.EXTERNAL
    fields = [value for field, value in message.ListFields() if field.message_type is not None]
    return any(_refers_to_files(part) for value in fields for part in ([value] if hasattr(value, "ListFields") else value))


def write_graph(graph: gs.Graph, directory: Path, name: str) -> None:
    """Write `name`.onnx and `name`.weights into a directory. Raises OSError."""
    model = ir.from_proto(gs.export_onnx(graph, do_type_check=False))
    ir.save(model, directory / f"{name}.onnx", external_data=f"{name}{WEIGHTS_SUFFIX}", size_threshold_bytes=_SMALL)


def read_graph(files: Mapping[str, memoryview], name: str) -> gs.Graph:
    """A graph that `write_graph` wrote, from the verified contents of a bundle's files; its weights are those very bytes.

    Raises BundleDamaged where it is none.
    """
    try:
        return _read_graph(files, name)
    except Exception as error:  # protobuf's, NumPy's, onnx's: the bytes are whole, but not what a build writes
        raise BundleDamaged(f"{name}.onnx: not a graph that a build wrote ({type(error).__name__}: {str(error)[:200]})") from error


def _read_graph(files: Mapping[str, memoryview], name: str) -> gs.Graph:
    model = onnx.load_model_from_string(bytes(files[f"{name}.onnx"]))
    weights: dict[str, NDArray[np.generic]] = {}
    inline = []
    for tensor in model.graph.initializer:
        if not external_data_helper.uses_external_data(tensor):
            inline.append(tensor)
            continue
        info = external_data_helper.ExternalDataInfo(tensor)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        data = files[info.location][info.offset or 0 :]
        weights[tensor.name] = np.frombuffer(data, dtype, count=int(np.prod(tensor.dims))).reshape(tensor.dims)
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    del model.graph.initializer[:]
    model.graph.initializer.extend(inline)
    return prepare(model, weights)


def parameter_count(model: ir.Model) -> int:
    """Number of floating-point weights."""
    values = [value.const_value for value in model.graph.initializers.values()]
    return sum(value.size for value in values if value is not None and value.dtype.is_floating_point())


class GraphDumper:
    """Writes a graph after every pass, numbered, for `--dump-graphs`: `encoder-03-FoldConstants.onnx`.

    The files of all passes share their weights, each a file named after its contents under `weights/`, since most passes
    change few of them.
    """

    def __init__(self, directory: Path) -> None:
        """Make the directory. Raises CannotWrite, DiskError."""
        self._directory = directory
        with writing(directory, refused="choose another --dump-graphs"):
            (directory / "weights").mkdir(parents=True, exist_ok=True)

    def dump(self, stage: str, number: int, name: str, graph: gs.Graph) -> None:
        """Write one graph. Raises CannotWrite, DiskError."""
        model = gs.export_onnx(graph, do_type_check=False)
        with writing(self._directory, refused="choose another --dump-graphs"):
            for tensor in model.graph.initializer:
                if len(tensor.raw_data) > _SMALL:
                    self._move_out(tensor)
            onnx.save_model(model, self._directory / f"{stage}-{number:02}-{name}.onnx")

    def _move_out(self, tensor: TensorProto) -> None:
        location = f"weights/{hashlib.sha256(tensor.raw_data).hexdigest()[:32]}"
        file = self._directory / location
        if not file.exists():
            # Under another name until it is whole: the name says that the contents are.
            partial = file.with_suffix(".partial")
            partial.write_bytes(tensor.raw_data)
            partial.replace(file)
        external_data_helper.set_external_data(tensor, location, offset=0, length=len(tensor.raw_data))
        tensor.ClearField("raw_data")
