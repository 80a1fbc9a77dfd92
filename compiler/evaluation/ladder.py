"""The paper's techniques, added one by one: every rung's results, how they differ from strict float32's, and a report of them.

`benchmarks/accuracy.py` runs the rungs. Speedy MASt3R, section 4.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from smc.compiler.bench.ablation import Step, steps
from smc.compiler.bench.variants import REFERENCE
from smc.compiler.evaluation.metrics import columns_of
from smc.compiler.evaluation.pairs import Floats, Task
from smc.compiler.evaluation.records import Config, PairResult
from smc.compiler.evaluation.results import read_results
from smc.compiler.evaluation.summary import Difference, Summary, summarise
from smc.compiler.output_files import replacing

STEPS = (*steps("fp32", "hybrid"), Step("all float16, for contrast", "fp16", "own"), Step("SIFT", "sift", "own"))
"""A contestant is a variant of the torch model, the precision of a bundle, or SIFT."""

AGAIN = "strict float32, other draws"

FIGURES: dict[Task, tuple[str, ...]] = {
    "pose": ("AUC@5°", "AUC@10°", "AUC@20°", "mean AUC", "precision@3 px", "matches"),
    "homography": ("AUC@3 px", "AUC@5 px", "AUC@10 px", "precision@3 px", "matches"),
}
"""What the tables show, as far as a data set's truth gives it: poses alone, without each pixel's place, give no precision in pixels."""

Key = tuple[str, str]
"""A data set's kind, and a technique or `AGAIN`."""

Differences = Mapping[Key, Mapping[str, Difference]]
"""From the reference, by name of the figure."""


@dataclass
class Rung:
    """A step with its results.

    Attributes:
        step: the technique.
        config: of its evaluation; None before there are results.
        rows: lines by data set.
        failure: why there are no results, or not all of them; "" where all is well.
    """

    step: Step
    config: Config | None = None
    rows: dict[str, list[PairResult]] = field(default_factory=dict)
    failure: str = ""

    @property
    def is_reference(self) -> bool:
        return self.step.contestant == REFERENCE

    def add(self, path: Path) -> None:
        """Add a file of results; the first one names every data set. Raises InputMissing, BadInput."""
        header, rows = read_results(path)
        self.config = self.config or header.config
        for (kind, _), row in rows.items():
            self.rows.setdefault(kind, []).append(row)

    def lines(self, kind: str, draws: slice = slice(None)) -> list[PairResult]:
        """A data set's lines by name of the pair, with some of their draws."""
        rows = sorted(self.rows[kind], key=lambda row: row.name)
        return [msgspec.structs.replace(row, estimates=row.estimates[draws]) for row in rows]


def comparisons(rungs: Sequence[Rung], draws: int) -> dict[Key, tuple[Task, dict[str, Floats], dict[str, Floats]]]:
    """What is compared, as arguments of `paired_differences`: every rung with the reference, by their first draws.

    The reference has twice as many draws. How its others differ from its first, `AGAIN`, is the estimator's luck, which is in every other
    difference too. Rungs that failed are left out; where the reference did, there is nothing.
    """
    done = [rung for rung in rungs if not rung.failure]
    reference = next((rung for rung in done if rung.is_reference), None)
    if reference is None or reference.config is None:
        return {}
    first, others = slice(draws), slice(draws, None)
    found = {}
    for data in reference.config.data:
        base = columns_of(reference.lines(data.kind, first))
        found[data.kind, AGAIN] = data.task, base, columns_of(reference.lines(data.kind, others))
        for rung in done:
            if rung is not reference:
                found[data.kind, rung.step.technique] = data.task, base, columns_of(rung.lines(data.kind, first))
    return found


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is written of the ladder.

    Attributes:
        rungs: all of them, those that failed too.
        draws: that figures are means over.
        differences: those of `comparisons`.
        model: "source" and "sha256" of the weights, "device" of the original.
        created: the date.
        command: that made it.
        machine, versions: see `smc.compiler.bench.machine`.
    """

    rungs: Sequence[Rung]
    draws: int
    differences: Differences
    model: Mapping[str, Any]
    created: str
    command: Sequence[str]
    machine: Mapping[str, str]
    versions: Mapping[str, str]

    def write(self, out: Path) -> None:
        """Write OUT.md and OUT.json. Raises CannotWrite, DiskError."""
        for ending, text in ((".json", json.dumps(self.to_json(), separators=(",", ":")) + "\n"), (".md", self.markdown())):
            with replacing(out.with_name(out.name + ending)) as temporary:
                temporary.write_text(text)

    def to_json(self) -> dict[str, Any]:
        """Every pair's results, and what they come to."""
        config = self._config()
        shared = {} if config is None else {name: value for name, value in msgspec.to_builtins(config).items() if name != "matcher"}
        done = self._done()
        return {
            "created": self.created,
            "command": list(self.command),
            "machine": self.machine,
            "versions": self.versions,
            "model": self.model,
            "config": shared,
            "pairs": {kind: [row.name for row in rung.lines(kind)] for rung in done[:1] for kind in rung.rows},
            "rungs": [
                {
                    "technique": rung.step.technique,
                    "contestant": rung.step.contestant,
                    "matching": rung.step.matching,
                    "failure": rung.failure,
                    "matcher": rung.config.matcher if rung.config else None,
                    "summaries": {} if rung.failure else msgspec.to_builtins(self._summaries(rung)),
                    "differences": self._differences_of(rung.step.technique),
                    "results": {} if rung.failure else {kind: _columns(rung.lines(kind)) for kind in rung.rows},
                }
                for rung in self.rungs
            ],
            AGAIN: self._differences_of(AGAIN),
        }

    def markdown(self) -> str:
        """The tables, and why a rung is in none."""
        config, model = self._config(), self.model
        lines = [
            "# Accuracy, technique by technique",
            "",
            f"{self.created}, {self.machine.get('gpu', self.machine.get('processor'))}, torch {self.versions.get('torch')}; "
            f"model {model['source']}, sha256 {str(model['sha256'])[:16]}.",
            "",
            f"    {shlex.join(self.command)}",
            "",
        ]
        if failed := [[rung.step.technique, rung.failure] for rung in self.rungs if rung.failure]:
            lines += ["## Without results", "", *_table(["", "why"], failed, "---"), ""]
        if config is None:
            return "\n".join(lines)
        lines += [
            f"Fractions are in percent. A pair is estimated {self.draws} time{'s' if self.draws != 1 else ''} with other samples of the "
            f"same matches, and figures are means over these draws ({config.estimator}, at most {config.iterations:,} samples, inliers of "
            f"a pose within {config.pose_threshold:g} px, seeds {config.seed} and up). docs/evaluation.md says what each figure is; mean "
            "AUC is what the paper calls mAA.",
            "",
        ]
        summaries = {rung.step.technique: self._summaries(rung) for rung in self._done()}
        for data in config.data:
            found = {technique: of[data.kind] for technique, of in summaries.items() if data.kind in of}
            lines += [f"## {data.kind}: {data.pairs} pair{'s' if data.pairs != 1 else ''}", ""]
            lines += [f"{data.origin}.", ""] if data.origin else []
            names = [name for name in FIGURES[data.task] if all(name in summary.figures for summary in found.values())]
            lines += _table(["", *names, "median error", "without an estimate"], [_row(*each, names) for each in found.items()])
            differences = {technique: values for (kind, technique), values in self.differences.items() if kind == data.kind}
            if differences and data.pairs > 1:
                lines += ["", "Difference from strict float32, in points, with 95 % intervals by a paired bootstrap over pairs:", ""]
                lines += _table(
                    ["", *names],
                    [[technique, *(_difference(name, of[name]) for name in names)] for technique, of in differences.items()],
                )
            lines.append("")
        return "\n".join(lines)

    def _done(self) -> list[Rung]:
        return [rung for rung in self.rungs if not rung.failure]

    def _config(self) -> Config | None:
        """What the rungs have in common, of all pairs and with the draws that figures are of; None where all rungs failed."""
        for rung in self._done():
            if rung.config is not None:
                data = [msgspec.structs.replace(data, pairs=len(rung.rows[data.kind])) for data in rung.config.data]
                return msgspec.structs.replace(rung.config, data=data, draws=self.draws)
        return None

    def _summaries(self, rung: Rung) -> dict[str, Summary]:
        """By data set, without times: rungs run many at once."""
        assert rung.config is not None
        rows = [row for kind in rung.rows for row in rung.lines(kind, slice(self.draws))]
        return {summary.kind: msgspec.structs.replace(summary, seconds={}) for summary in summarise(rung.config, rows)}

    def _differences_of(self, technique: str) -> dict[str, Any]:
        return {kind: msgspec.to_builtins(found) for (kind, name), found in self.differences.items() if name == technique}


def _columns(rows: Sequence[PairResult]) -> dict[str, Any]:
    """Columns of a data set's lines, errors (pairs, draws) with null where nothing was estimated; four digits."""
    return {
        "matches": [row.matches for row in rows],
        "errors": [[None if found.error is None else float(f"{found.error:.4g}") for found in row.estimates] for row in rows],
        **{name: [float(f"{row.precision[name]:.4g}") for row in rows] for name in rows[0].precision},
    }


def _row(technique: str, summary: Summary, names: Sequence[str]) -> list[str]:
    unit = "°" if summary.task == "pose" else " px"
    median = "none" if summary.median_error is None else f"{summary.median_error:.2f}{unit}"
    return [technique, *(_value(name, summary.figures[name]) for name in names), median, str(summary.failed)]


def _value(name: str, value: float) -> str:
    return f"{value:.0f}" if name == "matches" else f"{100 * value:.2f}"


def _difference(name: str, found: Difference) -> str:
    factor, digits = (1, 1) if name == "matches" else (100, 2)
    middle, low, high = (f"{factor * value:+.{digits}f}" for value in (found.difference, found.low, found.high))
    return f"{middle} ({low} to {high})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], others: str = "---:") -> list[str]:
    """Lines of Markdown; `others` aligns all columns but the first."""
    rule = ["---"] + [others] * (len(header) - 1)
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in (header, rule, *rows)]
