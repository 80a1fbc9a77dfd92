"""CommuteUpsample: 1x1 convolutions before enlargements, where they have less to do (part of GraphFusion, Speedy MASt3R, section 3.4.2)."""

from __future__ import annotations

import math

import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import has_input, producer, sole_reader

_SIZES = 3  # the input of Resize that says how large the output is


class CommuteUpsample(Pass):
    """A 1x1 convolution of an enlarged map becomes the enlargement of the convolved map.

    Before: Conv(Resize(x), W, b), linear, W (N, C, 1, 1).
    After: Resize(Conv(x, W, b)).

    Both are linear, one in the channels and the other in the pixels; the weights of an interpolation add up to 1, so that the bias
    stays what it is. Left alone where the map would not get larger, or where something else reads it.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        for conv in [node for node in graph.nodes if node.op == "Conv"]:
            resize = producer(conv.inputs[0])
            if resize is None or resize.op != "Resize" or not _is_pointwise(conv):
                continue
            with report.attempt(conv):
                _check(graph, resize, conv)
                _swap(resize, conv)
                report.rewrites += 1


def _is_pointwise(conv: gs.Node) -> bool:
    size = (conv.inputs[1].shape or [])[2:]  # as the attribute kernel_shape, which is optional
    strides, pads = (conv.attrs.get(name) or [default] for name, default in (("strides", 1), ("pads", 0)))
    return set(size) == set(strides) == {1} and set(pads) == {0}


def _check(graph: gs.Graph, resize: gs.Node, conv: gs.Node) -> None:
    if resize.attrs.get("mode") != "linear" or resize.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise Refusal(f"{label(resize)} is no plain linear interpolation")
    sole_reader(graph, resize.outputs[0])
    if resize.inputs[0].shape[1] != resize.outputs[0].shape[1]:
        raise Refusal(f"{label(resize)} enlarges more than images")
    before, after = (list(tensor.shape[2:]) for tensor in (resize.inputs[0], resize.outputs[0]))
    if all(isinstance(size, int) for size in (*before, *after)) and math.prod(after) <= math.prod(before):
        raise Refusal(f"{label(resize)} does not enlarge its input")
    if has_input(resize, _SIZES) and resize.outputs[0].shape[1] != conv.outputs[0].shape[1]:
        raise Refusal(f"{label(resize)} is given its output's size, whose channels would change")


def _swap(resize: gs.Node, conv: gs.Node) -> None:
    x, between, out = resize.inputs[0], resize.outputs[0], conv.outputs[0]
    conv.inputs[0], resize.inputs[0] = x, between
    conv.outputs, resize.outputs = [between], [out]
    between.shape = [x.shape[0], out.shape[1], *x.shape[2:]]
