"""An encoder and a decoder of very few operations, with the inputs and outputs of real ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from smc.compiler.backends.plan_job import PlanJob
from smc.compiler.targets import TARGETS
from tests.passes.graphs import Builder, normal, weights

C, SIZE, PATCH = 32, 7, 16
"""Channels of the features, and of a descriptor; pixels along a patch."""

Middle = Callable[[Builder, str], str]


def encoder(dtype: Any = np.float16) -> onnx.ModelProto:
    """Bytes (batch, H, W, 3) -> features (batch, H / 16, W / 16, C)."""
    b = Builder()
    image = b.input("image", ["batch", "16*rows", "16*cols", 3], np.uint8)
    pixels = b.op("Transpose", b.op("Cast", image, to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))), perm=[0, 3, 1, 2])
    maps = b.op(
        "Conv", pixels, (weights(C, 3, PATCH, PATCH) / 100).astype(dtype), strides=[PATCH] * 2, kernel_shape=[PATCH] * 2, name="patches"
    )
    tokens = b.op("LayerNormalization", b.op("Transpose", maps, perm=[0, 2, 3, 1]), (1 + normal(C) / 9).astype(dtype), name="norm")
    rename(b, b.op("Cast", tokens, to=onnx.TensorProto.FLOAT), "features")
    b.output("features")
    return b.model()


def decoder(dtype: Any = np.float16, middle: Middle = lambda b, tensor: tensor) -> onnx.ModelProto:
    """Two views' features -> descriptors and their confidences of both; `middle` works on the features."""
    b = Builder()
    width = (SIZE + 1) * PATCH**2
    for view in (1, 2):
        grid: list[int | str] = ["batch", f"rows{view}", f"cols{view}", C]
        x = b.op("Cast", b.input(f"features{view}", grid), to=onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
        product = b.op("MatMul", middle(b, x), weights(C, width, seed=view).astype(dtype), name=f"head{view}")
        maps = b.op("Transpose", b.op("Cast", product, to=onnx.TensorProto.FLOAT), perm=[0, 3, 1, 2])
        maps = b.op("Transpose", b.op("DepthToSpace", maps, blocksize=PATCH, mode="CRD"), perm=[0, 2, 3, 1])
        vector = b.op("Slice", maps, np.array([0]), np.array([SIZE]), np.array([3]))
        direction = b.op("Div", vector, b.op("ReduceL2", vector, np.array([-1]), keepdims=1))
        confidence = b.op("Add", b.op("Exp", b.op("Gather", maps, np.array(SIZE), axis=3)), np.float32(0))
        for tensor, name in ((direction, f"desc{view}"), (confidence, f"desc_conf{view}")):
            rename(b, tensor, name)
            b.output(name)
    return b.model()


def rename(b: Builder, tensor: str, name: str) -> None:
    """Give a tensor that no node reads yet another name."""
    for node in b.nodes:
        node.output[:] = [name if output == tensor else output for output in node.output]


def job(directory: Path, **changes: Any) -> PlanJob:
    """A plan of both for one shape; graphs, if given, are models."""
    models = {"encoder": encoder(), "decoder": decoder()} | changes.pop("graphs", {})
    graphs = {stage: directory / f"{stage}.onnx" for stage in models}
    for stage, model in models.items():
        onnx.save(model, graphs[stage])
    output = directory / "plan"
    output.mkdir()
    fields: dict[str, Any] = {
        "graphs": graphs,
        "target": TARGETS["h200"],
        "shapes": [(48, 64)],
        "max_batch": 1,
        "output": output,
        "cache": directory / "cache",
    }
    return PlanJob(**(fields | changes))
