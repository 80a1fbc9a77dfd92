"""What decides which nodes stay in float32: ranges of tensors and errors of outputs, measured on sample input."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from smc.compiler.graph_runner import GraphRunner
from smc.passes.hybrid_cast import DATA_MOVEMENT, SUBNORMAL, HybridCast, Precision, TensorRange, matching
from smc.passes.tensors import Editor, producer

Feeds = Mapping[str, NDArray[Any]]
Outputs = dict[str, NDArray[Any]]
Report = Callable[[str], None]

TOLERANCE = 5e-3
"""Relative error of a graph's outputs from which on its nodes are searched for those to blame. Half of what a plan is allowed on any
output: the encoder's error and the decoder's add up."""

DOMINANT = 0.5
"""A part of a graph is to blame if it alone makes this share of the error. Errors of rounding add in squares, so no more than four
parts can; an error that is spread wider than that is not worth the float32 that it would take."""

PARTS = 32
"""Into how many parts a graph is divided at the finest."""

SAMPLING = 127
"""The share of subnormal values is that among every so many-th value. A prime, so that all channels are met."""

RUNS = 24
"""Runs of a graph that the search may take: enough to narrow down about two parts, one after the other. Runs and not seconds, so that every
machine finds the same nodes. On two cores a run of either graph of the public model takes up to 20 seconds."""


def plan_precision(
    graph: gs.Graph,
    precision: Precision,
    feeds: Sequence[Feeds],
    report: Report,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    streams: bool = False,
) -> HybridCast:
    """The pass that gives `graph` its precision, calibrated if that is "hybrid"; the others do not depend on values.

    Args:
        graph: a float32 graph, as it is just before the pass. Stays as it is.
        precision: of the pass.
        feeds: sample input: of every one the ranges are recorded; the outputs' errors are measured on the first.
        report: told what is being done.
        include, exclude: patterns of node names, as for the pass. Those that match nothing in this graph are left out: they may mean
            the other one. Call `check_patterns` with both graphs before.
        streams: whether residual streams stay in float32, as for the pass.

    Raises:
        BackendFailed, OutOfMemory: ONNX Runtime could not run the graph.
    """
    include, exclude = ([pattern for pattern in patterns if matching(pattern, graph)] for patterns in (include, exclude))
    if precision != "hybrid":
        return HybridCast(precision, include=include, exclude=exclude, streams=streams)
    report("recording the ranges of tensors")
    ranges, outputs = _record(graph, feeds)
    report("measuring what low precision does to the outputs")

    def cast(keep: Mapping[str, str]) -> HybridCast:
        # Nodes that the user forces into low precision are not to be blamed on others: the search goes without them.
        return HybridCast(precision, ranges, keep, exclude=exclude, streams=streams)

    keep = find_dominant(graph, cast, feeds[0], outputs[0])
    return HybridCast(precision, ranges, keep, include, exclude, streams)


def _record(graph: gs.Graph, feeds: Sequence[Feeds]) -> tuple[dict[str, TensorRange], list[Outputs]]:
    """Ranges over all of `feeds` of the float32 tensors that the graph takes and computes, but for those that it only moves, and the
    outputs of each. The graph itself reduces the tensors, so that they need not be kept."""
    probed = graph.copy()
    network = list(probed.nodes)
    edit = Editor(probed)
    statistics, added = {}, []
    for tensor in list(probed.tensors().values()):
        node = producer(tensor)
        if isinstance(tensor, gs.Constant) or tensor.dtype != np.float32 or (node is not None and node.op in {"Constant", *DATA_MOVEMENT}):
            continue
        first = len(probed.nodes)
        statistics[tensor.name] = _add_statistics(edit, tensor)
        added.append(list(probed.nodes[first:]))
    # ONNX Runtime walks backwards from the ends of a graph, the last one first. In this order the walk comes to a tensor's statistics
    # before it goes on, and the tensor is freed; otherwise all tensors would wait for the network's end.
    probed.nodes = [*network, *(node for nodes in reversed(added) for node in nodes)]
    names = [output.name for output in probed.outputs]
    probed.outputs = [*probed.outputs, *(made for outputs in statistics.values() for made in outputs)]
    runner = GraphRunner(probed)
    runs = [runner.run(feed) for feed in feeds]
    ranges = {name: _range([[run[made.name] for made in outputs] for run in runs]) for name, outputs in statistics.items()}
    return ranges, [{name: run[name] for name in names} for run in runs]


def _add_statistics(edit: Editor, tensor: gs.Tensor) -> list[gs.Tensor]:
    """Maximum, minimum and mean, which are scalars, and a sample of the values, of one axis."""

    def node(op: str, *operands: gs.Tensor, shape: Sequence[Any], **attrs: object) -> gs.Tensor:
        return edit.node(op, list(operands), name=f"{tensor.name}/{op}", dtype=np.dtype(np.float32), shape=list(shape), **attrs)

    flat = node("Reshape", tensor, edit.integers([-1], "flat"), shape=[None])
    first, last, step = (edit.integers([i], name) for i, name in ((0, "first"), (2**62, "last"), (SAMPLING, "sampling")))
    sample = node("Slice", flat, first, last, first, step, shape=[None])
    return [*(node(op, tensor, shape=(), keepdims=0) for op in ("ReduceMax", "ReduceMin", "ReduceMean")), sample]


def _range(runs: Sequence[Sequence[NDArray[np.float32]]]) -> TensorRange:
    amax = subnormal = 0.0
    finite = True
    for highest, lowest, mean, sample in runs:
        finite &= bool(np.isfinite(mean))  # a maximum may pass over a NaN, the mean does not
        amax = max(amax, abs(float(highest)), abs(float(lowest)))
        magnitude = np.abs(sample[sample != 0])
        if magnitude.size:
            subnormal = max(subnormal, float(np.mean(magnitude < SUBNORMAL)))
    return TensorRange(amax, subnormal, finite)


def find_dominant(
    graph: gs.Graph,
    cast: Callable[[Mapping[str, str]], HybridCast],
    feed: Feeds,
    reference: Outputs,
    *,
    tolerance: float = TOLERANCE,
    runs: int = RUNS,
) -> dict[str, str]:
    """The nodes whose low precision makes most of the error of the outputs, each with the reason to keep it in float32.

    Where everything in low precision errs by no more than `tolerance`, there are none; that costs one run. Otherwise the nodes, in
    topological order, are halved again and again: each half is run in low precision with all others in float32, and a half that does
    not make the larger part of the error is dropped. What cannot be narrowed down with the runs that are left is kept as it is.

    Args:
        graph: a float32 graph. Stays as it is.
        cast: the pass that also keeps the nodes it is given in float32.
        feed: sample input.
        reference: what the float32 graph makes of it.
        tolerance: relative error that each output may have.
        runs: how often the graph may be run. Fewer than three find nothing.
    """

    def errors(keep: Mapping[str, str]) -> tuple[dict[str, float], list[str]]:
        nonlocal runs
        runs -= 1
        typed = graph.copy()
        low = cast(keep)(typed).low
        found = GraphRunner(typed).run(feed)
        return {name: relative_error(reference[name], found[name]) for name in reference}, low

    kept: dict[str, str] = {}
    while runs >= 3:  # one of everything and one of either half: fewer would keep everything
        total, nodes = errors(kept)
        worst = max(total, key=lambda name: total[name])
        if total[worst] <= tolerance:
            break
        found: dict[str, str] = {}
        finest = max(1, len(nodes) // PARTS)
        parts = [nodes]
        while parts:
            part = parts.pop()
            others = dict.fromkeys(set(nodes) - set(part), "")
            error = errors(kept | others)[0][worst] if len(part) < len(nodes) else total[worst]
            if error < DOMINANT * total[worst]:
                continue
            if len(part) > finest and runs >= len(parts) + 2:  # one for each part that waits, and for either half
                middle = len(part) // 2
                parts += [part[:middle], part[middle:]]
            else:
                found |= dict.fromkeys(part, f"with {len(part) - 1} others moves {worst} by {error:.1e} of {total[worst]:.1e} in all")
        if not found:
            break
        kept |= found
    return kept


def relative_error(wanted: NDArray[Any], found: NDArray[Any]) -> float:
    """||found - wanted|| / ||wanted||; infinite if `found` is not finite."""
    if not np.isfinite(found).all():
        return math.inf
    size = float(np.linalg.norm(wanted.astype(np.float64)))
    return float(np.linalg.norm(found.astype(np.float64) - wanted)) / max(size, 1e-30)
