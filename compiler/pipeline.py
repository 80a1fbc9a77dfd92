"""Which passes run for which backend, in which order and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from smc.compiler.backends.plan_job import Precision
from smc.compiler.stage_inputs import dynamic_dims
from smc.exported.images import PATCH
from smc.passes.base import Pass
from smc.passes.bytes_input import BytesInput
from smc.passes.cancel_layout import CancelLayout
from smc.passes.common_subexpressions import CommonSubexpressions
from smc.passes.commute_upsample import CommuteUpsample
from smc.passes.fix_shapes import FixShapes
from smc.passes.flash_match import FlashMatch
from smc.passes.fold_constants import FoldConstants
from smc.passes.fold_permutation import FoldPermutation
from smc.passes.fuse_gelu import FuseGelu
from smc.passes.merge_projections import MergeProjections
from smc.passes.rotary_fusion import RotaryFusion
from smc.passes.rotary_tables import RotaryTables
from smc.passes.twin_norms import TwinNorms


@dataclass(frozen=True)
class PipelineTask:
    """What a stage's graph is to become.

    Attributes:
        stage: "encoder" or "decoder".
        shapes: (H, W) input shapes that the plan takes.
        max_batch: pairs at once.
        precision: "fp32", "hybrid", "fp16" or "bf16".
        include, exclude: patterns of names of nodes, for HybridCast.
        streams: whether HybridCast keeps residual streams in float32.
    """

    stage: str
    shapes: Sequence[tuple[int, int]]
    max_batch: int
    precision: Precision
    include: Sequence[str]
    exclude: Sequence[str]
    streams: bool = False


Dims = Mapping[str, int]
"""Sizes of dynamic dimensions of a graph's inputs that are the same for every input of the plan."""


def onnxruntime_passes(task: PipelineTask, dims: Dims) -> list[Pass]:
    # The plan is the float32 oracle as well, and ONNX Runtime fuses attention for itself: FlashMatch was measured to gain
    # nothing on CPUs.
    return []


# BatchTwins, with TwinNorms before it, is for the backend that launches kernels itself. On CPUs it gained nothing on the public model
# (5.43 s against 5.20 s a pair), and what TensorRT gains by it can be measured on its hardware only.


def tensorrt_passes(task: PipelineTask, dims: Dims) -> list[Pass]:
    rows, cols = (max(shape[axis] for shape in task.shapes) // PATCH for axis in (0, 1))
    return [
        FlashMatch(),
        # Reads the operands of the Attention nodes that FlashMatch made.
        RotaryFusion(),
        # Only once a rotation is one node can its permutation of channels move into the projections' weights.
        FoldPermutation(),
        # Sizes that every input shares become static, and with them the shape arithmetic constant.
        FixShapes(dims),
        # Before the three that read constants: bounds of slices, tables, biases.
        FoldConstants(),
        # With several input shapes the tables of rotations are still computed: they become slices of constant ones.
        *([RotaryTables(rows, cols)] if len(task.shapes) > 1 else []),
        # May leave equal nodes, which the next one merges.
        CancelLayout(),
        # Before MergeProjections: equal products are to be merged, not to be made one of twice the width.
        CommonSubexpressions(),
        MergeProjections(),
        # Last: it changes what the graph takes. The normalisation must be in the weights before HybridCast rounds them.
        *([BytesInput()] if task.stage == "encoder" else []),
    ]


def cuda_passes(task: PipelineTask, dims: Dims) -> list[Pass]:
    # As for TensorRT; only what differs is said.
    rows, cols = (max(shape[axis] for shape in task.shapes) // PATCH for axis in (0, 1))
    return [
        FlashMatch(),
        RotaryFusion(),
        FoldPermutation(),
        FixShapes(dims),
        FoldConstants(),
        # The kernels' GELU is a node of its own; older exporters write it out.
        FuseGelu(),
        *([RotaryTables(rows, cols)] if len(task.shapes) > 1 else []),
        CancelLayout(),
        CommonSubexpressions(),
        # A 1x1 convolution behind an enlargement does four times the work that it does before it.
        CommuteUpsample(),
        # Scales of norms become part of weights, with which HybridCast then rounds them once. Rounded by themselves they made 6 % of the
        # descriptors' error.
        # In the decoder both views afterwards read one normalised stream: the products of one view's self-attention and of the other's
        # cross-attention become one. The backend makes both views one stream of twice the batch once every dimension is static.
        TwinNorms(),
        *([CommonSubexpressions()] if task.stage == "decoder" else []),
        MergeProjections(),
        *([BytesInput()] if task.stage == "encoder" else []),
    ]


Pipeline = Callable[[PipelineTask, Dims], list[Pass]]

PIPELINES: dict[str, Pipeline] = {
    "cuda": cuda_passes,
    "onnxruntime": onnxruntime_passes,
    "tensorrt": tensorrt_passes,
    "tensorrt-rtx": tensorrt_passes,
}


FLOAT32_STREAMS = frozenset({("cuda", "decoder")})
"""Backends and stages whose residual streams stay in float32.

With the public model's shape, emulated, the decoders' streams in float32 lower the descriptors' error by 9 % and that of the second
view's points by 14 %. Three products and three norms a layer move twice the bytes of the stream. The encoder's stream, in twice as many
layers and of more channels, would lower the descriptors' error by another quarter, and that of points and confidences by little.
TensorRT fuses sums and norms by rules of its own; what float32 costs there was not measured."""


def fixed_dims(graph: gs.Graph, task: PipelineTask) -> Dims:
    """The grid, where the plan takes one input shape, and the batch, where it takes one pair. Raises BadInput: see `dynamic_dims`."""
    shape = task.shapes[0] if len(task.shapes) == 1 else None
    # The encoder may take both images of a pair at once.
    batch = 1 if task.stage == "decoder" and task.max_batch == 1 else None
    return dynamic_dims(graph, task.stage, [shape] * len(graph.inputs), batch)
