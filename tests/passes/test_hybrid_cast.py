from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto

from smc.compiler.graph_runner import GraphRunner
from smc.passes.base import GraphRefused
from smc.passes.hybrid_cast import HybridCast, HybridCastReport, TensorRange, UnmatchedPattern, check_patterns
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, count, normal, session, weights

FLOAT32, FLOAT16 = np.dtype(np.float32), np.dtype(np.float16)
HUGE, FINE = TensorRange(1e5), TensorRange(1.0)


def cast(model: onnx.ModelProto, precision: Any = "hybrid", **options: Any) -> tuple[gs.Graph, HybridCastReport]:
    """The typed graph, which must be a valid model with the signature of `model`, and the report."""
    graph = prepare(model)
    report = HybridCast(precision, **options)(graph)
    after = gs.export_onnx(graph)
    onnx.checker.check_model(after, full_check=True)
    assert list(after.graph.input) == list(model.graph.input)
    assert [(v.name, v.type.tensor_type.elem_type) for v in after.graph.output] == [
        (v.name, v.type.tensor_type.elem_type) for v in model.graph.output
    ]
    assert_strongly_typed(graph)
    assert report.casts == count(graph)["Cast"] - count(prepare(model))["Cast"]
    return graph, report


def assert_strongly_typed(graph: gs.Graph) -> None:
    for node in graph.nodes:
        tensors = (*(t for i, t in enumerate(node.inputs) if node.op != "Resize" or i == 0), *node.outputs)
        floats = {str(t.dtype) for t in tensors if not t.is_empty() and str(t.dtype) in ("float16", "float32", "bfloat16", "16")}
        assert node.op == "Cast" or len(floats - {"16", "bfloat16"}) + bool(floats & {"16", "bfloat16"}) <= 1, node.name


def assert_close(model: onnx.ModelProto, graph: gs.Graph, feed: dict[str, np.ndarray], tolerance: float = 2e-3) -> None:
    """2e-3: four roundings to float16, of 5e-4 each at most."""
    for expected, found in zip(session(model).run(None, feed), GraphRunner(graph).run(feed).values(), strict=True):
        assert found.dtype == expected.dtype
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def precision_of(graph: gs.Graph, name: str) -> Any:
    return next(node for node in graph.nodes if node.name == name).outputs[0].dtype


def islands(report: HybridCastReport) -> dict[str, str]:
    return {island.node: island.reason for island in report.islands}


def block(constant_nodes: bool = False) -> onnx.ModelProto:
    """x + fc2(gelu(fc1(norm(x)))), twice: a residual stream. A norm and a product at its end."""
    b = Builder(constant_nodes=constant_nodes)
    x = b.input("x", ["n", 16])
    x = b.op("MatMul", x, weights(16, 16), name="embed")
    for i in range(2):
        normed = b.op("LayerNormalization", x, 1 + 0.1 * normal(16), normal(16), name=f"norm{i}")
        hidden = b.op("Gelu", b.op("MatMul", normed, weights(16, 64, seed=i), name=f"fc1_{i}"), name=f"gelu{i}")
        out = b.op("Add", b.op("MatMul", hidden, weights(64, 16, seed=i), name=f"fc2_{i}"), normal(16), name=f"bias{i}")
        x = b.op("Add", x, out, name=f"stream{i}")
    normed = b.op("LayerNormalization", x, np.ones(16, np.float32), name="last")
    b.output(b.op("MatMul", normed, weights(16, 4), name="head"))
    return b.model()


def head() -> onnx.ModelProto:
    """A map (n, 8, h, w) -> direction * expm1(length) and a unit descriptor, as the heads write them."""
    b = Builder()
    x = b.input("x", ["n", 8, "h", "w"])
    raw = b.op("Transpose", b.op("Conv", x, weights(8, 8, 1, 1), name="conv"), perm=[0, 2, 3, 1], name="to_last")
    points, features = b.op("Split", raw, np.array([3, 5]), axis=-1, outputs=2, name="split")
    length = b.op("ReduceL2", points, np.array([-1]), name="length")
    direction = b.op("Div", points, b.op("Clip", length, np.float32(1e-8), name="clip"), name="direction")
    grown = b.op("Sub", b.op("Exp", length, name="exp"), np.float32(1), name="expm1")
    b.output(b.op("Mul", direction, grown, name="points"))
    b.output(b.op("Div", features, b.op("ReduceL2", features, np.array([-1]), name="norm"), name="unit"))
    return b.model()


@pytest.mark.parametrize("constant_nodes", [False, True], ids=["initializers", "Constant nodes"])
@pytest.mark.parametrize(("precision", "tolerance"), [("hybrid", 2e-3), ("fp16", 2e-3), ("bf16", 2e-2)])
def test_everything_low_when_everything_fits(precision: str, tolerance: float, constant_nodes: bool) -> None:
    model = block(constant_nodes)
    graph, report = cast(model, precision)
    assert islands(report) == {}
    assert report.declined == []
    assert report.rewrites == len(report.low) == 15
    # One Cast at the input and one at the output: weights are constants of the type.
    assert report.casts == 2
    assert_close(model, graph, {"x": normal(7, 16)}, tolerance)
    with pytest.raises(AssertionError):
        assert_close(model, graph, {"x": normal(7, 16)}, tolerance / 100)


def test_a_stream_that_outgrows_float16_is_an_island_and_its_products_are_not() -> None:
    ranges = {"stream0_out0": HUGE, "stream1_out0": HUGE, "fc1_0_out0": FINE}
    model = block()
    graph, report = cast(model, ranges=ranges)
    reach = "which reaches 1e+05, above 16376"
    assert islands(report) == {
        "stream0": f"makes stream0_out0, {reach}",
        "norm1": "its input stream0_out0 is float32",
        "stream1": f"makes stream1_out0, {reach}",
        "last": "its input stream1_out0 is float32",
    }
    assert {precision_of(graph, f"fc{i}_{j}") for i in (1, 2) for j in (0, 1)} == {FLOAT16}
    # The input; the early stream and two branches into the island, and the normalised streams out of it; the output.
    assert report.casts == 7
    assert_close(model, graph, {"x": normal(7, 16)})


def test_residual_streams_in_float32() -> None:
    model = block()
    graph, report = cast(model, streams=True)
    assert islands(report) == {
        "stream0": "sums up a residual stream",
        "norm1": "its input stream0_out0 is float32",
        "stream1": "sums up a residual stream",
        "last": "its input stream1_out0 is float32",
    }
    feed = {"x": normal(7, 16)}
    (wanted,) = session(model).run(None, feed)
    errors = [np.linalg.norm(GraphRunner(typed).run(feed)["head_out0"] - wanted) for typed in (graph, cast(model)[0])]
    assert errors[0] < errors[1]
    assert islands(cast(model, "fp16", streams=True)[1]) == {}


def test_sums_that_are_no_residual_streams_stay_low() -> None:
    """A bias before a norm; two branches that no norm reads."""
    b = Builder()
    x = b.input("x", ["n", 16])
    shifted = b.op("Add", b.op("MatMul", x, weights(16, 16)), normal(16), name="bias")
    normed = b.op("LayerNormalization", shifted, np.ones(16, np.float32), name="norm")
    both = b.op("Add", b.op("MatMul", normed, weights(16, 16)), shifted, name="sum")
    b.output(b.op("MatMul", both, weights(16, 4)))
    _, report = cast(b.model(), streams=True)
    assert islands(report) == {}


def test_a_product_that_overflows_and_its_readers() -> None:
    model = block()
    graph, report = cast(model, ranges={"fc2_0_out0": HUGE})
    assert set(islands(report)) == {"fc2_0", "bias0"}
    assert precision_of(graph, "gelu0") == FLOAT16
    assert_close(model, graph, {"x": normal(7, 16)})


def test_bfloat16_needs_no_islands_for_ranges() -> None:
    _, report = cast(block(), "bf16", ranges={"fc2_0_out0": HUGE, "stream0_out0": HUGE})
    assert report.islands == []


def upsampling() -> onnx.ModelProto:
    """Convolution, transposed convolution, convolution: (n, 4, h, w) -> (n, 4, 2h, 2w)."""
    b = Builder()
    x = b.op("Conv", b.input("x", ["n", 4, "h", "w"]), weights(4, 4, 1, 1), name="before")
    x = b.op("ConvTranspose", x, weights(4, 4, 2, 2), strides=[2, 2], name="up")
    b.output(b.op("Conv", x, weights(4, 4, 1, 1, seed=1), name="after"))
    return b.model()


def test_transposed_convolutions_are_islands_of_bfloat16() -> None:
    model = upsampling()
    graph, report = cast(model, "bf16")
    assert islands(report) == {"up": "TensorRT-RTX has no bfloat16 kernel for it"}
    assert report.low == ["before", "after"]
    assert_close(model, graph, {"x": normal(2, 4, 3, 5)}, 2e-2)


def test_transposed_convolutions_cannot_be_included_in_bfloat16() -> None:
    _, report = cast(upsampling(), "bf16", include=["up"])
    assert set(islands(report)) == {"up"}
    (only,) = report.declined
    assert (only.node, only.why) == ("up", "included by name, but TensorRT-RTX has no bfloat16 kernel for it")


@pytest.mark.parametrize("precision", ["hybrid", "fp16"])
def test_transposed_convolutions_run_in_float16(precision: str) -> None:
    model = upsampling()
    graph, report = cast(model, precision)
    assert (report.islands, report.low) == ([], ["before", "up", "after"])
    assert_close(model, graph, {"x": normal(2, 4, 3, 5)})


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (TensorRange(16376.0), None),
        (TensorRange(16377.0), "reaches 1.64e+04, above 16376"),
        (TensorRange(6.2e-5, 0.1), None),
        (TensorRange(6.0e-5, 1.0), "stays below 6e-05, subnormal in float16"),
        (TensorRange(0.0), None),
        (TensorRange(0.1, 0.5), None),
        (TensorRange(0.1, 0.51), "has 51% of its values subnormal in float16"),
        (TensorRange(0.2, 0.9), None),
        (TensorRange(1.0, 0.0, finite=False), "is not finite even in float32"),
    ],
)
def test_what_fits_float16(found: TensorRange, why: str | None) -> None:
    assert found.unfit_for_float16() == why


def given_out(*, also_read: bool) -> onnx.ModelProto:
    """norm(product), given out in another shape, as the encoder's features are."""
    b = Builder()
    x = b.op("MatMul", b.input("x", ["n", 16]), weights(16, 16), name="product")
    normed = b.op("LayerNormalization", x, 1 + 0.1 * normal(16), normal(16), name="norm")
    b.output(b.op("Reshape", normed, np.array([-1, 4, 4]), name="grid"))
    if also_read:
        b.output(b.op("MatMul", normed, weights(16, 4), name="reader"))
    return b.model()


def test_a_norm_that_is_given_out_is_not_rounded() -> None:
    model = given_out(also_read=False)
    graph, report = cast(model)
    assert islands(report) == {"norm": "the graph gives out its result norm_out0, in float32"}
    assert (precision_of(graph, "product"), precision_of(graph, "norm")) == (FLOAT16, FLOAT32)
    assert report.casts == 2, "before the product and before the norm, none behind it"
    assert_close(model, graph, {"x": normal(7, 16)})


def test_a_norm_that_is_given_out_and_read_is_low() -> None:
    model = given_out(also_read=True)
    graph, report = cast(model)
    assert islands(report) == {}
    assert precision_of(graph, "norm") == FLOAT16
    assert_close(model, graph, {"x": normal(7, 16)})


@pytest.mark.parametrize(("scale", "fits"), [(1.0, True), (1e-3, True), (1e-6, False), (1e6, False)])
def test_weights_that_do_not_fit(scale: float, fits: bool) -> None:
    b = Builder()
    x = b.input("x", ["n", 16])
    b.output(b.op("MatMul", x, np.float32(scale) * weights(16, 16), name="product"))
    model = b.model()
    graph, report = cast(model)
    assert (islands(report) == {}) == fits
    assert fits or "does not fit float16" in islands(report)["product"]
    assert_close(model, graph, {"x": normal(5, 16)})


def test_the_heads_activations_are_islands() -> None:
    model = head()
    graph, report = cast(model)
    assert set(islands(report)) == {"length", "clip", "direction", "exp", "expm1", "points", "norm", "unit"}
    assert islands(report)["exp"] == "magnifies errors and magnitudes"
    assert islands(report)["clip"] == "computes with the result of length"
    assert precision_of(graph, "conv") == precision_of(graph, "to_last") == FLOAT16
    # The input; the points and the features, each once for two readers, as late as can be.
    assert report.casts == 3
    assert_close(model, graph, {"x": 0.5 * normal(2, 8, 3, 4)}, 5e-3)


def test_plain_float16_has_no_islands_and_overflows() -> None:
    graph, report = cast(head(), "fp16")
    assert report.islands == []
    found = GraphRunner(graph).run({"x": 10 * normal(2, 8, 3, 4)})["points_out0"]
    assert not np.isfinite(found).all()


def test_normalisation_spelled_out_is_an_island_up_to_the_product() -> None:
    b = Builder()
    x = b.input("x", ["n", 16])
    x = b.op("MatMul", x, weights(16, 16), name="before")
    centred = b.op("Sub", x, b.op("ReduceMean", x, np.array([-1]), name="mean"), name="centred")
    variance = b.op("ReduceMean", b.op("Pow", centred, np.float32(2), name="square"), np.array([-1]), name="variance")
    deviation = b.op("Sqrt", b.op("Add", variance, np.float32(1e-6), name="eps"), name="deviation")
    normed = b.op("Mul", b.op("Div", centred, deviation, name="divide"), normal(16), name="gamma")
    b.output(b.op("MatMul", normed, weights(16, 16), name="after"))
    model = b.model()
    graph, report = cast(model)
    assert set(islands(report)) == {"mean", "centred", "square", "variance", "eps", "deviation", "divide", "gamma"}
    assert report.low == ["before", "after"]
    assert_close(model, graph, {"x": normal(5, 16)})


def test_tables_from_shapes_are_cast_where_they_are_smallest() -> None:
    b = Builder()
    x = b.input("x", ["n", "t", 16])
    size = b.op("Squeeze", b.op("Shape", x, start=1, end=2), np.array([0]))
    position = b.op("Cast", size, to=TensorProto.FLOAT, name="float")
    steps = b.op("Range", np.float32(0), position, np.float32(1), name="range")
    angles = b.op("Mul", b.op("Unsqueeze", steps, np.array([1])), normal(1, 32), name="angles")
    table = b.op("Gather", b.op("Cos", angles, name="cos"), np.arange(16), axis=1, name="half")
    table = b.op("Expand", b.op("Unsqueeze", table, np.array([0])), b.op("Shape", x), name="all")
    b.output(b.op("MatMul", b.op("Mul", x, table, name="turn"), weights(16, 8), name="product"))
    model = b.model()
    for precision in ("hybrid", "fp16", "bf16"):
        graph, report = cast(model, precision)
        assert set(islands(report)) == {"float", "range", "angles", "cos"}
        assert report.low == ["turn", "product"]
        half = next(node for node in graph.nodes if node.name == "half")
        assert [reader.op for reader in half.outputs[0].outputs] == ["Cast"], "behind the selection, before the expansion"
    assert_close(model, cast(model)[0], {"x": normal(2, 500, 16)})


def test_bytes_are_cast_at_once_and_whole_numbers_stay() -> None:
    b = Builder()
    x = b.input("x", ["n", 3, 4, 4], np.uint8)
    pixels = b.op("Div", b.op("Sub", b.op("Cast", x, to=TensorProto.FLOAT, name="float"), np.float32(127.5)), np.float32(128))
    shape = b.op("Concat", b.op("Shape", x, end=1), np.array([48]), axis=0)
    b.output(b.op("MatMul", b.op("Reshape", pixels, shape), weights(48, 8)))
    model = b.model()
    graph, report = cast(model)
    assert next(node for node in graph.nodes if node.name == "float").attrs["to"] == TensorProto.FLOAT16
    assert report.casts == 1
    assert report.islands == []
    pixels_in = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8)
    assert_close(model, graph, {"x": pixels_in})


def test_include_exclude_and_keep() -> None:
    model = block()
    graph, report = cast(
        model,
        ranges={"fc2_0_out0": HUGE, "fc2_1_out0": HUGE},
        keep={"gelu1": "moves the output"},
        include=["fc2_*", "bias?"],
        exclude=["fc2_1", "fc1_0"],
    )
    assert islands(report) == {
        "fc1_0": "excluded by name",
        "gelu1": "moves the output",
        "fc2_1": "excluded by name",
    }
    assert precision_of(graph, "fc2_0") == FLOAT16
    assert_close(model, graph, {"x": normal(7, 16)})


def test_a_pattern_without_a_match_names_the_closest() -> None:
    with pytest.raises(UnmatchedPattern, match=r"no node is named 'fc3_0'; the closest names are fc\d_0, "):
        cast(block(), exclude=["fc3_0"])
    check_patterns(["fc1_*", "conv"], prepare(block()), prepare(head()))


def test_unknown_operations_stay_and_cannot_be_included() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    b.output(b.op("Hardmax", b.op("MatMul", x, weights(4, 4)), name="hard"))
    _, report = cast(b.model(), include=["hard"])
    assert islands(report) == {"hard": "there is no rule for Hardmax in low precision"}
    (only,) = report.declined
    assert (only.node, only.why) == ("hard", "included by name, but there is no rule for Hardmax in low precision")


def test_what_is_typed_already_stays() -> None:
    b = Builder()
    x = b.input("x", ["n", 4])
    half = b.op("Cast", x, to=TensorProto.FLOAT16, name="down")
    back = b.op("Cast", b.op("Relu", half, name="relu"), to=TensorProto.FLOAT, name="up")
    b.output(b.op("MatMul", back, weights(4, 4), name="product"))
    model = b.model()
    graph, report = cast(model)
    assert set(islands(report)) == {"down", "up"}
    assert precision_of(graph, "product") == FLOAT16
    assert_close(model, graph, {"x": normal(3, 4)})


def test_attention_takes_low_operands_and_no_softmax_precision() -> None:
    b = Builder()
    q = b.input("q", [1, 2, "n", 8])
    b.output(b.op("Attention", q, q, q, name="attention"))
    model = b.model()
    graph, report = cast(model)
    (attention,) = [node for node in graph.nodes if node.op == "Attention"]
    assert "softmax_precision" not in attention.attrs  # TensorRT refuses it
    assert (report.low, report.casts) == (["attention"], 2), "its operands are one tensor, cast once"
    assert_close(model, graph, {"q": normal(1, 2, 5, 8)})


def test_scales_of_a_resize_stay() -> None:
    b = Builder()
    x = b.input("x", [1, 2, 3, 4])
    b.output(b.op("Resize", x, "", np.array([1, 1, 2, 2], dtype=np.float32), mode="linear", name="resize"))
    graph, report = cast(b.model())
    (resize,) = [node for node in graph.nodes if node.op == "Resize"]
    assert resize.inputs[2].dtype == FLOAT32
    assert report.low == ["resize"]


def test_a_shared_weight_has_one_copy_of_each_type() -> None:
    b = Builder()
    x = b.input("x", ["n", 8])
    weight = b.constant(weights(8, 8))
    first, second = b.op("MatMul", x, weight, name="low1"), b.op("MatMul", x, weight, name="low2")
    b.output(b.op("Add", first, b.op("Add", second, b.op("MatMul", x, weight, name="high"))))
    graph, _ = cast(b.model(), exclude=["high"])
    held = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    assert sorted(str(tensor.dtype) for tensor in held) == ["float16", "float32"]


@pytest.mark.parametrize("model", [block, head])
def test_the_report_counts(model: Callable[[], onnx.ModelProto]) -> None:
    graph, report = cast(model())
    assert report.name == "HybridCast"
    assert report.nodes_after == len(graph.nodes) == report.nodes_before + report.casts


def test_a_tensor_of_unknown_type_is_refused() -> None:
    graph = prepare(block())
    next(node for node in graph.nodes if node.name == "gelu0").outputs[0].dtype = None
    with pytest.raises(GraphRefused, match="the type of gelu0_out0 at gelu0 is unknown"):
        HybridCast("hybrid")(graph)
