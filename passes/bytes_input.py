"""BytesInput: the encoder takes 8-bit pixels as they come from an image file."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from smc.passes.base import Pass, PassReport, Refusal, label
from smc.passes.tensors import Editor, dims, redirect

_MIDDLE = 127.5
_HALF_RANGE = 128.0
"""A power of two, so that scaling by it is exact; what it leaves of the 127.5 goes into the weights."""


class BytesInput(Pass):
    """The float32 image (B, 3, H, W) in [-1, 1] becomes uint8 (B, H, W, 3), of the same name.

    Before: Conv(image, W, b), image = pixels / 127.5 - 1 transposed, the Conv being a patch embedding: stride = kernel, no padding.
    After: Conv(Transpose((Cast(image) - 127.5) / 128), 128/127.5 W, b).

    This changes the graph's signature, not what it computes of an image. The pixels are centred before the product instead of in
    its bias, because HybridCast makes the product float16: centred and scaled by a power of two they are exact there and in
    bfloat16. On photographs the product is then off by 3.6e-4 (bfloat16: 2.9e-3); with the normalisation in weights and bias alone
    by 7.3e-4 (5.9e-3), since large sums cancel, and more where weights over 127.5 are float16 subnormals. Cast comes first:
    TensorRT takes 8-bit inputs nowhere else.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        for image in [tensor for tensor in graph.inputs if len(tensor.shape) == 4 and tensor.dtype == np.float32]:
            embeddings = [node for node in image.outputs if node.op != "Shape"]
            if not embeddings:
                continue
            with report.attempt(embeddings[0]):
                _check_embedding(image, embeddings)
                _take_bytes(graph, image, embeddings[0])
                report.rewrites += 1


def _check_embedding(image: gs.Tensor, readers: list[gs.Node]) -> None:
    conv = readers[0]
    if len(readers) > 1 or conv.op != "Conv" or conv.inputs[0] is not image:
        raise Refusal(f"{image.name} is read by {', '.join(f'{label(node)} ({node.op})' for node in readers)}, not by one Conv alone")
    weight = conv.inputs[1]
    if not isinstance(weight, gs.Constant) or weight.dtype != np.float32:
        raise Refusal(f"the weights {weight.name} are not float32 constants")
    kernel = list(weight.shape[2:])
    if image.shape[1] != 3 or weight.shape[1] != 3:
        raise Refusal(f"{image.name} has {image.shape[1]} channels, not 3")
    if list(conv.attrs.get("strides", [1, 1])) != kernel or list(conv.attrs.get("dilations", [1, 1])) != [1, 1]:
        raise Refusal(f"its stride is not its kernel's size, {kernel[0]} x {kernel[1]}")
    if any(conv.attrs.get("pads", [])) or conv.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Refusal("it pads the image")


def _take_bytes(graph: gs.Graph, image: gs.Tensor, conv: gs.Node) -> None:
    edit = Editor(graph)
    batch, channels, height, width = dims(image) or []
    shape = [batch, height, width, channels]
    pixels = gs.Variable(image.name, dtype=np.uint8, shape=shape)
    float32 = np.dtype(np.float32)
    tensor = edit.node("Cast", [pixels], name=f"{image.name}/float", dtype=float32, shape=shape, to=onnx.TensorProto.FLOAT)
    for op, value in (("Sub", _MIDDLE), ("Mul", 1 / _HALF_RANGE)):
        constant = edit.constant(np.array(value, dtype=np.float32), f"{image.name}/{op.lower()}_by")
        tensor = edit.node(op, [tensor, constant], name=f"{image.name}/{op.lower()}", dtype=float32, shape=shape)
    redirect(image, edit.transpose(tensor, [0, 3, 1, 2], name=f"{image.name}/channels_first"))
    weight = conv.inputs[1]
    scaled = (weight.values.astype(np.float64) * (_HALF_RANGE / _MIDDLE)).astype(np.float32)
    conv.inputs[1] = gs.Constant(edit.fresh(f"{weight.name}/scaled"), scaled)
    graph.inputs = [pixels if tensor is image else tensor for tensor in graph.inputs]
