"""The figures of the report page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.network_run import VARIANTS, NetworkRun
from benchmarks.plot import COLORS, legend, tick
from benchmarks.records import OURS, PASSES, USEFUL_TENSORS, Means, Record, geometric_mean
from benchmarks.settings import kind_name, positions
from benchmarks.svg import INK
from benchmarks.workloads import NO_FORMAT

FUSED = "fused"
WIDTH = 9.0  # inches: on the page a little wider than a column of text
_LABELLED = 30  # bars of a panel that have room for their values
_MARKS = ("o", "s", "^", "D")
_SHADES = (COLORS["fused"], COLORS["compiled_folded"], COLORS["folded"], COLORS["compiled_reference"])


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _formats(records: Sequence[Record]) -> list[str]:
    """Without that of 1-d layers, which are shown beside every other."""
    return _distinct(r.memory_format for r in records if r.memory_format != NO_FORMAT) or [NO_FORMAT]


def _ticks(axes: Axes) -> list[float]:
    low, high = axes.get_ylim()
    candidates = [digit * 10.0**power for power in range(-6, 8) for digit in (1, 2, 5)]
    return [tick for tick in candidates if low <= tick <= high]


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    ticks = _ticks(axes)
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="y")


def _panels(
    records: Sequence[Record], draw: Callable[[Axes, Sequence[Record]], None], height: float = 2.7
) -> tuple[Figure, list[list[Axes]]]:
    """A panel for each dtype (rows) and memory format (columns), on one scale."""
    dtypes, formats = _distinct(record.dtype for record in records), _formats(records)
    figure, grid = plt.subplots(
        len(dtypes),
        len(formats),
        figsize=(WIDTH if len(formats) > 1 else WIDTH * 0.65, height * len(dtypes) + 0.4),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for row, dtype in zip(grid, dtypes, strict=True):
        for axes, memory_format in zip(row, formats, strict=True):
            draw(axes, [r for r in records if r.dtype == dtype and r.memory_format in (memory_format, NO_FORMAT)])
            axes.set_title(kind_name(dtype, memory_format))
    for axes in grid.flat:
        _log_scale(axes)
    return figure, grid.tolist()


def _legend(figure: Figure, axes: Iterable[Axes]) -> None:
    """Puts a legend of what is in any of the panels below them."""
    entries: dict[str, Artist] = {}
    for one in axes:
        handles, labels = one.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    legend(figure, entries)


def _bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Mapping[str, tuple[float, float]]]) -> None:
    """Bars from 1 upwards (faster) or downwards: value and relative half-width of a whisker, by series and group."""
    width = 0.85 / max(1, len(series))
    for index, (name, values) in enumerate(series.items()):
        if not values:  # it has a place here, and a colour in other panels
            continue
        places = [groups.index(group) + (index - (len(series) - 1) / 2) * width for group in values]
        heights = [value for value, _ in values.values()]
        axes.bar(places, [height - 1 for height in heights], width * 0.92, bottom=1, label=name, color=COLORS.get(name))
        errors = [value * error for value, error in values.values()]
        if any(errors):
            axes.errorbar(places, heights, errors, fmt="none", ecolor=INK, elinewidth=0.8)
        if len(groups) * len(series) <= _LABELLED:
            for place, height, error in zip(places, heights, errors, strict=True):
                up = height >= 1
                axes.annotate(
                    f"{height:.0f}" if height >= 10 else f"{height:.1f}", (place, height + (error if up else -error)),
                    (0, 2 if up else -2), textcoords="offset points", fontsize=7, ha="center",
                    va="bottom" if up else "top",
                )  # fmt: skip
    axes.axhline(1, color=INK, linewidth=1)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), [tick(group) for group in groups])


def _by_layer(records: Sequence[Record]) -> dict[str, dict[str, Record]]:
    layers: dict[str, dict[str, Record]] = {}
    for record in records:
        layers.setdefault(record.layer, {})[record.impl] = record
    return layers


def _half_width(record: Record) -> float:
    """Half of the interquartile range, of the median."""
    return record.iqr_ms / record.median_ms / 2


def speedups(records: Sequence[Record], pass_: str) -> Figure | None:
    """How many times as long each peer takes, by layer; None where there is no peer of the fused layer."""
    chosen = [record for record in records if record.pass_ == pass_]
    peers = [impl for impl in _distinct(record.impl for record in chosen) if impl != FUSED]
    layers = _distinct(record.layer for record in chosen)
    if not peers or all(record.impl != FUSED for record in chosen):
        return None

    def draw(axes: Axes, panel: Sequence[Record]) -> None:
        found = {layer: row for layer, row in _by_layer(panel).items() if FUSED in row}
        series = {
            peer: {
                layer: (
                    row[peer].median_ms / row[FUSED].median_ms,
                    math.hypot(_half_width(row[peer]), _half_width(row[FUSED])),
                )
                for layer, row in found.items()
                if peer in row
            }
            for peer in peers
        }
        _bars(axes, layers, series)

    figure, grid = _panels(chosen, draw)
    for row in grid:
        row[0].set_ylabel("times as fast (log)")
    _legend(figure, [axes for row in grid for axes in row])
    return figure


def mean_speedups(rows: Sequence[Means]) -> Figure | None:
    """The geometric means over the layers and their intervals, a panel for each pass; None where there are no peers."""
    peers = _distinct(peer for row in rows for peer in row.over)
    if not peers:
        return None
    passes = [pass_ for pass_ in PASSES if any(row.pass_ == pass_ for row in rows)]
    figure, grid = plt.subplots(1, len(passes), figsize=(WIDTH, 3.2), sharey=True, squeeze=False, layout="constrained")
    for axes, pass_ in zip(grid[0], passes, strict=True):
        found = {f"{row.dtype},{row.memory_format}": row for row in rows if row.pass_ == pass_}
        series = {
            peer: {
                group: (row.over[peer], row.intervals[peer].half_width if peer in row.intervals else 0.0)
                for group, row in found.items()
                if peer in row.over
            }
            for peer in peers
        }
        _bars(axes, list(found), series)
        axes.set_title(pass_)
    for axes in grid[0]:
        _log_scale(axes)
    grid[0, 0].set_ylabel("times as fast (log)")
    _legend(figure, grid[0])
    return figure


def copy_fractions(records: Sequence[Record]) -> Figure | None:
    """Useful bytes a second of the fused layer over the copy's, by layer; and of the best peer of each layer."""
    fused = [record for record in records if record.impl == FUSED]
    if not fused:
        return None
    layers = _distinct(record.layer for record in fused)
    kinds = _distinct(f"{r.dtype},{r.memory_format}" for r in fused if r.memory_format != NO_FORMAT)
    dtypes = _distinct(record.dtype for record in fused)
    passes = [pass_ for pass_ in PASSES if any(record.pass_ == pass_ for record in fused)]
    figure, grid = plt.subplots(1, len(passes), figsize=(WIDTH, 3.5), sharey=True, squeeze=False, layout="constrained")
    kinds = kinds or [f"{dtype},{NO_FORMAT}" for dtype in dtypes]
    for axes, pass_ in zip(grid[0], passes, strict=True):
        for index, kind in enumerate(kinds):
            dtype, memory_format = kind.split(",")
            panel = [
                r
                for r in records
                if (r.pass_, r.dtype) == (pass_, dtype) and r.memory_format in (memory_format, NO_FORMAT)
            ]
            offset = (index - (len(kinds) - 1) / 2) * 0.18
            places, ours, best = [], [], []
            for layer, row in _by_layer(panel).items():
                if FUSED in row:
                    places.append(layers.index(layer) + offset)
                    ours.append(row[FUSED].fraction_of_copy_bandwidth or math.nan)
                    others = [r.fraction_of_copy_bandwidth or 0.0 for name, r in row.items() if name not in OURS]
                    best.append(max(others, default=math.nan))
            mark = {"color": _SHADES[dtypes.index(dtype) % 4], "marker": _MARKS[kinds.index(kind) % 4]}
            axes.vlines(places, best, ours, color=mark["color"], linewidth=1.2, alpha=0.45)
            axes.plot(
                places, ours, linestyle="none", markersize=6, label=f"fused, {kind_name(dtype, memory_format)}", **mark
            )
            axes.plot(places, best, linestyle="none", markersize=4.5, markerfacecolor="none", alpha=0.9, **mark)
        axes.plot([], [], linestyle="none", marker="o", color=INK, markerfacecolor="none", label="its best peer")
        axes.axhline(1, color=INK, linewidth=1.2, linestyle="--", label="a copy")
        axes.set_xticks(range(len(layers)), [tick(layer) for layer in layers])
        axes.set_xlim(-0.6, len(layers) - 0.4)
        axes.set_title(pass_)
    for axes in grid[0]:
        _log_scale(axes)
    grid[0, 0].set_ylabel("of the copy's bandwidth (log)")
    _legend(figure, grid[0])
    return figure


def _activation_bytes(record: Record) -> float:
    return (record.useful_bytes or 0) / USEFUL_TENSORS[record.pass_]


def _line(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """From left to right, through the geometric means of points that lie above each other."""
    found: dict[float, list[float]] = {}
    for place, height in sorted(points):
        found.setdefault(place, []).append(height)
    return list(found), [geometric_mean([(height, 1) for height in heights]) for heights in found.values()]


def by_size(records: Sequence[Record], pass_: str) -> Figure | None:
    """Useful GB/s by the size of the activation, under the copy's; None where all are of one size."""
    chosen = [record for record in records if record.pass_ == pass_]
    if len({record.shape for record in chosen}) < 2:
        return None

    def draw(axes: Axes, panel: Sequence[Record]) -> None:
        for impl in _distinct(record.impl for record in panel):
            points = [
                (_activation_bytes(r) / 2**20, (r.useful_bytes or 0) / r.median_ms / 1e6)
                for r in panel
                if r.impl == impl
            ]
            width, color = 2.2 if impl == FUSED else 1.1, COLORS.get(impl)
            axes.plot(*_line(points), label=impl, color=color, linewidth=width)
            axes.plot(*zip(*points, strict=True), "o", color=color, markersize=3.5)
        roof = {(_activation_bytes(r) / 2**20, 2 * _activation_bytes(r) / (r.copy_ms or math.nan) / 1e6) for r in panel}
        axes.plot(*_line(roof), color=INK, linewidth=1.4, linestyle="--", label="copy, the roof")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")

    figure, grid = _panels(chosen, draw)
    for row in grid:
        row[0].set_ylabel("useful GB/s (log)")
    for axes in grid[-1]:
        axes.set_xlabel("MiB of the activation (log)")
    _legend(figure, [axes for row in grid for axes in row])
    return figure


def by_tasks(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Time per task by the number of tasks, a panel for each of the series; flat is proportional to T."""

    def point(record: Record) -> tuple[float, float]:
        return record.tasks or 0, record.median_ms / (record.tasks or 1)

    drawn = _scaling(series, pass_, point, ("tasks (log)", "ms a task (log)"))
    if drawn is None:
        return None
    figure, panels = drawn
    for axes, records in panels:
        counts = sorted({record.tasks or 0 for record in records})
        axes.set_xticks(counts, [str(count) for count in counts])
    return figure


def by_slab(series: Mapping[str, Sequence[Record]], pass_: str) -> Figure | None:
    """Share of the copy's bandwidth by positions of each task and channel, a panel for each of the series."""

    def point(record: Record) -> tuple[float, float]:
        return positions(record), record.fraction_of_copy_bandwidth or math.nan

    drawn = _scaling(series, pass_, point, ("positions of a task and channel (log)", "of the copy's bandwidth (log)"))
    if drawn is None:
        return None
    figure, panels = drawn
    for axes, records in panels:
        axes.axhline(1, color=INK, linewidth=1.2, linestyle="--")
        sizes = sorted({positions(record) for record in records})
        sizes = sizes[:: 1 + len(sizes) // 6]  # as many labels as there is room for
        axes.set_xticks(sizes, [_binary(size) for size in sizes])
    return figure


def _binary(count: int) -> str:
    """``16 Ki``."""
    for power, unit in ((20, "Mi"), (10, "Ki")):
        if count >= 2**power:
            return f"{count / 2**power:.3g}{unit}"
    return str(count)


def _scaling(
    series: Mapping[str, Sequence[Record]],
    pass_: str,
    point: Callable[[Record], tuple[float, float]],
    labels: tuple[str, str],
) -> tuple[Figure, list[tuple[Axes, list[Record]]]] | None:
    """A panel for each of the series that has this pass, with its records, and a line for each implementation."""
    found = {name: [record for record in records if record.pass_ == pass_] for name, records in series.items()}
    found = {name: records for name, records in found.items() if records}
    if not found:
        return None
    columns = min(3, len(found))
    rows = -(-len(found) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(max(4.5, WIDTH * columns / 3), 2.7 * rows + 0.5), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    panels = list(zip(grid.flat, found.values(), strict=False))
    for (axes, records), name in zip(panels, found, strict=True):
        for impl in _distinct(record.impl for record in records):
            of = sorted((record for record in records if record.impl == impl), key=point)
            places, heights = zip(*map(point, of), strict=True)
            errors = [height * _half_width(record) for height, record in zip(heights, of, strict=True)]
            axes.errorbar(
                places, heights, errors, fmt="o-", label=impl, color=COLORS.get(impl), markersize=3.5,
                linewidth=2.2 if impl == FUSED else 1.1, elinewidth=0.8,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(name, fontsize=8.5)
        _log_scale(axes)
        axes.xaxis.set_minor_locator(NullLocator())
    for axes in grid[:, 0]:
        axes.set_ylabel(labels[1])
    for axes in grid[-1]:
        axes.set_xlabel(labels[0])
    _legend(figure, [axes for axes, _ in panels])
    return figure, panels


def network_step(run: NetworkRun) -> Figure:
    """Time and peak memory of a training step, a line for each variant."""
    result = run.comparison
    names = list(result.times)
    colors = [COLORS["fused" if VARIANTS[name].fused else "loop"] for name in names]
    seconds = [result.times[name].median for name in names]
    spreads = [result.times[name].iqr / 2 for name in names]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 0.36 * len(names) + 0.9), sharey=True, layout="constrained"
    )
    bars = left.barh(names, seconds, xerr=spreads, color=colors, ecolor=INK, error_kw={"elinewidth": 0.8})
    left.bar_label(bars, [f"{value:.3g} s" for value in seconds], padding=6)
    left.set_title("time of a step")
    peaks = [result.peak_bytes[name] / 2**20 for name in names]
    bars = right.barh(names, peaks, color=colors)
    right.bar_label(bars, [f"{value:,.0f} MiB" for value in peaks], padding=4)
    right.set_title("peak memory of a step")
    left.invert_yaxis()
    for axes in (left, right):
        axes.margins(x=0.2)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
    return figure
