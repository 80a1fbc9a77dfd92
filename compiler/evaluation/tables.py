"""Summaries and comparisons as tables for the terminal. Fractions are in percent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from smc.compiler.evaluation.summary import Comparison, Summary


def summary_tables(summaries: Sequence[Summary]) -> Iterator[Table]:
    """A table for each data set: its figures, then times."""
    for summary in summaries:
        failed = f", {summary.failed} without an estimate" if summary.failed else ""
        table = _table(f"{summary.kind}: {_pairs(summary.pairs)}{failed}, {summary.scale}", "", "")
        for name, value in summary.figures.items():
            spread = f" ± {100 * summary.spread[name]:.2f} between draws" if name in summary.spread else ""
            table.add_row(name, _value(name, value) + spread)
        unit = "°" if summary.task == "pose" else " px"
        table.add_row("median error", "none" if summary.median_error is None else f"{summary.median_error:.3g}{unit}")
        for stage, seconds in summary.seconds.items():
            table.add_row(f"{stage}, median", f"{1000 * seconds:,.1f} ms")
        yield table


def comparison_tables(comparisons: Sequence[Comparison]) -> Iterator[Table]:
    """A table for each data set: figures of either run, and their difference with its interval."""
    for comparison in comparisons:
        left_out = comparison.only_first + comparison.only_second
        note = f"; {left_out} that only one run has are left out" if left_out else ""
        title = f"{comparison.kind}: {_pairs(comparison.pairs)} in both{note}; 95 % intervals by a paired bootstrap"
        table = _table(title, "", "first", "second", "difference", "interval")
        for name, found in comparison.figures.items():
            digits = 1 if name == "matches" else 2
            factor = 1 if name == "matches" else 100
            low, high = (f"{factor * value:+.{digits}f}" for value in (found.low, found.high))
            table.add_row(
                name,
                _value(name, found.first),
                _value(name, found.second),
                f"{factor * found.difference:+.{digits}f}",
                f"{low} to {high}",
            )
        yield table


def _pairs(count: int) -> str:
    return f"{count} pair{'s' if count != 1 else ''}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _value(name: str, value: float) -> str:
    return f"{value:.1f}" if name == "matches" else f"{100 * value:.2f} %"
