"""What every pass is, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_graphsurgeon as gs


class GraphRefused(ValueError):
    """A model that the passes cannot work on; the message says why."""


class Refusal(Exception):
    """Raised inside a pass at a place that it leaves alone; the message says why and names the node in the way."""


@dataclass(frozen=True)
class Declined:
    """A place where a pass had something to look at and left it alone: the node's name and the reason."""

    node: str
    why: str


@dataclass
class PassReport:
    """What one pass did.

    Attributes:
        name: the pass.
        rewrites: how many places it changed.
        declined: what it left alone, and why.
        nodes_before, nodes_after: size of the graph.
    """

    name: str
    rewrites: int = 0
    declined: list[Declined] = field(default_factory=list)
    nodes_before: int = 0
    nodes_after: int = 0

    @contextmanager
    def attempt(self, node: gs.Node) -> Iterator[None]:
        """Note a Refusal raised inside as declined at `node`."""
        try:
            yield
        except Refusal as why:
            self.declined.append(Declined(label(node), str(why)))


R = TypeVar("R", bound=PassReport)


class Pass(ABC):
    """One transformation of a graph that leaves its function unchanged."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        """Change `graph` in place and fill `report`. Nodes that nothing reads any more may be left: they are removed after."""

    def __call__(self, graph: gs.Graph) -> PassReport:
        return self._apply(graph, PassReport(self.name))

    def _apply(self, graph: gs.Graph, report: R) -> R:
        """Rewrite `graph` and fill `report`, of the pass's own kind of report."""
        report.nodes_before = len(graph.nodes)
        self.rewrite(graph, report)
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        report.nodes_after = len(graph.nodes)
        return report


def label(node: gs.Node) -> str:
    """What messages call a node: its name or, where the exporter gave none, its operation and what it makes."""
    return node.name or f"{node.op} that makes {node.outputs[0].name}"
