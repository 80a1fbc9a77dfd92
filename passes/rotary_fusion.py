"""RotaryFusion: RoPE at the inputs of `Attention`, however it is spelled, becomes `RotaryEmbedding`."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from smc.passes.base import Declined, Pass, PassReport, Refusal, label
from smc.passes.channels import LINEAR, Channel, Columns, Factor, LinearTrace
from smc.passes.tensors import (
    Dim,
    Editor,
    constant_value,
    dims,
    has_input,
    has_output,
    input_dims,
    may_differ,
    producer,
    rank,
    sole_reader,
    static_dim,
    transposition,
    unscaled,
)

_ROTATED_TYPES = (np.dtype(np.float32), np.dtype(np.float16), onnx.TensorProto.BFLOAT16)
_JOINS = frozenset({"Add", "Concat", "Mul", "Sub"})
_REARRANGES = frozenset({"Cast", "Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class _Pair:
    """Two channels that turn together: out[minus] = x[first] cos - x[second] sin, out[plus] = x[second] cos + x[first] sin."""

    minus: int
    plus: int
    first: int
    second: int
    cos: Factor
    sin: Factor


@dataclass(frozen=True)
class _Rotation:
    """A rotated tensor, `output`: `magnitude` times the rotation of x by pairs, ordered by `minus`.

    `heads_axis` is the axis, from the end, of the heads in x, None where x is (batch, N, head_dim).
    """

    x: gs.Tensor
    output: gs.Tensor
    pairs: list[_Pair]
    magnitude: float
    tables: dict[str, gs.Tensor]
    heads_axis: int | None

    @property
    def order(self) -> list[int]:
        """The channels of `output`, those with the minus first, so that partners are half the channels apart."""
        return [pair.minus for pair in self.pairs] + [pair.plus for pair in self.pairs]


class RotaryFusion(Pass):
    """RoPE of q and k of an `Attention` becomes two `RotaryEmbedding` (opset 23, interleaved=0).

    Before: out[j] = x[j] * C_j + s_j * x[p(j)] * S_j for every channel j of q and of k, spelled in any way with Concat, Split,
    Slice, Gather, Neg, Mul, Div, Add and Sub; p pairs the channels, s_j = -s_p(j), and C and S are the same for both partners,
    which is proved by following the tables' channels. Rotating two halves of a head separately, as RoPE2D does, is such a form.
    After: out = RotaryEmbedding(Gather(x, permutation), cos, sin), where the permutation brings partners head_dim/2 apart, the one
    with s = -1 first, and cos and sin are (batch, N, head_dim/2), each table made once for all layers.

    The channels of q and of k come out in the same new order, which leaves their product as it was; where the orders would
    differ the attention is left alone. The Gather disappears where it is the identity; `FoldPermutation` moves others into
    weights. x may be (B, heads, N, head_dim), (B, N, heads, head_dim) or (B, N, head_dim), with transposes, reshapes and casts
    that keep the last axis between the rotation and the attention.

    Attentions whose q and k have nothing like a rotation near them are declined together, in one line.
    """

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        edit, columns = Editor(graph), Columns()
        tables = _Tables(edit, columns)
        unrotated: list[gs.Node] = []
        for attention in [node for node in graph.nodes if node.op == "Attention"]:
            if not any(_is_multiplied(operand) for operand in attention.inputs[:2]):
                unrotated.append(attention)
                continue
            with report.attempt(attention):
                q, k = self._match(graph, attention, columns)
                # All tables are made before anything changes, because that may refuse.
                cos_sin = [tables.cos_and_sin(rotation) for rotation in (q, k)]
                for name, rotation, (cos, sin) in zip("qk", (q, k), cos_sin, strict=True):
                    _rotate(edit, rotation, cos, sin, f"{label(attention)}/{name}")
                if q.magnitude * k.magnitude != 1.0:
                    scale = attention.attrs.get("scale", len(q.order) ** -0.5)
                    attention.attrs["scale"] = scale * q.magnitude * k.magnitude
                report.rewrites += 2
        if unrotated:
            others = f", nor those of {len(unrotated) - 1} more attentions" if len(unrotated) > 1 else ""
            why = f"nothing multiplies its q or k by a table, as a rotation would{others}"
            report.declined.append(Declined(label(unrotated[0]), why))

    def _match(self, graph: gs.Graph, attention: gs.Node, columns: Columns) -> tuple[_Rotation, _Rotation]:
        if any(rank(tensor) != 4 for tensor in attention.inputs[:2]):
            raise Refusal("q and k are not (batch, heads, N, head_dim)")
        if has_input(attention, 4) or has_output(attention, 1):
            raise Refusal("it keeps a cache of keys, whose channels others see")
        q = _find_rotation(graph, attention.inputs[0], columns, "q")
        k = _find_rotation(graph, attention.inputs[1], columns, "k")
        if q.order != k.order:
            raise Refusal("q and k are rotated in different pairs of channels")
        return q, k


def _is_multiplied(operand: gs.Tensor) -> bool:
    """Whether there is a product by more than one number, which no rotation is without, between an operand and its projection."""
    seen, queue = {operand.name}, [operand]
    for tensor in queue:  # grows while it is read
        node = producer(tensor)
        if node is None or node.op not in LINEAR | _REARRANGES:
            continue
        if node.op == "Mul" and unscaled(node) is None:
            return True
        for data in node.inputs if node.op in _JOINS else node.inputs[:1]:  # the others are indices, bounds and shapes
            if data.name not in seen:
                seen.add(data.name)
                queue.append(data)
    return False


def _find_rotation(graph: gs.Graph, operand: gs.Tensor, columns: Columns, name: str) -> _Rotation:
    """The rotation at an operand of an attention, or above it behind nodes that keep its channels."""
    carried = [operand]
    while (node := producer(carried[-1])) is not None and _carries_channels(node):
        carried.append(node.inputs[0])
    try:
        rotation = _match_rotation(graph, carried[-1], columns)
        for tensor in carried:
            sole_reader(graph, tensor)  # another would see the channels in their new order
    except Refusal as why:
        raise Refusal(f"{name} is left as it is: {why}") from None
    return rotation


def _carries_channels(node: gs.Node) -> bool:
    """Whether a node leaves the last axis of its first input as it is."""
    before, after = dims(node.inputs[0]) if node.inputs else None, dims(node.outputs[0])
    if not before or not after or not isinstance(before[-1], int) or before[-1] != after[-1]:
        return False
    if node.op == "Transpose":
        perm = transposition(node)
        return perm is not None and perm[-1] == len(perm) - 1
    if node.op in ("Unsqueeze", "Squeeze"):
        axes = constant_value(node.inputs[1]) if has_input(node, 1) else None
        longer = max(len(before), len(after))
        return axes is not None and all(axis % longer != longer - 1 for axis in axes.tolist())
    return node.op in ("Reshape", "Cast", "Identity")


def _match_rotation(graph: gs.Graph, output: gs.Tensor, columns: Columns) -> _Rotation:
    """`output` as the rotation of the nearest tensor that it is a rotation of."""
    node, width = producer(output), static_dim(output, -1)
    if node is None or node.op not in LINEAR or len(node.outputs) != 1:
        raise Refusal(f"{output.name} is made by {'nothing in the graph' if node is None else f'{label(node)} ({node.op})'}")
    if width is None or width % 2:
        raise Refusal(f"{output.name} has {width or 'an unknown number of'} channels")
    untraced: Refusal | None = None
    unlike: Refusal | None = None  # of an x that all channels are sums of, which says more
    for x in _candidates(output, width):
        trace = LinearTrace(x, width, columns)
        try:
            channels = trace.channels(output)
        except Refusal as why:
            untraced = untraced or why
            continue
        if channels is None or len(channels) != width:
            continue
        try:
            pairs, magnitude = _pairs(channels, trace.factors, columns)
            tables = {factor[0]: trace.factors[factor[0]] for pair in pairs for factor in (pair.cos, pair.sin)}
            return _Rotation(x, output, pairs, magnitude, tables, _heads_axis(graph, x, output, list(tables.values())))
        except Refusal as why:
            unlike = unlike or why
    raise unlike or untraced or Refusal(f"{output.name} does not depend on a tensor of {width} channels by products and sums")


def _candidates(output: gs.Tensor, width: int) -> list[gs.Tensor]:
    """Tensors of `width` channels that `output` is computed from by operations in LINEAR, nearest first."""
    seen, queue = {output.name}, [output]
    for tensor in queue:  # grows while it is read
        node = producer(tensor)
        if node is not None and node.op in LINEAR:
            for operand in node.inputs:
                if not operand.is_empty() and operand.name not in seen:
                    seen.add(operand.name)
                    queue.append(operand)
    return [
        tensor
        for tensor in queue[1:]
        if isinstance(tensor, gs.Variable) and rank(tensor) == rank(output) and static_dim(tensor, -1) == width
    ]


def _pairs(channels: list[Channel], factors: dict[str, gs.Tensor], columns: Columns) -> tuple[list[_Pair], float]:
    """The partners among channels, and the common magnitude. Raises Refusal where the channels are not a rotation."""
    partners: dict[frozenset[int], list[int]] = defaultdict(list)
    for j, channel in enumerate(channels):
        indices = frozenset(i for i, factor in channel if factor is not None)
        if len(channel) != 2 or len(indices) != 2:
            raise Refusal(f"channel {j} is not the sum of two channels, each times a table")
        partners[indices].append(j)
    if any(len(outputs) != 2 for outputs in partners.values()) or len(frozenset().union(*partners)) != len(channels):
        raise Refusal("the channels do not form pairs")
    magnitudes = {abs(coefficient) for channel in channels for coefficient in channel.values()}
    if len(magnitudes) != 1:
        raise Refusal(f"the channels are scaled differently, by {sorted(magnitudes)}")
    pairs = [_pair(outputs, channels, factors, columns) for outputs in partners.values()]
    return sorted(pairs, key=lambda pair: pair.minus), magnitudes.pop()


def _pair(outputs: list[int], channels: list[Channel], factors: dict[str, gs.Tensor], columns: Columns) -> _Pair:
    j, partner = outputs
    terms = []  # of j, then of its partner: channel of x -> (factor, sign of the coefficient, sign and number of the product)
    for index in outputs:
        found = {}
        for (i, factor), coefficient in channels[index].items():
            assert factor is not None
            sign, number = (columns.of(factors[factor[0]]) or [])[factor[1]]
            found[i] = (factor, coefficient > 0, sign if coefficient > 0 else -sign, number)
        terms.append(found)
    a, b = terms[0]
    if (terms[0][a][3], terms[0][b][3]) != (terms[1][b][3], terms[1][a][3]):
        raise Refusal(f"the tables of channels {j} and {partner} are not known to be equal")
    same_sign = [terms[0][i][2] == terms[1][other][2] for i, other in ((a, b), (b, a))]
    if same_sign not in ([True, False], [False, True]):
        raise Refusal(f"the signs of channels {j} and {partner} do not make a rotation")
    own, other = (a, b) if same_sign[0] else (b, a)  # out[j] = x[own] cos +- x[other] sin
    cos = next((factor for factor, positive, *_ in (terms[0][own], terms[1][other]) if positive), None)
    if cos is None:
        raise Refusal(f"channels {j} and {partner} are rotated and negated")
    # The table serves as it is: where its sign as written leaves a choice, j has the minus, which tends to be the order already.
    (sin, positive), (partners_sin, partner_positive) = terms[0][other][:2], terms[1][own][:2]
    if positive and not partner_positive:
        return _Pair(minus=partner, plus=j, first=other, second=own, cos=cos, sin=sin)
    return _Pair(minus=j, plus=partner, first=own, second=other, cos=cos, sin=partners_sin if positive else sin)


def _heads_axis(graph: gs.Graph, x: gs.Tensor, output: gs.Tensor, tables: list[gs.Tensor]) -> int | None:
    """Where the heads are in x: on the axis along which every table is the same."""
    if x.dtype not in _ROTATED_TYPES or any(table.dtype != x.dtype for table in tables):
        raise Refusal(f"{x.name} and its tables are not of one type among float32, float16 and bfloat16")
    size = len(x.shape)
    if size not in (3, 4) or any(not 2 <= len(dims(table) or []) <= size for table in tables):
        raise Refusal(f"{x.name} or a table has a rank that RotaryEmbedding does not take")
    if size == 3:
        heads_axis, positions_axis = None, -2
    elif all(static_dim(table, -3) == 1 for table in tables):
        heads_axis, positions_axis = -3, -2
    elif all(static_dim(table, -2) == 1 for table in tables):
        heads_axis, positions_axis = -2, -3
    else:
        raise Refusal("the tables differ from head to head")
    named = input_dims(graph)
    before, after = dims(x) or [], dims(output) or []
    if any(may_differ(a, b, named) for a, b in zip(before, after, strict=True)):
        raise Refusal(f"{x.name} is broadcast against its tables")
    for table in tables:
        shape = dims(table) or []
        shape = [*[1] * (size - len(shape)), *shape]
        if may_differ(shape[positions_axis], before[positions_axis], named):
            raise Refusal(f"{table.name} has {shape[positions_axis]} positions and {x.name} has {before[positions_axis]}")
        if shape[0] != 1 and may_differ(shape[0], before[0], named):
            raise Refusal(f"{table.name} has a batch of {shape[0]} and {x.name} has one of {before[0]}")
    return heads_axis


def _rotate(edit: Editor, rotation: _Rotation, cos: gs.Tensor, sin: gs.Tensor, name: str) -> None:
    """Make `rotation.output` with a RotaryEmbedding of x, transposed or given an axis where x has no heads axis in second place."""
    x, output = rotation.x, rotation.output
    inputs = [pair.first for pair in rotation.pairs] + [pair.second for pair in rotation.pairs]
    if inputs != sorted(inputs):
        indices = edit.integers(inputs, "rotary_order")
        x = edit.node("Gather", [x, indices], name=f"{name}/permutation", dtype=x.dtype, shape=dims(x), axis=-1)
    attrs = {"name": f"{name}/rotary", "dtype": x.dtype, "interleaved": 0}
    # Where the next node undoes what the rotation would have to do to come back to x's axes, it takes the next node's place.
    reader = output.outputs[0]
    if rotation.heads_axis == -3:
        edit.node("RotaryEmbedding", [x, cos, sin], output=output, **attrs)
    elif rotation.heads_axis == -2:
        swap = [0, 2, 1, 3]
        x = edit.transpose(x, swap, name=f"{name}/heads_first")
        if reader.op == "Transpose" and transposition(reader) == swap:
            edit.node("RotaryEmbedding", [x, cos, sin], output=reader.outputs[0], **attrs)
        else:
            turned = edit.node("RotaryEmbedding", [x, cos, sin], shape=dims(x), **attrs)
            edit.transpose(turned, swap, name=f"{name}/heads_third", output=output)
    else:
        x = edit.unsqueeze(x, 1, name=f"{name}/heads")
        axes = constant_value(reader.inputs[1]) if reader.op == "Unsqueeze" else None
        if axes is not None and axes.tolist() == [1]:
            edit.node("RotaryEmbedding", [x, cos, sin], output=reader.outputs[0], **attrs)
        else:
            turned = edit.node("RotaryEmbedding", [x, cos, sin], shape=dims(x), **attrs)
            edit.squeeze(turned, 1, name=f"{name}/no_heads", output=output)


class _Tables:
    """cos and sin tables as RotaryEmbedding takes them, (batch, N, head_dim/2), each made once."""

    def __init__(self, edit: Editor, columns: Columns) -> None:
        self._edit = edit
        self._columns = columns
        self._input_dims = input_dims(edit.graph)
        self._made: dict[tuple[object, ...], gs.Tensor] = {}
        self._batches: dict[Dim, gs.Tensor] = {}

    def cos_and_sin(self, rotation: _Rotation) -> tuple[gs.Tensor, gs.Tensor]:
        cos = self._table(rotation, [pair.cos for pair in rotation.pairs])
        return cos, self._table(rotation, [pair.sin for pair in rotation.pairs])

    def _table(self, rotation: _Rotation, factors: list[Factor]) -> gs.Tensor:
        # Known by what is in it, so that tables that an exporter spelled out again for every layer are one.
        values = tuple((self._columns.of(rotation.tables[name]) or [])[channel] for name, channel in factors)
        positions = (dims(rotation.x) or [])[-3 if rotation.heads_axis == -2 else -2]
        key = (values, positions, rotation.heads_axis)
        if key not in self._made:
            table = self._without_heads(self._chosen(rotation, factors), rotation.heads_axis)
            self._made[key] = table
        return self._batched(self._made[key], key, rotation.x)

    def _chosen(self, rotation: _Rotation, factors: list[Factor]) -> gs.Tensor:
        """The channels `factors`, side by side."""
        sources = [rotation.tables[name] for name in dict.fromkeys(name for name, _ in factors)]
        starts, width = {}, 0
        for source in sources:
            starts[source.name] = width
            width += len(self._columns.of(source) or [])
        table, lead = sources[0], (dims(sources[0]) or [])[:-1]
        for source in sources[1:]:
            other = (dims(source) or [])[:-1]
            if len(other) != len(lead) or any(may_differ(a, b, self._input_dims) for a, b in zip(lead, other, strict=True)):
                raise Refusal(f"the tables {table.name} and {source.name} have different shapes")
        if len(sources) > 1:
            table = self._edit.node("Concat", sources, name=f"{table.name}/joined", dtype=table.dtype, shape=[*lead, width], axis=-1)
        indices = [starts[name] + channel for name, channel in factors]
        if indices == list(range(width)):
            return table
        operands = [table, self._edit.integers(indices, "rotary_channels")]
        return self._edit.node("Gather", operands, name=f"{table.name}/half", dtype=table.dtype, shape=[*lead, len(indices)], axis=-1)

    def _without_heads(self, table: gs.Tensor, heads_axis: int | None) -> gs.Tensor:
        """(1 or batch, N, head_dim/2): the axis of the heads, if there, has size one and is the one to go."""
        size = len(table.shape)
        if heads_axis is not None and size >= -heads_axis and (size, heads_axis) != (3, -3):  # there it serves as the batch
            table = self._edit.squeeze(table, size + heads_axis, name=f"{table.name}/all_heads")
        return table if rank(table) == 3 else self._edit.unsqueeze(table, 0, name=f"{table.name}/batch")

    def _batched(self, table: gs.Tensor, key: tuple[object, ...], x: gs.Tensor) -> gs.Tensor:
        """`table` repeated for the batch of x: RotaryEmbedding does not broadcast."""
        batch, own = (dims(x) or [None])[0], (dims(table) or [None])[0]
        if batch is not None and batch == own:
            return table
        key = (*key, batch if batch is not None else x.name)
        if key not in self._made:
            shape = [batch, *(dims(table) or [])[1:]]
            operands = [table, self._batch_shape(x, batch)]
            self._made[key] = self._edit.node("Expand", operands, name=f"{table.name}/batched", dtype=table.dtype, shape=shape)
        return self._made[key]

    def _batch_shape(self, x: gs.Tensor, batch: Dim) -> gs.Tensor:
        """The shape (batch, 1, 1), from an input of the graph where one has that dimension, so that no layer has to run first."""
        if isinstance(batch, int):
            return self._edit.integers([batch, 1, 1], "batch_shape")
        known = batch or x.name
        if known not in self._batches:
            inputs = [tensor for tensor in self._edit.graph.inputs if batch and batch in (dims(tensor) or [])]
            source, axis = (inputs[0], list(inputs[0].shape).index(batch)) if inputs else (x, 0)
            size = self._edit.node("Shape", [source], name="rotary_batch", dtype=np.dtype(np.int64), shape=[1], start=axis, end=axis + 1)
            operands = [size, self._edit.integers([1, 1], "ones")]
            self._batches[known] = self._edit.node("Concat", operands, name="rotary_batch_shape", dtype=size.dtype, shape=[3], axis=0)
        return self._batches[known]
