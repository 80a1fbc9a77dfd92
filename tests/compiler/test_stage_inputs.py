"""Which values the names of dimensions have, whatever an exporter calls them."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

import smc
from smc.compiler.stage_inputs import dynamic_dims, feature_sizes
from smc.passes.tensors import Dim

SHAPE, OTHER = (96, 128), (64, 48)


def graph(*shapes: list[Dim]) -> gs.Graph:
    return gs.Graph(inputs=[gs.Variable(f"x{i}", np.float32, shape) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        ("h", "w", {"h": 96, "w": 128}),
        ("16*rows", "cols*16", {"rows": 6, "cols": 8}),
        ("16*s0 + 0", "s1 - 3", {"s0": 6, "s1": 131}),
        ("256*h", "a + b", {"256*h": 96, "a + b": 128}),
        ("h//16", "height/16", {"h//16": 96, "height/16": 128}),
        (96, "?", {"?": 128}),
    ],
)
def test_dimensions_of_an_image(height: Dim, width: Dim, expected: dict[str, int]) -> None:
    assert dynamic_dims(graph(["n", 3, height, width]), "encoder", [SHAPE], 2) == {"n": 2, **expected}
    assert dynamic_dims(graph(["n", height, width, 3]), "encoder", [SHAPE], None) == expected
    assert dynamic_dims(graph(["n", 3, height, width]), "encoder", [None], None) == {}


def test_dimensions_of_features() -> None:
    grids = graph(["n", "r1", "c1", 64], ["n", "r2", "c2", 64])
    assert dynamic_dims(grids, "decoder", [SHAPE, OTHER], 3) == {"n": 3, "r1": 6, "c1": 8, "r2": 4, "c2": 3}
    assert dynamic_dims(grids, "decoder", [None, None], 1) == {"n": 1}
    assert dynamic_dims(graph(["n", "t1", 64], ["n", "t2", "channels"]), "decoder", [SHAPE, OTHER], None) == {"t1": 48, "t2": 12}
    # Three rows are not three channels.
    assert dynamic_dims(graph([1, 3, "cols", 64]), "decoder", [(48, 64)], 1) == {"cols": 4}
    assert [feature_sizes(rank, None, SHAPE) for rank in (3, 4)] == [[None, 48, None], [None, 6, 8, None]]


def test_a_name_has_one_value() -> None:
    with pytest.raises(smc.BadInput, match=r"encoder: by the dimensions \(n, 3, s, s\) of x0, s is 96 and 128 at once") as caught:
        dynamic_dims(graph(["n", 3, "s", "s"]), "encoder", [SHAPE], 1)
    assert "another name" in caught.value.fix
    shared = graph(["n", "rows", "cols", 64], ["n", "rows", "cols", 64])
    assert dynamic_dims(shared, "decoder", [SHAPE, SHAPE], 1) == {"n": 1, "rows": 6, "cols": 8}
    with pytest.raises(smc.BadInput, match="rows is 6 and 4"):
        dynamic_dims(shared, "decoder", [SHAPE, OTHER], 1)


def test_a_fixed_size_stays_what_it_is() -> None:
    fixed = graph([1, 6, 8, 64], [1, "rows", "cols", 64])
    assert dynamic_dims(fixed, "decoder", [SHAPE, SHAPE], 1) == {"rows": 6, "cols": 8}
    with pytest.raises(smc.BadInput, match=r"decoder: .* x0 is fixed at \(1, 6, 8, 64\), .* to take \(2, 6, 8, \?\)") as caught:
        dynamic_dims(fixed, "decoder", [SHAPE, SHAPE], 2)
    assert "--max-batch" in caught.value.fix
    with pytest.raises(smc.BadInput, match=r"x0 is fixed at \(1, 6, 8, 64\)"):
        dynamic_dims(fixed, "decoder", [OTHER, SHAPE], 1)
