from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from smc.passes.base import Declined, Pass, PassReport, Refusal
from smc.passes.prepare import prepare
from tests.passes.graphs import Builder, count


class DropNegations(Pass):
    """Neg(Neg(x)) -> x, as a small pass to run."""

    def rewrite(self, graph: gs.Graph, report: PassReport) -> None:
        for node in [node for node in graph.nodes if node.op == "Neg"]:
            with report.attempt(node):
                if not node.inputs[0].inputs or node.i(0).op != "Neg":
                    raise Refusal("there is no other before it")
                for reader in list(node.outputs[0].outputs):
                    reader.inputs[0] = node.i(0).inputs[0]
                report.rewrites += 1


def graph() -> gs.Graph:
    b = Builder()
    b.output(b.op("Relu", b.op("Neg", b.op("Neg", b.input("x", [2]), name="first"))))
    return prepare(b.model())


def test_reports_rewrites_reasons_and_sizes() -> None:
    changed = graph()
    report = DropNegations()(changed)
    assert report == PassReport("DropNegations", 1, [Declined("first", "there is no other before it")], nodes_before=3, nodes_after=1)
    assert count(changed) == {"Relu": 1}


def test_other_errors_are_not_swallowed() -> None:
    report = PassReport("test")
    node = gs.Node("Relu", "relu", outputs=[gs.Variable("y", dtype=np.dtype(np.float32))])
    try:
        with report.attempt(node):
            raise KeyError("a bug")
    except KeyError:
        pass
    else:
        raise AssertionError("swallowed")
    assert report.declined == []
