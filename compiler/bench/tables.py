"""A report as tables for the terminal, and as text for a page."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from smc.compiler.bench import records
from smc.compiler.bench.records import Clock, Contestant, Report, Shape

WALL_STAGES = (
    records.IMAGE_IN,
    records.ENCODER,
    records.DECODERS,
    records.HEADS,
    records.DECODERS_AND_HEADS,
    records.MATCHING,
    records.MATCHES_OUT,
    records.END_TO_END,
)
DEVICE_STAGES = (
    records.ENCODER,
    records.DECODERS,
    records.HEADS,
    records.DECODERS_AND_HEADS,
    records.DECODERS_AND_DESCRIPTORS,
    records.MATCHING,
)
ABLATION_STAGES = (records.ENCODER, records.DECODERS, records.HEADS, records.DECODERS_AND_HEADS, records.MATCHING)


def tables(report: Report) -> Iterator[Table]:
    """Everything of a report, in the order to show it."""
    for shape in report.settings["shapes"]:
        height, width = shape
        single = 1 if 1 in report.settings["batches"] else report.settings["batches"][0]
        what = f"{width}x{height}, {'one pair' if single == 1 else f'{single} pairs'}"
        yield _stages(report, tuple(shape), single, "wall", WALL_STAGES, f"{what}: ms by the wall clock, medians")
        if any(timing.clock == "device" for contestant in report.contestants for timing in contestant.result.timings):
            yield _stages(report, tuple(shape), single, "device", DEVICE_STAGES, f"{what}: ms by the GPU's events, medians")
        if len(report.settings["batches"]) > 1:
            yield _batches(report, tuple(shape))
    yield _figures(report)
    if report.ablation:
        yield _ablation(report)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    return table


def _stages(report: Report, shape: Shape, batch: int, clock: Clock, stages: tuple[str, ...], title: str) -> Table:
    network = ("network",) if clock == "device" else ()
    table = _table(title, "", *stages, *network)
    for contestant in report.contestants:
        found = contestant.stages(shape, batch, clock)
        if found:
            total = [_ms(contestant.network(shape, batch, clock))] if network else []
            table.add_row(contestant.title, *(_ms(found.get(stage)) for stage in stages), *total)
    return table


def _batches(report: Report, shape: Shape) -> Table:
    batches = report.settings["batches"]
    columns = [f"{name}, {batch}" for name in ("network", "end to end") for batch in batches]
    table = _table(f"{shape[1]}x{shape[0]}: ms a pair, by pairs at once", "", *columns)
    for contestant in report.contestants:
        if contestant.role == "ablation":
            continue
        network = [contestant.network(shape, batch, "device") or contestant.network(shape, batch, "wall") for batch in batches]
        whole = [contestant.seconds(shape, batch, records.END_TO_END, "wall") for batch in batches]
        cells = [_ms(None if s is None else s / b) for values in (network, whole) for s, b in zip(values, batches, strict=True)]
        table.add_row(contestant.title, *cells)
    return table


def _figures(report: Report) -> Table:
    table = _table(
        "errors against torch in strict float32, memory, and loading",
        "", "worst error", "of", "match overlap", "GPU memory, MB", "host peak, MB", "load, s", "first result, s", "not run",
    )  # fmt: skip
    for contestant in report.contestants:
        result = contestant.result
        worst = max(((error, name) for a in result.accuracy for name, error in a.errors.items()), default=None)
        overlap = next((f"{a.overlap:.3f} of {a.matches_reference}" for a in result.accuracy if a.overlap is not None), "")
        memory = result.memory[0] if result.memory else None
        from_start = contestant.load.get("process start to first result")
        first = result.first_result if from_start is None else from_start.median
        table.add_row(
            contestant.title,
            "" if worst is None else _error(report, contestant, worst[0]),
            "" if worst is None else worst[1],
            overlap,
            "" if memory is None or memory.device is None else f"{memory.device / 1e6:,.0f}",
            "" if memory is None else f"{memory.host_peak / 1e6:,.0f}",
            f"{contestant.load['load'].median:.2f}" if "load" in contestant.load else "",
            "" if first is None else f"{first:.2f}",
            "; ".join(filter(None, (result.failure, *result.notes))),
        )
    return table


def _error(report: Report, contestant: Contestant, error: float) -> str:
    if error > 1e29:
        return "not finite"
    tolerance = report.bundle["tolerance"]
    outside = contestant.role == "subject" and error > tolerance
    return f"{error:.1e}" + (f", allowed {tolerance:.0e}" if outside else "")


def _ablation(report: Report) -> Table:
    shape = report.settings["shapes"][0]
    by_events = any(clock == "device" for rung in report.ablation for clock in rung.clocks.values())
    clocks = "by the GPU's events, the original's matching by the wall clock" if by_events else "by the wall clock"
    title = f"{shape[1]}x{shape[0]}, one pair: the paper's techniques one by one, ms {clocks}"
    table = _table(title, "", *ABLATION_STAGES, "total", "not run")
    for rung in report.ablation:
        table.add_row(rung.technique, *(_ms(rung.seconds.get(stage)) for stage in ABLATION_STAGES), _ms(rung.total), rung.why_not)
    return table


def _ms(seconds: float | None) -> str:
    if seconds is None:
        return ""
    ms = 1000 * seconds
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"
