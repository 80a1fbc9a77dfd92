"""A report as a picture: stages of one pair, and milliseconds a pair by batch; the ablation where there is one."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smc.compiler.bench import records
from smc.compiler.bench.records import Report, Rung

COLOURS = {
    records.IMAGE_IN: "#999999",
    records.ENCODER: "#4477aa",
    records.DECODERS: "#66ccee",
    records.HEADS: "#228833",
    records.DECODERS_AND_HEADS: "#44aa99",
    records.MATCHING: "#ee6677",
    records.MATCHES_OUT: "#bbbbbb",
}
"""Stage -> colour, told apart by colour-blind readers (Paul Tol's bright scheme)."""


def draw(report: Report, path: Path) -> None:
    """Draw the first shape of a report into a .png, .svg or .pdf file."""
    shape = tuple(report.settings["shapes"][0])
    batches = report.settings["batches"]
    panels = 1 + (len(batches) > 1) + bool(report.ablation)
    measured = [contestant for contestant in report.contestants if contestant.result.timings]
    figure = Figure(figsize=(6.5 * panels, 1.5 + 0.5 * max(len(measured), len(report.ablation))), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    machine = report.machine.get("gpu") if report.bundle["target"] != "cpu" else report.machine["processor"]
    figure.suptitle(f"{shape[1]}x{shape[0]}, {machine or report.machine['processor']}, {report.created[:10]}")

    bars = axes.pop(0)
    rows = []
    for contestant in measured:
        stages = contestant.stages(shape, batches[0], "wall")
        if records.HEADS in stages:
            stages.pop(records.DECODERS_AND_HEADS, None)
        rows.append((contestant.title, stages))
    _draw_bars(bars, rows, f"ms by the wall clock, {batches[0]} pair{'s' if batches[0] > 1 else ''}")
    for place, contestant in enumerate(measured):
        whole = contestant.seconds(shape, batches[0], records.END_TO_END, "wall")
        if whole is not None:
            bars.plot([1000 * whole], [place], "k|", markersize=14, label="" if place else records.END_TO_END)
    _put_legend_below(bars)
    if len(batches) > 1:
        lines = axes.pop(0)
        for contestant in measured:
            if contestant.role == "ablation":
                continue
            network = [(b, contestant.network(shape, b, "device") or contestant.network(shape, b, "wall")) for b in batches]
            points = [(b, 1000 * seconds / b) for b, seconds in network if seconds is not None]
            lines.plot([b for b, _ in points], [ms for _, ms in points], "o-", label=contestant.title)
        lines.set(xlabel="pairs at once", ylabel="ms a pair", xscale="log", yscale="log", title="network, by the GPU's events if any")
        lines.set_xticks(batches, [str(batch) for batch in batches], minor=False)
        _put_legend_below(lines)
    if report.ablation:
        ladder = axes.pop(0)
        rungs: list[Rung] = [rung for rung in report.ablation if rung.total is not None]
        _draw_bars(ladder, [(rung.technique, rung.seconds) for rung in rungs], "ms, the paper's techniques one by one")
        _put_legend_below(ladder)
    figure.savefig(path, dpi=150)


def _put_legend_below(axes: Axes) -> None:
    """Where it hides nothing."""
    axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def _draw_bars(axes: Axes, rows: list[tuple[str, dict[str, float]]], title: str) -> None:
    seen: set[str] = set()
    for place, (_, stages) in enumerate(rows):
        left = 0.0
        for stage, colour in COLOURS.items():
            if stage in stages:
                ms = 1000 * stages[stage]
                axes.barh(place, ms, left=left, color=colour, label=stage if stage not in seen else "")
                seen.add(stage)
                left += ms
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize="small")
    axes.invert_yaxis()
    axes.set(xlabel="ms", title=title)
