"""Model -> the graph that passes work on: opset 23 or newer, functions inlined, shapes inferred as far as they can be."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, inliner, numpy_helper, shape_inference, version_converter
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER

from smc.passes.base import GraphRefused
from smc.passes.tensors import OPSET, Array, Dim, constant_value, dims, is_made_up, is_number_type, is_output, redirect

OLDEST_OPSET = 17
_LARGE = 1024  # bytes; shape arithmetic, whose values inference needs, stays far below

_ONNX_ERRORS = (onnx.checker.ValidationError, shape_inference.InferenceError, version_converter.ConvertError)

# It warns of every bfloat16 constant, on standard output; the passes handle those.
G_LOGGER.severity = G_LOGGER.ERROR


def prepare(model: onnx.ModelProto, weights: Mapping[str, Array] | None = None) -> gs.Graph:
    """Import a model of opset 17 or newer, whose weights are loaded, raising its opset to 23 where it is older.

    The graph's weights are the model's own, not copies: leave the model as it is while the graph is in use.

    Args:
        model: the model.
        weights: values of those of its inputs that stand for weights, for a model of more than a protobuf's 2 GiB.

    Raises:
        GraphRefused: the model cannot be worked on, and why.
    """
    opset = next((imported.version for imported in model.opset_import if imported.domain in ("", "ai.onnx")), None)
    if opset is None or opset < OLDEST_OPSET:
        found = "no opset" if opset is None else f"opset {opset}"
        raise GraphRefused(f"the graph has {found} of the standard operations; {OLDEST_OPSET} or newer is needed: export it again")
    for weight in model.graph.initializer:
        if weight.data_location == onnx.TensorProto.EXTERNAL:
            raise GraphRefused(f"the values of {weight.name} are in another file and were not loaded")
    light = _without_weights(model)
    with _refused("the graph's functions could not be inlined"):
        if light.functions:
            light = inliner.inline_local_functions(light)
    with _refused(f"the graph of opset {opset} could not be raised to opset {OPSET}"):
        if opset < OPSET:
            light = _raised(light)
    with _refused("the shapes of the graph's tensors could not be inferred"):
        graph = _infer_shapes(light)
    values: dict[str, Any] = {weight.name: LazyValues(weight) for weight in model.graph.initializer if _is_large(weight)}
    values |= weights or {}
    for tensor in graph.inputs:
        if tensor.name in values:
            tensor.to_constant(values[tensor.name])
    graph.inputs = [tensor for tensor in graph.inputs if isinstance(tensor, gs.Variable)]
    # Nodes that nothing reads would count as readers.
    return graph.cleanup(remove_unused_graph_inputs=False).toposort()


@contextlib.contextmanager
def _refused(what: str) -> Iterator[None]:
    """Turn what onnx makes of a graph that it cannot work on into GraphRefused."""
    try:
        yield
    except (RuntimeError, ValueError, *_ONNX_ERRORS) as error:  # RuntimeError: what else onnx's C++ raises
        raise GraphRefused(f"{what}: {error}") from error


def infer_shapes(graph: gs.Graph) -> None:
    """Infer the shapes of a prepared graph again, in place, from those of its inputs and those that tensors state."""
    light = graph.copy()
    for tensor in light.tensors().values():
        if isinstance(tensor, gs.Constant) and math.prod(tensor.shape) > _LARGE // 8:
            stand_in = gs.Variable(tensor.name, tensor.dtype, tensor.shape)
            redirect(tensor, stand_in)
            light.inputs.append(stand_in)
    found = _infer_shapes(gs.export_onnx(light)).tensors()
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in found and found[name].shape is not None:
            tensor.shape = list(found[name].shape)


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at OPSET, with the shapes that it states."""
    raised = version_converter.convert_version(model, OPSET)
    # The converter adds shapes of its own, whose made-up names of dimensions would hide what propagating the data finds.
    for stated, kept in ((raised.graph.value_info, model.graph.value_info), (raised.graph.output, model.graph.output)):
        del stated[:]
        stated.extend(kept)
    return raised


def _infer_shapes(model: onnx.ModelProto) -> gs.Graph:
    """Import the model with all shapes that can be known. Changes `model`: constant shape arithmetic is folded.

    onnx's inference follows little arithmetic. What it makes known lets more be folded, and the other way round, until neither
    finds more: older exporters slice shapes by computed constants, and without this not even ranks would be known.
    """
    solved: set[str] = set()
    while True:
        graph = gs.import_onnx(shape_inference.infer_shapes(model, data_prop=True))
        values = _constant_integers(graph)
        shapes = {name: value for name, value in _reshapes(graph).items() if name not in solved}
        if not values and not shapes:
            return graph
        solved |= set(shapes)
        kept = [node for node in model.graph.node if not set(node.output) & set(values)]
        stated = [value for value in model.graph.value_info if value.name not in values.keys() | shapes.keys()]
        del model.graph.node[:], model.graph.value_info[:]
        model.graph.node.extend(kept)
        model.graph.value_info.extend([*stated, *shapes.values()])
        model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in values.items())


def _reshapes(graph: gs.Graph) -> dict[str, onnx.ValueInfoProto]:
    """Shapes of the results of Reshapes whose one unknown dimension follows from the others.

    onnx leaves it open in (batch, n, 576) -> (batch, n, 3, 3, -1), where it is 64, and in (batch, 16, 576) -> (-1, 16, 9, 64).
    """
    found = {}
    for node in graph.nodes:
        tensor = node.outputs[0]
        before, after = dims(node.inputs[0]) if node.op == "Reshape" else None, dims(tensor)
        if before is None or after is None or None in before or tensor.dtype is None:
            continue
        gone, new = (_dynamic(Counter(a) - Counter(b)) for a, b in ((before, after), (after, before)))
        elements, others = _static_size(before), _static_size(after)
        if len(new) != 1 or not is_made_up(new[0]) or after.count(new[0]) != 1 or others == 0:
            continue
        if not gone and elements % others == 0:
            after[after.index(new[0])] = elements // others
        elif len(gone) == 1 and not is_made_up(gone[0]) and elements == others:
            after[after.index(new[0])] = gone[0]
        else:
            continue
        dtype = tensor.dtype if isinstance(tensor.dtype, int) else helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
        # Made-up names mean nothing in the next round; left out, they are inferred again.
        stated = [None if is_made_up(size) else size for size in after]
        found[tensor.name] = helper.make_tensor_value_info(tensor.name, dtype, stated)
    return found


def _dynamic(sizes: Counter[Dim]) -> list[Dim]:
    return [size for size in sizes.elements() if not isinstance(size, int)]


def _static_size(shape: list[Dim]) -> int:
    return math.prod(size for size in shape if isinstance(size, int))


def _constant_integers(graph: gs.Graph) -> dict[str, Array]:
    """Values of the small integer and boolean tensors that nodes compute from constants."""
    values = {}
    for node in graph.nodes:
        if node.op == "Constant" or len(node.outputs) != 1:
            continue
        (tensor,) = node.outputs
        if not is_number_type(tensor.dtype) or np.dtype(tensor.dtype).kind not in "ib" or is_output(graph, tensor):
            continue
        shape = dims(tensor)
        if shape is None or math.prod(size if isinstance(size, int) else _LARGE for size in shape) > _LARGE // 8:
            continue
        value = constant_value(tensor)
        if value is not None:
            values[tensor.name] = value
    return values


def _is_large(weight: onnx.TensorProto) -> bool:
    return weight.ByteSize() > _LARGE


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the model in which large initializers are inputs.

    onnx's converter and shape inference serialise a model, which protobuf does not do from 2 GiB on.
    """
    source = model.graph
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = source.name
    light.graph.node.extend(source.node)
    light.graph.input.extend(source.input)
    light.graph.output.extend(source.output)
    light.graph.value_info.extend(source.value_info)
    light.graph.sparse_initializer.extend(source.sparse_initializer)
    for weight in source.initializer:
        if _is_large(weight):
            light.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
        else:
            light.graph.initializer.append(weight)
    return light
