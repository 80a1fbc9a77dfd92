"""Which part of its stage a call is for: the decoders or the heads, so that a plan's time can be told apart by them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from smc.compiler.lowering.context import Call, sources
from smc.compiler.lowering.views import Buffer, View

DECODERS, HEADS = "decoders", "heads"

POINTS = ("pts3d1", "pts3d2", "conf1", "conf2")
DESCRIPTORS = ("desc1", "desc2", "desc_conf1", "desc_conf2")
"""The decoder's outputs of either kind of heads."""


def parts(calls: Sequence[Call], outputs: Mapping[str, View]) -> list[str]:
    """For each call its part, or "" in a stage without both kinds of heads, such as the encoder.

    What points and descriptors both come from is the decoders'; what but one of them comes from is that head's. Names of nodes do not
    say it: exporters give them.
    """
    kinds = (POINTS, DESCRIPTORS)
    if any(outputs.keys().isdisjoint(kind) for kind in kinds):
        return [""] * len(calls)
    serve_both = sources(calls, _buffers(outputs, POINTS)) & sources(calls, _buffers(outputs, DESCRIPTORS))
    return [DECODERS if number in serve_both else HEADS for number in range(len(calls))]


def _buffers(outputs: Mapping[str, View], names: Iterable[str]) -> set[Buffer]:
    return {outputs[name].buffer for name in names if name in outputs}
