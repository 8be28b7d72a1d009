"""The figures of records: those of the report page, and the picture of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records.groups import kind_name, machine, positions
from benchmarks.records.network_run import VARIANTS, NetworkRun
from benchmarks.records.record import OURS, PASSES, USEFUL_TENSORS, Means, Record
from benchmarks.records.workloads import NO_FORMAT
from benchmarks.report.plot import COLORS, FUSED, Bars, bars, distinct, half_width, lines, panels

BEST_PEER = "best peer"


def _kinds(records: Sequence[Record], pass_: str) -> dict[str, list[Record]]:
    """A pass's records by dtype and memory format; those of 1-d layers, which have no format, are of every one."""
    records = [r for r in records if r.pass_ == pass_]
    formats = distinct(r.memory_format for r in records if r.memory_format != NO_FORMAT) or [NO_FORMAT]
    return {
        kind_name(dtype, memory_format): [
            r for r in records if r.dtype == dtype and r.memory_format in (memory_format, NO_FORMAT)
        ]
        for dtype in distinct(r.dtype for r in records)
        for memory_format in formats
    }


BarValues = dict[str, tuple[float, float]]  # of bars, with half of a whisker


def _by_layer(
    records: Sequence[Record], pass_: str, values: Callable[[Mapping[str, Record]], BarValues]
) -> dict[str, dict[str, BarValues]]:
    """Groups of bars for each layer that has some, a panel for each dtype and memory format."""
    found: dict[str, dict[str, BarValues]] = {}
    for kind, of in _kinds(records, pass_).items():
        layers: dict[str, dict[str, Record]] = {}
        for record in of:
            layers.setdefault(record.layer, {})[record.impl] = record
        if groups := {layer: bars for layer, row in layers.items() if (bars := values(row))}:
            found[kind] = groups
    return found


def time_in_copies(records: Sequence[Record]) -> Figure:
    """The time of a layer in copies of its activation: a row of panels for each pass."""
    records = [record for record in records if record.pass_ in PASSES]
    found = {
        (pass_, kind): groups
        for pass_ in PASSES
        for kind, groups in _by_layer(
            records, pass_, lambda row: {name: (record.copies, 0.0) for name, record in row.items()}
        ).items()
    }
    least = min(record.copies for record in records)

    def draw(axes: Axes, panel: tuple[str, Bars]) -> None:
        pass_, groups = panel
        bars(axes, groups, min(0.5, 0.8 * least), USEFUL_TENSORS[pass_] / 2, "at the bandwidth of a copy")

    named = {f"{pass_}: {kind}": (pass_, groups) for (pass_, kind), groups in found.items()}
    columns = len(found) // len({pass_ for pass_, _ in found})
    figure = panels(named, draw, "time in copies (log)", columns=columns, share="row")
    assert figure is not None  # every record has copies
    first = records[0]
    figure.suptitle(
        f"{first.workload}: time of a layer in copies of its activation, lower is better\n"
        f"{machine(first)}, PyTorch {first.versions['torch']}"
    )
    return figure


def speedups(records: Sequence[Record], pass_: str) -> Figure | None:
    """How many times as long each peer takes, by layer; None where there is no peer of the fused layer."""

    def over(row: Mapping[str, Record]) -> BarValues:
        fused = row.get(FUSED)
        if fused is None:
            return {}
        ratios = {name: record.median_ms / fused.median_ms for name, record in row.items() if name != FUSED}
        widths = {name: math.hypot(half_width(row[name]), half_width(fused)) for name in ratios}
        return {name: (ratio, ratio * widths[name]) for name, ratio in ratios.items()}

    return panels(_by_layer(records, pass_, over), bars, "times as fast (log)")


def mean_speedups(rows: Sequence[Means]) -> Figure | None:
    """The geometric means over the layers and their intervals, a panel for each pass; None where there are no peers."""
    found: dict[str, dict[str, BarValues]] = {}
    for row in rows:
        widths = {name: interval.half_width for name, interval in row.intervals.items()}
        values = {name: (ratio, ratio * widths.get(name, 0.0)) for name, ratio in row.over.items()}
        if values:
            found.setdefault(row.pass_, {})[f"{row.dtype},{row.memory_format}"] = values
    return panels(found, bars, "times as fast (log)")


def copy_fractions(records: Sequence[Record], pass_: str) -> Figure | None:
    """Useful bytes a second over the copy's, by layer: of the fused layer, and of the best peer of each layer."""

    def fractions(row: Mapping[str, Record]) -> BarValues:
        if FUSED not in row:
            return {}
        found = {name: record.fraction_of_copy_bandwidth or math.nan for name, record in row.items()}
        best = max((found[name] for name in row if name not in OURS), default=None)
        return {FUSED: (found[FUSED], 0.0)} | ({} if best is None else {BEST_PEER: (best, 0.0)})

    found = _by_layer(records, pass_, fractions)
    return panels(found, partial(bars, base=0.0), "of the copy's bandwidth", log=False)


def by_size(records: Sequence[Record], pass_: str) -> Figure | None:
    """Useful GB/s by the size of the activation, under the copy's; None where all are of one size."""
    if len({record.shape for record in records}) < 2:
        return None

    def size(record: Record) -> float:
        return (record.useful_bytes or 0) / USEFUL_TENSORS[record.pass_]

    draw = lines(
        lambda r: (size(r), (r.useful_bytes or 0) / r.median_ms / 1e6),
        lambda r: (size(r), 2 * size(r) / (r.copy_ms or math.nan) / 1e6),
    )
    return panels(_kinds(records, pass_), draw, "useful GB/s (log)", "bytes of the activation (log)")


def by_tasks(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Time per task by the number of tasks, a panel for each of the series; flat is proportional to T."""
    draw = lines(lambda record: (record.tasks or 0, record.median_ms / (record.tasks or 1)))
    return panels(_of_pass(series, pass_), draw, "ms a task (log)", "tasks (log)", share=False)


def by_slab(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Share of the copy's bandwidth by positions of each task and channel, a panel for each of the series."""
    draw = lines(
        lambda record: (positions(record), record.fraction_of_copy_bandwidth or math.nan),
        lambda record: (positions(record), 1.0),
    )
    labels = "of the copy's bandwidth (log)", "positions of a task and channel (log)"
    return panels(_of_pass(series, pass_), draw, *labels, share=False)


def by_width(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Share of the copy's bandwidth by the length of a normalised row, a panel for each of the series."""
    draw = lines(
        lambda record: (record.shape[-1], record.fraction_of_copy_bandwidth or math.nan),
        lambda record: (record.shape[-1], 1.0),
    )
    labels = "of the copy's bandwidth (log)", "values of a row (log)"
    return panels(_of_pass(series, pass_), draw, *labels, share=False)


def _of_pass(series: Mapping[str, Sequence[Record]], pass_: str) -> dict[str, list[Record]]:
    found = {name: [record for record in records if record.pass_ == pass_] for name, records in series.items()}
    return {name: records for name, records in found.items() if records}


def network_step(run: NetworkRun) -> Figure:
    """Time and peak memory of a training step, a line for each variant."""
    names = list(run.comparison.times)
    times = run.comparison.times.values()
    peaks = [run.comparison.peak_bytes[name] / 2**20 for name in names]
    figure = Figure(figsize=(9.0, 0.36 * len(names) + 0.9), layout="constrained")
    for axes, title, values, unit, errors in zip(
        figure.subplots(1, 2, sharey=True),
        ("time of a step", "peak memory of a step"),
        ([time.median for time in times], peaks),
        ("{:.3g} s", "{:,.0f} MiB"),
        ([time.iqr / 2 for time in times], None),
        strict=True,
    ):
        colors = [COLORS["fused" if VARIANTS[name].fused else "loop"] for name in names]
        bars = axes.barh(names, values, xerr=errors, color=colors)
        axes.bar_label(bars, [unit.format(value) for value in values], padding=4)
        axes.set_title(title)
        axes.margins(x=0.2)
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
    figure.axes[0].invert_yaxis()
    return figure
