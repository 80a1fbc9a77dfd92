"""HybridCast: a precision for every floating-point tensor, written into the graph as Casts (Speedy MASt3R, section 3.4.3)."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from smc.passes.base import Declined, GraphRefused, Pass, PassReport, label
from smc.passes.tensors import Array, Editor, constant_value, has_output, is_output, producer

Precision = Literal["hybrid", "fp16", "bf16"]

FLOAT16_LIMIT = 65504.0 / 4
"""Largest magnitude seen in calibration that is left to float16. A few images do not show a tensor's maximum: two bits of headroom
cover images whose activations are four times as large."""

SUBNORMAL = 2.0**-14
"""Smaller magnitudes have fewer than 11 significant bits in float16."""

SUBNORMAL_SHARE = 0.5
"""A tensor most of whose nonzero values are subnormal is kept in float32..."""

SUBNORMAL_MATTERS_BELOW = 2.0**-3
"""...unless its largest value is as large as this: rounding that alone may err by 2^-14, more than any subnormal value is worth."""

WEIGHT_ERROR = 1e-3
"""Relative error from which on a weight does not fit float16. Normal values err by 2.1e-4 on average, by 4.9e-4 at most."""

DATA_MOVEMENT = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze"}
    | {"Tile", "Transpose", "Unsqueeze"}
)
_ELEMENTWISE = frozenset({"Abs", "Add", "CastLike", "Clip", "Div", "Max", "Min", "Mul", "Neg", "Relu", "Sub", "Sum", "Where"})
_NORMALISATIONS = frozenset({"GroupNormalization", "LayerNormalization", "RMSNormalization"})
_LOW = (
    frozenset({"Attention", "AveragePool", "BatchNormalization", "Conv", "ConvTranspose", "Elu", "Erf", "Gelu", "Gemm", "HardSigmoid"})
    | frozenset({"HardSwish", "LeakyRelu", "MatMul", "MaxPool", "Mish", "PRelu", "Resize", "RotaryEmbedding", "Sigmoid", "Tanh"})
    | _ELEMENTWISE
    | _NORMALISATIONS
)
"""Operations that run in low precision unless something says otherwise. A GPU sums up their products in float32."""

_SENSITIVE = {
    **dict.fromkeys(("Exp", "Log", "Pow"), "magnifies errors and magnitudes"),
    **dict.fromkeys(("Sqrt", "Reciprocal"), "is part of a norm"),
    **dict.fromkeys(("ReduceL1", "ReduceL2", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare", "CumSum"), "sums up many values"),
    **dict.fromkeys(("ReduceLogSum", "ReduceLogSumExp", "Softmax", "LogSoftmax"), "sums up exponentials"),
    "InstanceNormalization": "takes statistics in the type of its input",
}
"""Operations that stay in float32, and why."""

_NO_BFLOAT16 = {"ConvTranspose": "TensorRT-RTX has no bfloat16 kernel for it"}
"""Operations that float16 may run and bfloat16 may not, and why. Found with TensorRT-RTX 1.7.1 for sm 8.0, 8.6, 8.9 and 12.0."""

_ANY_DIM = 32
"""Stands for a dynamic dimension's size where amounts of data are compared."""


class UnmatchedPattern(ValueError):
    """A pattern of node names that matches no node; the message has the closest names."""


@dataclass(frozen=True)
class TensorRange:
    """What a tensor's values were in calibration.

    Attributes:
        amax: the largest magnitude.
        subnormal: share of the nonzero values whose magnitude is below 2^-14.
        finite: whether all values were.
    """

    amax: float
    subnormal: float = 0.0
    finite: bool = True

    def unfit_for_float16(self) -> str | None:
        """Why float16 cannot hold the tensor, or None."""
        if not self.finite:
            return "is not finite even in float32"
        if self.amax > FLOAT16_LIMIT:
            return f"reaches {self.amax:.3g}, above {FLOAT16_LIMIT:.0f}"
        if 0 < self.amax < SUBNORMAL:
            return f"stays below {self.amax:.2g}, subnormal in float16"
        if self.subnormal > SUBNORMAL_SHARE and self.amax < SUBNORMAL_MATTERS_BELOW:
            return f"has {self.subnormal:.0%} of its values subnormal in float16"
        return None


@dataclass(frozen=True)
class Island:
    """A node that was kept in float32: its name, its operation and the reason."""

    node: str
    op: str
    reason: str


@dataclass
class HybridCastReport(PassReport):
    """`rewrites` counts the nodes that compute in low precision.

    Attributes:
        low: their names, in topological order.
        islands: the nodes that stayed in float32. Data movement and nodes on whole numbers are not listed.
        casts: Cast nodes added.
    """

    low: list[str] = field(default_factory=list)
    islands: list[Island] = field(default_factory=list)
    casts: int = 0


class HybridCast(Pass):
    """Every float32 tensor gets a type, float32 or the low one, such that the operands of every node agree.

    Before: a float32 graph.
    After: the same graph, strongly typed. Nodes compute in float16 (bfloat16), except for islands of float32:

    1. Nodes excluded by name, and nodes that calibration says to `keep`.
    2. Arithmetic on shapes alone: rotation angles and other tables, which would lose the token's position.
    3. Exponentials, norms, means and softmaxes, division by what the graph computes, and everything elementwise behind them:
       activations of the heads up to the outputs, and normalisations that are spelled out.
    4. What makes or reads a tensor whose range does not fit float16, such as a residual stream that has outgrown it. The products
       between read the normalised stream, and stay low. A product that overflows moves to float32 rather than bfloat16, whose
       eight bits would cost the accuracy that the island is to save. bfloat16 has float32's range and needs no such islands.
    5. Products whose weights do not fit float16.
    6. A normalisation whose input is float32: the one Cast is behind it instead of before it. One whose result the graph only gives
       out, as the encoder its features: the one Cast is before it instead of behind it, and the features are not rounded.
    7. Transposed convolutions, where the low type is bfloat16.
    8. If `streams` says so, residual streams: sums of two computed tensors of which a normalisation reads the result. Each of them
       would be rounded, and the roundings add up over the layers. The norms are then islands by rule 6.

    Other normalisations take low operands and compute their statistics in float32, which is the default of their stash_type. Attention
    takes low operands too: its softmax is in float32 in every fused kernel, and TensorRT refuses softmax_precision, which would say
    so. Movements of data take the type that moves fewer bytes, the Casts themselves included. Weights are converted, once, not cast.
    A tensor is cast once, however many read it. The graph's inputs and outputs keep their types, and nodes of other floating-point
    types stay as they are.
    """

    def __init__(
        self,
        precision: Precision,
        ranges: Mapping[str, TensorRange] | None = None,
        keep: Mapping[str, str] | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        streams: bool = False,
    ) -> None:
        """
        Args:
            precision: "hybrid": float16 and the islands above; "bf16": bfloat16 and the same; "fp16": float16 and no islands but 2,
                to compare with.
            ranges: tensor name -> its values in calibration; what is not in it is taken to fit.
            keep: node name -> why it stays in float32.
            include: fnmatch patterns of nodes that compute in low precision whatever the rules say.
            exclude: fnmatch patterns of nodes that stay in float32; these win.
            streams: keep residual streams in float32, as rule 8 says; "fp16" does not.
        """
        self.precision = precision
        self.ranges = ranges or {}
        self.keep = keep or {}
        self.include = include
        self.exclude = exclude
        self.streams = streams

    def __call__(self, graph: gs.Graph) -> HybridCastReport:
        """Apply to `graph`, in place. Raises UnmatchedPattern, and GraphRefused where a tensor's type is unknown."""
        return self._apply(graph, HybridCastReport(self.name))

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        assert isinstance(report, HybridCastReport)
        check_patterns([*self.include, *self.exclude], graph)
        low_type = TensorProto.BFLOAT16 if self.precision == "bf16" else TensorProto.FLOAT16
        weights = _Weights(low_type)
        plan = _Plan(graph, self, weights, report)
        _settle_moves(graph, plan)
        report.rewrites = len(report.low)
        before = len(graph.nodes)
        _write(graph, plan, weights)
        report.casts = len(graph.nodes) - before


def check_patterns(patterns: Sequence[str], *graphs: gs.Graph) -> None:
    """Raise UnmatchedPattern for a pattern that matches no node of any of `graphs`."""
    for pattern in patterns:
        if not any(matching(pattern, graph) for graph in graphs):
            names = [label(node) for graph in graphs for node in graph.nodes]
            closest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UnmatchedPattern(f"no node is named {pattern!r}; the closest names are {', '.join(closest)}")


def matching(pattern: str, graph: gs.Graph) -> list[str]:
    """Names of the nodes that an fnmatch pattern matches, case-sensitively."""
    return [name for node in graph.nodes if fnmatch.fnmatchcase(name := label(node), pattern)]


def float_slots(node: gs.Node) -> Iterator[int]:
    """Positions of the float32 operands that have the type that a node computes in. A Resize's scales are always float32."""
    for i, tensor in enumerate(node.inputs):
        if _is_float32(tensor) and not (node.op == "Resize" and i > 0):
            yield i


def _is_float32(tensor: gs.Tensor) -> bool:
    return not tensor.is_empty() and tensor.dtype == np.float32


def _is_constant(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return isinstance(tensor, gs.Constant) or (node is not None and node.op == "Constant")


def _constant(tensor: gs.Tensor) -> Array:
    value = constant_value(tensor)
    assert value is not None
    return value


def _readers_behind_moves(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """The nodes that read a tensor as it is, or moved."""
    for reader in tensor.outputs:
        if reader.op in DATA_MOVEMENT:
            for moved in reader.outputs:
                yield from _readers_behind_moves(moved)
        else:
            yield reader


def _has_other_floats(node: gs.Node) -> bool:
    """Whether a node has floating-point operands or results of another type than float32."""
    others = (np.dtype(np.float16), np.dtype(np.float64), TensorProto.BFLOAT16)
    return any(not tensor.is_empty() and tensor.dtype in others for tensor in (*node.inputs, *node.outputs))


class _Weights:
    """Constants in the low type, each converted once."""

    def __init__(self, low_type: int) -> None:
        self.low_type = low_type
        # graphsurgeon gives bfloat16, which NumPy lacks, as its ONNX code.
        self.low_dtype = np.dtype(np.float16) if low_type == TensorProto.FLOAT16 else low_type
        self._values: dict[int, Array] = {}
        self._unfit: dict[int, str | None] = {}

    def unfit_for_float16(self, tensor: gs.Tensor) -> str | None:
        """Why float16 cannot hold a constant, or None."""
        if id(tensor) not in self._unfit:
            exact, low = _constant(tensor), self._low(tensor).astype(np.float32)
            with np.errstate(invalid="ignore"):
                error = float(np.linalg.norm(low - exact))
            fits = error <= WEIGHT_ERROR * float(np.linalg.norm(exact))
            self._unfit[id(tensor)] = None if fits else f"its constant {tensor.name} does not fit float16"
        return self._unfit[id(tensor)]

    def low_constant(self, tensor: gs.Tensor, name: str) -> gs.Constant:
        return gs.Constant(name, self._low(tensor))

    def _low(self, tensor: gs.Tensor) -> Array:
        if id(tensor) not in self._values:
            with np.errstate(over="ignore"):  # an infinity is what the low type makes of it
                self._values[id(tensor)] = _constant(tensor).astype(helper.tensor_dtype_to_np_dtype(self.low_type))
        return self._values[id(tensor)]


class _Plan:
    """Which nodes compute in the low type: `low` has the answer for each node that reads or makes float32 tensors, by id.

    `moves` are the nodes whose answer is open: they only move data, and follow their neighbours. Nothing in the graph is changed
    while the plan is used, so that an id stays with its node or tensor.
    """

    def __init__(self, graph: gs.Graph, options: HybridCast, weights: _Weights, report: HybridCastReport) -> None:
        self._graph = graph
        self._options = options
        self._weights = weights
        self.low: dict[int, bool] = {}
        self.moves: list[gs.Node] = []
        # Of tensors, by id:
        self._from_data = {id(tensor) for tensor in graph.inputs}
        self._wide = {id(tensor) for tensor in graph.inputs}  # float32 results of arithmetic, also when moved
        self._behind: dict[int, str] = {}  # elementwise behind a sensitive node: its name
        self._unfit: dict[int, str] = {}
        for tensor in graph.inputs:
            self._note_range(tensor)
        self._included = {name for pattern in options.include for name in matching(pattern, graph)}
        self._excluded = {name for pattern in options.exclude for name in matching(pattern, graph)}
        for node in graph.nodes:  # in topological order
            self._visit(node, report)

    def nodes(self) -> Iterator[tuple[gs.Node, bool]]:
        return ((node, self.low[id(node)]) for node in self._graph.nodes if id(node) in self.low)

    def _visit(self, node: gs.Node, report: HybridCastReport) -> None:
        if node.op in ("Constant", "Shape", "Size"):
            return
        if any(id(tensor) in self._from_data for tensor in node.inputs):
            self._from_data.update(map(id, node.outputs))
        if not any(map(_is_float32, (*node.inputs, *node.outputs))):
            return
        for tensor in (*node.inputs, *node.outputs):
            if tensor.dtype is None and not tensor.is_empty():
                raise GraphRefused(f"the type of {tensor.name} at {label(node)} is unknown")
        for tensor in node.outputs:
            self._note_range(tensor)
        moves = self._only_moves(node)
        if moves:
            self._pass_on(node)
        reason = self._why_float32(node, moves)
        self.low[id(node)] = reason is None
        if moves:
            if reason is None and label(node) not in self._included:
                self.moves.append(node)
            return
        if reason is None:
            report.low.append(label(node))
            return
        self._wide.update(map(id, node.outputs))
        if (origin := self._sensitive_origin(node)) is not None:
            self._behind.update(dict.fromkeys(map(id, node.outputs), origin))
        report.islands.append(Island(label(node), node.op, reason))
        if label(node) in self._included and label(node) not in self._excluded:
            report.declined.append(Declined(label(node), f"included by name, but {reason}"))

    def _note_range(self, tensor: gs.Tensor) -> None:
        found = self._options.ranges.get(tensor.name)
        if self._options.precision == "hybrid" and found is not None and (why := found.unfit_for_float16()):
            self._unfit[id(tensor)] = f"{tensor.name}, which {why}"

    def _only_moves(self, node: gs.Node) -> bool:
        """Whether a node hands values on, or makes them of bytes: all of these are exact in every type."""
        if node.op == "Cast":
            source = node.inputs[0].dtype
            return _is_float32(node.outputs[0]) and source in (np.float32, np.uint8, np.int8, np.bool_)
        return node.op in DATA_MOVEMENT

    def _pass_on(self, node: gs.Node) -> None:
        """What is known of a movement's operands holds for its results."""
        for tensor in node.outputs:
            for operand in (node.inputs[i] for i in float_slots(node)):
                if id(operand) in self._wide:
                    self._wide.add(id(tensor))
                for facts in (self._behind, self._unfit):
                    if id(operand) in facts:
                        facts.setdefault(id(tensor), facts[id(operand)])

    def _why_float32(self, node: gs.Node, moves: bool) -> str | None:
        """Why a node stays in float32, or None."""
        from_shapes = not any(id(tensor) in self._from_data for tensor in node.inputs)
        known = moves or node.op in _LOW or node.op in _SENSITIVE
        if label(node) in self._excluded:
            return "excluded by name"
        if _has_other_floats(node):
            return "some of its operands or results have another floating-point type"
        if node.domain not in ("", "ai.onnx", None) or not (known or from_shapes):
            return f"there is no rule for {node.op} in low precision"
        if self._options.precision == "bf16" and node.op in _NO_BFLOAT16:
            return _NO_BFLOAT16[node.op]
        if label(node) in self._included and known:
            return None
        if from_shapes and not moves:
            return "computes with shapes alone, such as the angles of rotations"
        if self._options.precision == "fp16":
            return None
        if label(node) in self._options.keep:
            return self._options.keep[label(node)]
        if self._options.streams and self._is_stream(node):
            return "sums up a residual stream"
        return (None if moves else self._why_sensitive(node)) or self._why_unfit(node, moves)

    def _is_stream(self, node: gs.Node) -> bool:
        """Whether a node adds two computed tensors of one shape, and a normalisation reads the sum."""
        one, other = (tensor.shape for tensor in node.inputs) if node.op == "Add" else (None, None)
        if one is None or one != other or any(map(_is_constant, node.inputs)):
            return False
        return any(reader.op in _NORMALISATIONS for reader in _readers_behind_moves(node.outputs[0]))

    def _sensitive_origin(self, node: gs.Node) -> str | None:
        """The sensitive node that a node is, or is elementwise behind."""
        if node.op in _SENSITIVE or (node.op == "Div" and not _is_constant(node.inputs[1])):
            return label(node)
        if node.op in _ELEMENTWISE:
            return next((self._behind[id(tensor)] for tensor in node.inputs if id(tensor) in self._behind), None)
        return None

    def _why_sensitive(self, node: gs.Node) -> str | None:
        origin = self._sensitive_origin(node)
        if origin == label(node):
            return _SENSITIVE.get(node.op, "divides by a computed value")
        if origin is not None:
            return f"computes with the result of {origin}"
        if node.op in _NORMALISATIONS:
            if any(has_output(node, i) for i in range(1, len(node.outputs))):
                return "hands out its statistics, which are float32"
            if id(node.inputs[0]) in self._wide:
                return f"its input {node.inputs[0].name} is float32"
            if self._is_only_given_out(node.outputs[0]):
                return f"the graph gives out its result {node.outputs[0].name}, in float32"
        return None

    def _is_only_given_out(self, tensor: gs.Tensor) -> bool:
        """Whether all that is made of a tensor is outputs of the graph, moved perhaps."""
        if not tensor.outputs:
            return is_output(self._graph, tensor)
        return all(reader.op in DATA_MOVEMENT and all(map(self._is_only_given_out, reader.outputs)) for reader in tensor.outputs)

    def _why_unfit(self, node: gs.Node, moves: bool) -> str | None:
        for verb, tensors in (("makes", node.outputs), ("reads", [node.inputs[i] for i in float_slots(node)])):
            for tensor in tensors:
                if id(tensor) in self._unfit:
                    return f"{verb} {self._unfit[id(tensor)]}"
        if self._options.precision == "hybrid" and not moves:
            weights = (node.inputs[i] for i in float_slots(node) if _is_constant(node.inputs[i]))
            return next((why for tensor in weights if (why := self._weights.unfit_for_float16(tensor))), None)
        return None


def _settle_moves(graph: gs.Graph, plan: _Plan) -> None:
    """Give the nodes that only move data the type with which they and the Casts around them move the fewest bytes."""
    low = plan.low
    outputs = {id(tensor) for tensor in graph.outputs}

    def cast_bytes(tensor: gs.Tensor) -> int:
        if _is_constant(tensor) or not _is_float32(tensor):
            return 0
        node = producer(tensor)
        made = node is not None and low[id(node)]
        wanted = [_reads_low(reader, tensor, low) for reader in tensor.outputs] + [False] * (id(tensor) in outputs)
        return 0 if all(want == made for want in wanted) else (4 + 2) * _elements(tensor)

    def bytes_around(node: gs.Node) -> int:
        around = {id(tensor): tensor for tensor in (*node.inputs, *node.outputs) if _is_float32(tensor)}
        moved = sum(map(_elements, around.values()))
        return (2 if low[id(node)] else 4) * moved + sum(map(cast_bytes, around.values()))

    for node in plan.moves:  # start from the types of what they read
        operands = [producer(node.inputs[i]) for i in float_slots(node) if not _is_constant(node.inputs[i])]
        low[id(node)] = any(maker is not None and low[id(maker)] for maker in operands)
    settled = False
    while not settled:  # every change saves bytes, so this ends
        settled = True
        for node in (*reversed(plan.moves), *plan.moves):
            before = bytes_around(node)
            low[id(node)] = not low[id(node)]
            if bytes_around(node) < before:
                settled = False
            else:
                low[id(node)] = not low[id(node)]


def _reads_low(reader: gs.Node, tensor: gs.Tensor, low: Mapping[int, bool]) -> bool:
    """Whether a node takes `tensor` in the low type. Nodes of subgraphs, which have no entry, take everything as it was."""
    return low.get(id(reader), False) and any(reader.inputs[i] is tensor for i in float_slots(reader))


def _elements(tensor: gs.Tensor) -> int:
    """A tensor's size, for comparison with others: dynamic dimensions count as if all were alike."""
    factors = [factor.strip() for size in tensor.shape or () for factor in str(size).split("*")]
    return math.prod(int(factor) if factor.isdigit() else _ANY_DIM for factor in factors)


def _write(graph: gs.Graph, plan: _Plan, weights: _Weights) -> None:
    """Give every tensor its producer's type, and every node its operands in its own."""
    edit = Editor(graph)
    types = {False: np.dtype(np.float32), True: weights.low_dtype}
    codes = {False: TensorProto.FLOAT, True: weights.low_type}
    suffix = {False: "float32", True: TensorProto.DataType.Name(weights.low_type).lower()}
    tensors = [tensor for tensor in graph.tensors().values() if _is_float32(tensor)]
    readings = [(tensor, reader, i) for tensor in tensors for reader, i in _readings(tensor) if reader.op not in ("Shape", "Size")]
    wanted = [plan.low.get(id(reader), False) and i in float_slots(reader) for _, reader, i in readings]
    made_low = [(node, i) for node, low in plan.nodes() if low for i, tensor in enumerate(node.outputs) if _is_float32(tensor)]
    versions = {(id(tensor), False): tensor for tensor in tensors}

    for node, i in made_low:
        tensor = node.outputs[i]
        if is_output(graph, tensor):
            low = gs.Variable(edit.fresh(f"{tensor.name}/{suffix[True]}"), dtype=types[True], shape=tensor.shape)
            node.outputs[i] = low
            edit.node("Cast", [low], name=f"{tensor.name}/{suffix[False]}", output=tensor, to=codes[False])
            versions[id(tensor), True] = low
        else:
            tensor.dtype = types[True]
            versions[id(tensor), True] = versions.pop((id(tensor), False))
        if node.op == "Cast":
            node.attrs["to"] = codes[True]

    for (tensor, reader, i), low in zip(readings, wanted, strict=True):
        key = (id(tensor), low)
        if key not in versions:
            name = f"{tensor.name}/{suffix[low]}"
            if _is_constant(tensor):
                versions[key] = weights.low_constant(tensor, edit.fresh(name))
            else:
                versions[key] = edit.node("Cast", [tensor], name=name, dtype=types[low], shape=tensor.shape, to=codes[low])
        reader.inputs[i] = versions[key]


def _readings(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """The readers of a tensor, those in subgraphs included, each with the position of the operand that the tensor is."""
    readers = {id(node): node for node in tensor.outputs}
    return [(node, i) for node in readers.values() for i, operand in enumerate(node.inputs) if operand is tensor]
