from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx
import pytest

from smc.passes.fuse_gelu import FuseGelu
from tests.passes.graphs import Builder, apply, assert_same, count, left_alone, normal

FEED = {"x": 2 * normal(3, 8)}

Spelling = Callable[[Builder, str, str], str]
"""(builder, x, 1 + erf(x / sqrt 2)) -> the result."""


def number(value: float) -> np.ndarray:
    return np.array(value, np.float32)


def model(finish: Spelling, root: float = math.sqrt(2), one: float = 1) -> onnx.ModelProto:
    b = Builder()
    x = b.input("x", ["batch", 8])
    erf = b.op("Erf", b.op("Div", x, number(root)), name="erf")
    b.output(finish(b, x, b.op("Add", erf, number(one), name="plus")))
    return b.model()


SPELLINGS: dict[str, Spelling] = {
    "as torch has it": lambda b, x, y: b.op("Mul", b.op("Mul", x, y), number(0.5)),
    "halved first": lambda b, x, y: b.op("Mul", b.op("Mul", x, number(0.5)), y),
    "halved by a division": lambda b, x, y: b.op("Div", b.op("Mul", y, x), number(2)),
    "the number in between": lambda b, x, y: b.op("Mul", b.op("Mul", number(0.5), y), x),
}


@pytest.mark.parametrize("finish", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_becomes_one_node(finish: Spelling) -> None:
    before = model(finish)
    graph, report = apply(before, FuseGelu())
    assert report.rewrites == 1
    assert count(graph) == {"Gelu": 1}
    assert_same(before, graph, FEED)


def test_the_root_as_a_factor() -> None:
    b = Builder()
    x = b.input("x", ["batch", 8])
    erf = b.op("Erf", b.op("Mul", number(math.sqrt(0.5)), x))
    b.output(b.op("Mul", b.op("Mul", b.op("Add", number(1), erf), x), number(0.5)))
    before = b.model()
    graph, _ = apply(before, FuseGelu())
    assert count(graph) == {"Gelu": 1}
    assert_same(before, graph, FEED)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        (model(SPELLINGS["as torch has it"], root=1.5), "not divided by the root of 2"),
        (model(SPELLINGS["as torch has it"], one=2), "does not add 1"),
        (model(lambda b, x, y: b.op("Mul", x, y)), "is an output of the graph"),
        (model(lambda b, x, y: b.op("Mul", b.op("Mul", y, b.input("z", ["batch", 8])), number(0.5))), "no multiplication with its input"),
        (model(lambda b, x, y: b.op("Mul", b.op("Mul", y, x), x)), "no multiplication with its input"),
        (model(lambda b, x, y: b.op("Relu", b.op("Mul", y, x))), "no multiplication with its input"),
    ],
    ids=["another root", "another number", "not halved", "another factor", "squared", "something else"],
)
def test_near_misses_are_left_alone(changed: onnx.ModelProto, why: str) -> None:
    ((node, reason),) = left_alone(changed, FuseGelu())
    assert node.startswith("erf")
    assert why in reason


def test_what_something_else_reads_is_left_alone() -> None:
    b = Builder()
    x = b.input("x", ["batch", 8])
    plus = b.op("Add", b.op("Erf", b.op("Div", x, number(math.sqrt(2)))), number(1))
    b.output(b.op("Mul", b.op("Mul", x, plus), number(0.5)))
    b.output(b.op("Exp", plus))
    ((_, why),) = left_alone(b.model(), FuseGelu())
    assert "is read by" in why
