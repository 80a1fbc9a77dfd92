"""What the stages take: images, and the features of two images, in layouts that all backends share."""

from __future__ import annotations

import re
from collections.abc import Sequence

import onnx_graphsurgeon as gs

from smc.exported.errors import BadInput
from smc.exported.images import PATCH
from smc.passes.tensors import Dim, dim_value

Shape = tuple[int, int]
"""(H, W) of an image, in pixels."""


def feature_sizes(rank: int, batch: int | None, shape: Shape | None) -> list[int | None]:
    """The sizes of features: (batch, rows, cols, channels), or (batch, rows * cols, channels) where their rank is 3.

    Args:
        rank: 3 or 4.
        batch: how many images they are of.
        shape: of each image.

    Returns:
        A size for each axis, None where it is not known.
    """
    if shape is None:
        return [batch, *[None] * (rank - 1)]
    rows, cols = (size // PATCH for size in shape)
    return [batch, rows * cols, None] if rank == 3 else [batch, rows, cols, None]


def dynamic_dims(graph: gs.Graph, stage: str, shapes: Sequence[Shape | None], batch: int | None) -> dict[str, int]:
    """The values that the names of dynamic dimensions have where a stage's inputs are of given sizes.

    Args:
        graph: takes an image (batch, 3, H, W), or bytes (batch, H, W, 3), or features as in `feature_sizes`.
        stage: "encoder" or "decoder".
        shapes: of the image, or of the images that each of the features is of; None for any.
        batch: None for any.

    Returns:
        Names of `passes.fix_shapes.FixShapes`. A dimension that is other arithmetic than a multiple of one name and a constant is
        itself the name.

    Raises:
        BadInput: the graph fixes a size to another value, or one name would have two.
    """
    found: dict[str, int] = {}
    for tensor, shape in zip(graph.inputs, shapes, strict=True):
        wanted = _image_sizes(tensor.shape, batch, shape) if stage == "encoder" else feature_sizes(len(tensor.shape), batch, shape)
        for size, value in zip(tensor.shape, wanted, strict=True):
            if isinstance(size, int) and value not in (size, None):
                raise BadInput(
                    f"{stage}: the graph's input {tensor.name} is fixed at {written(tensor.shape)}, and the plan is to take "
                    f"{written(wanted)}",
                    fix="export it with dynamic dimensions, or give its fixed sizes alone as --shape and --max-batch",
                )
            if not isinstance(size, str) or value is None:
                continue
            name, count = _solved(size, value)
            if found.setdefault(name, count) != count:
                raise BadInput(
                    f"{stage}: by the dimensions {written(tensor.shape)} of {tensor.name}, {name} is {found[name]} and {count} at once",
                    fix="export it with another name for each dimension that may differ, or give one --shape that all of them fit",
                )
    return found


def written(sizes: Sequence[Dim]) -> str:
    """Sizes for messages; ? is any."""
    return f"({', '.join('?' if size is None else str(size) for size in sizes)})"


def _image_sizes(shape: Sequence[Dim], batch: int | None, image: Shape | None) -> list[int | None]:
    height, width = image or (None, None)
    return [batch, 3, height, width] if shape[1] == 3 else [batch, height, width, 3]


def _solved(size: str, value: int) -> tuple[str, int]:
    """The name in a dimension such as 16*rows, and what it is where the dimension is `value`; of other arithmetic both as they are."""
    names = set(re.findall(r"[A-Za-z_]\w*", size))
    if len(names) == 1:
        (name,) = names
        first, second = (dim_value(size, {name: count}) for count in (0, 1))
        if first is not None and second is not None and first != second:
            count = (value - first) // (second - first)
            if dim_value(size, {name: count}) == value:
                return name, count
    return size, value
