"""The figures of the report page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TypeVar

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.network_run import VARIANTS, NetworkRun
from benchmarks.plot import COLORS, legend, tick
from benchmarks.records import OURS, USEFUL_TENSORS, Means, Record
from benchmarks.settings import kind_name, positions
from benchmarks.workloads import NO_FORMAT

FUSED, BEST_PEER = "fused", "best peer"
WIDTH = 9.0  # inches
_LABELLED = 30  # bars of a panel that have room for their values

Panel = TypeVar("Panel")
Bars = Mapping[str, Mapping[str, tuple[float, float]]]  # value and half of a whisker, by group and series
Point = Callable[[Record], tuple[float, float]]


def style() -> AbstractContextManager[None]:
    """The style in which figures of the page are drawn."""
    return mpl.rc_context(
        {
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 9.5,
            "font.size": 9,
        }
    )


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _kinds(records: Sequence[Record], pass_: str) -> dict[str, list[Record]]:
    """A pass's records by dtype and memory format; those of 1-d layers, which have no format, are of every one."""
    records = [r for r in records if r.pass_ == pass_]
    formats = _distinct(r.memory_format for r in records if r.memory_format != NO_FORMAT) or [NO_FORMAT]
    return {
        kind_name(dtype, memory_format): [
            r for r in records if r.dtype == dtype and r.memory_format in (memory_format, NO_FORMAT)
        ]
        for dtype in _distinct(r.dtype for r in records)
        for memory_format in formats
    }


def _panels(
    panels: Mapping[str, Panel],
    draw: Callable[[Axes, Panel], None],
    y_label: str,
    x_label: str = "",
    *,
    columns: int = 2,
    shared: bool = True,
    log: bool = True,
) -> Figure | None:
    """Draws each panel under its name, and one legend below them; None where there is no panel."""
    if not panels:
        return None
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(WIDTH if columns > 1 else WIDTH * 0.65, 2.7 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=shared, sharey=shared, squeeze=False)
    entries: dict[str, Artist] = {}
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
        draw(axes, panel)
        axes.set_title(name)
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    for axes in grid.flat[: len(panels)]:
        if log:
            _log_scale(axes)
        axes.grid(axis="y", color="#e2e5e9")
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    legend(figure, entries)
    return figure


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-6, 8) for digit in (1, 2, 5)]
    ticks = [value for value in ticks if low <= value <= high]
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()


def _bars(axes: Axes, groups: Bars, base: float = 1.0) -> None:
    """Bars from a base upwards or downwards, in groups."""
    series = _distinct(name for row in groups.values() for name in row)
    width = 0.85 / max(1, len(series))
    for index, name in enumerate(series):
        found = [(place, *row[name]) for place, row in enumerate(groups.values()) if name in row]
        places, heights, errors = zip(*found, strict=True)
        left = [place + (index - (len(series) - 1) / 2) * width for place in places]
        above = [height - base for height in heights]
        bars = axes.bar(left, above, width * 0.92, base, label=name, color=COLORS.get(name, "silver"), yerr=errors)
        if len(groups) * len(series) <= _LABELLED:
            axes.bar_label(bars, [f"{height:.2g}" for height in heights], fontsize=7, padding=2)
    axes.axhline(1, color="black", linewidth=1)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), [tick(group) for group in groups])


def _by_layer(
    records: Sequence[Record], pass_: str, bars: Callable[[Mapping[str, Record]], Mapping[str, tuple[float, float]]]
) -> dict[str, Bars]:
    """Bars for each layer where the fused one was measured, a panel for each dtype and memory format."""
    panels: dict[str, Bars] = {}
    for kind, of in _kinds(records, pass_).items():
        layers: dict[str, dict[str, Record]] = {}
        for record in of:
            layers.setdefault(record.layer, {})[record.impl] = record
        found = {layer: bars(row) for layer, row in layers.items() if FUSED in row}
        if any(found.values()):
            panels[kind] = found
    return panels


def _half_width(record: Record) -> float:
    """Half of the interquartile range, of the median."""
    return record.iqr_ms / record.median_ms / 2


def speedups(records: Sequence[Record], pass_: str) -> Figure | None:
    """How many times as long each peer takes, by layer; None where there is no peer of the fused layer."""

    def over(peer: Record, fused: Record) -> tuple[float, float]:
        ratio = peer.median_ms / fused.median_ms
        return ratio, ratio * math.hypot(_half_width(peer), _half_width(fused))

    panels = _by_layer(records, pass_, lambda row: {n: over(r, row[FUSED]) for n, r in row.items() if n != FUSED})
    return _panels(panels, _bars, "times as fast (log)")


def mean_speedups(rows: Sequence[Means]) -> Figure | None:
    """The geometric means over the layers and their intervals, a panel for each pass; None where there are no peers."""

    def bars(row: Means) -> dict[str, tuple[float, float]]:
        halves = {peer: row.intervals[peer].half_width if peer in row.intervals else 0.0 for peer in row.over}
        return {peer: (over, over * halves[peer]) for peer, over in row.over.items()}

    panels: dict[str, dict[str, dict[str, tuple[float, float]]]] = {}
    for row in rows:
        if row.over:
            panels.setdefault(row.pass_, {})[f"{row.dtype},{row.memory_format}"] = bars(row)
    return _panels(panels, _bars, "times as fast (log)")


def copy_fractions(records: Sequence[Record], pass_: str) -> Figure | None:
    """Useful bytes a second over the copy's, by layer: of the fused layer, and of the best peer of each layer."""

    def bars(row: Mapping[str, Record]) -> dict[str, tuple[float, float]]:
        peers = [record.fraction_of_copy_bandwidth or 0.0 for name, record in row.items() if name not in OURS]
        best = {BEST_PEER: (max(peers), 0.0)} if peers else {}
        return {FUSED: (row[FUSED].fraction_of_copy_bandwidth or math.nan, 0.0), **best}

    panels = _by_layer(records, pass_, bars)
    return _panels(panels, partial(_bars, base=0.0), "of the copy's bandwidth", log=False)


def _lines(point: Point, roof: Point | None = None) -> Callable[[Axes, Sequence[Record]], None]:
    """A line for each implementation, from left to right, with half of the interquartile ranges as whiskers."""

    def draw(axes: Axes, records: Sequence[Record]) -> None:
        for impl in _distinct(record.impl for record in records):
            of = sorted((record for record in records if record.impl == impl), key=point)
            places, heights = zip(*map(point, of), strict=True)
            errors = [height * _half_width(record) for height, record in zip(heights, of, strict=True)]
            width, color = 2.2 if impl == FUSED else 1.1, COLORS.get(impl)
            axes.errorbar(places, heights, errors, fmt="o-", label=impl, color=color, lw=width, elinewidth=0.8, ms=3.5)
        if roof is not None:
            axes.plot(*zip(*sorted({roof(r) for r in records}), strict=True), "k--", lw=1.4, label="copy, the roof")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(places=0))
        axes.xaxis.set_minor_locator(NullLocator())

    return draw


def by_size(records: Sequence[Record], pass_: str) -> Figure | None:
    """Useful GB/s by the size of the activation, under the copy's; None where all are of one size."""
    if len({record.shape for record in records}) < 2:
        return None

    def size(record: Record) -> float:
        return (record.useful_bytes or 0) / USEFUL_TENSORS[record.pass_]

    draw = _lines(
        lambda r: (size(r), (r.useful_bytes or 0) / r.median_ms / 1e6),
        lambda r: (size(r), 2 * size(r) / (r.copy_ms or math.nan) / 1e6),
    )
    return _panels(_kinds(records, pass_), draw, "useful GB/s (log)", "bytes of the activation (log)")


def by_tasks(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Time per task by the number of tasks, a panel for each of the series; flat is proportional to T."""
    draw = _lines(lambda record: (record.tasks or 0, record.median_ms / (record.tasks or 1)))
    return _panels(_of_pass(series, pass_), draw, "ms a task (log)", "tasks (log)", columns=3, shared=False)


def by_slab(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Share of the copy's bandwidth by positions of each task and channel, a panel for each of the series."""
    draw = _lines(
        lambda record: (positions(record), record.fraction_of_copy_bandwidth or math.nan),
        lambda record: (positions(record), 1.0),
    )
    labels = "of the copy's bandwidth (log)", "positions of a task and channel (log)"
    return _panels(_of_pass(series, pass_), draw, *labels, columns=3, shared=False)


def _of_pass(series: Mapping[str, Sequence[Record]], pass_: str) -> dict[str, list[Record]]:
    found = {name: [record for record in records if record.pass_ == pass_] for name, records in series.items()}
    return {name: records for name, records in found.items() if records}


def network_step(run: NetworkRun) -> Figure:
    """Time and peak memory of a training step, a line for each variant."""
    names = list(run.comparison.times)
    times = run.comparison.times.values()
    peaks = [run.comparison.peak_bytes[name] / 2**20 for name in names]
    figure = Figure(figsize=(WIDTH, 0.36 * len(names) + 0.9), layout="constrained")
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
    figure.axes[0].invert_yaxis()
    return figure
