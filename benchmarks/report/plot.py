"""Panels of bars and of lines, with one legend below them: what all figures of records are drawn of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.records.record import Record

FUSED = "fused"
COLORS = {
    "fused": "#0b6e4f",
    "separate": "#7fb69f",
    "equal": "#4fa37f",
    "loop": "#9aa0a6",
    "folded": "#e0a030",
    "scaled": "#d9b44a",
    "sorted": "#e0a060",
    "grouped": "#a08fc0",
    "vmap": "#8e6bbf",
    "cudnn": "#2a9db0",
    "compiled_loop": "#63686d",
    "compiled_reference": "#c75146",
    "compiled_folded": "#5b7db1",
    "compiled_scaled": "#3f7fa6",
    "compiled_vmap": "#b79fd8",
    "compiled_sorted": "#a06a30",
    "compiled_grouped": "#6f5f9f",
    "autotuned_loop": "#3d4146",
    "autotuned_reference": "#8f2f27",
    "autotuned_folded": "#2f4f80",
    "autotuned_scaled": "#234d66",
    "autotuned_vmap": "#5b3a8c",
    "autotuned_sorted": "#6f4a20",
    "autotuned_grouped": "#4a3a75",
    "apex_groupbn": "#d97fb0",
    "apex_syncbn": "#a04a7a",
    "inplace_abn": "#8a6d3b",
    "liger": "#c2498a",
}
_LABELLED = 30  # bars of a panel that have room for their values; of more the fused layer's have

Panel = TypeVar("Panel")
Bars = Mapping[str, Mapping[str, tuple[float, float]]]  # value and half of a whisker, by group and series
Point = Callable[[Record], tuple[float, float]]


def distinct(values: Iterable[str]) -> list[str]:
    """Each value once, in their order."""
    return list(dict.fromkeys(values))


def tick(name: str) -> str:
    """A layer's name, or that of a group of bars, on several short lines."""
    return re.sub(r"[,@ ]|(?<=\d{3})(?=x\d{3})", "\n", name)


def _legend(figure: Figure, entries: Mapping[str, Artist]) -> None:
    """Puts a legend below all panels, in as many columns as the figure has room for, and makes room for its rows."""
    for columns in range(len(entries), 0, -1):
        drawn = figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False
        )
        if columns == 1 or drawn.get_window_extent().width < figure.bbox.width:
            figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(entries) / columns))
            return
        drawn.remove()


def panels(
    found: Mapping[str, Panel],
    draw: Callable[[Axes, Panel], None],
    y_label: str,
    x_label: str = "",
    *,
    columns: int = 2,
    share: bool | Literal["row"] = True,
    log: bool = True,
) -> Figure | None:
    """Draws each panel under its name, and one legend below them; None where there is no panel."""
    if not found:
        return None
    columns = min(columns, len(found))
    rows = math.ceil(len(found) / columns)
    figure = Figure(figsize=(4.5 * columns if columns > 1 else 5.9, 2.7 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=share is True, sharey=share, squeeze=False)
    entries: dict[str, Artist] = {}
    for axes, (name, panel) in zip(grid.flat, found.items(), strict=False):
        draw(axes, panel)
        axes.set_title(name, fontsize=9.5)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    entries = dict(
        sorted(entries.items(), key=lambda entry: isinstance(entry[1], Line2D))
    )  # what is compared with last
    for axes in grid.flat[: len(found)]:
        if log:
            _log_scale(axes)
        axes.grid(axis="y", color="#e2e5e9")
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes in grid[:, 0]:
        axes.set_ylabel(y_label)
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
    _legend(figure, entries)
    return figure


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ticks = [digit * 10.0**power for power in range(-6, 8) for digit in (1, 2, 5)]
    ticks = [value for value in ticks if low <= value <= high]
    axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()


def bars(axes: Axes, groups: Bars, base: float = 1.0, line: float = 1.0, label: str | None = None) -> None:
    """Bars from a base upwards or downwards, in groups, and a line across them."""
    series = distinct(name for row in groups.values() for name in row)
    width = 0.85 / max(1, len(series))
    for index, name in enumerate(series):
        found = [(place, *row[name]) for place, row in enumerate(groups.values()) if name in row]
        places, heights, errors = zip(*found, strict=True)
        left = [place + (index - (len(series) - 1) / 2) * width for place in places]
        above = [height - base for height in heights]
        drawn = axes.bar(left, above, width * 0.92, base, label=name, color=COLORS.get(name, "silver"))
        if any(errors):
            axes.errorbar(left, heights, errors, fmt="none", ecolor="black", elinewidth=0.8)
        if name == FUSED or len(groups) * len(series) <= _LABELLED:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}  # a whisker does not strike a value out
            axes.bar_label(drawn, [f"{height:.2g}" for height in heights], fontsize=7, padding=2, bbox=box, zorder=4)
    axes.axhline(line, color="black", linewidth=1, linestyle="--" if label else "-", label=label)
    axes.margins(y=0.12)
    axes.set_xticks(range(len(groups)), [tick(group) for group in groups])


def half_width(record: Record) -> float:
    """Half of the interquartile range, of the median."""
    return record.iqr_ms / record.median_ms / 2


def lines(point: Point, roof: Point | None = None) -> Callable[[Axes, Sequence[Record]], None]:
    """Makes what draws a line for each implementation, with half of the interquartile ranges as whiskers."""

    def draw(axes: Axes, records: Sequence[Record]) -> None:
        for impl in distinct(record.impl for record in records):
            of = sorted((record for record in records if record.impl == impl), key=point)
            places, heights = zip(*map(point, of), strict=True)
            errors = [height * half_width(record) for height, record in zip(heights, of, strict=True)]
            width, color = 2.2 if impl == FUSED else 1.1, COLORS.get(impl)
            axes.errorbar(places, heights, errors, fmt="o-", label=impl, color=color, lw=width, elinewidth=0.8, ms=3.5)
        if roof is not None:
            axes.plot(*zip(*sorted({roof(r) for r in records}), strict=True), "k--", lw=1.4, label="copy, the roof")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(EngFormatter(places=0))
        axes.xaxis.set_minor_locator(NullLocator())

    return draw


def save(path: Path, figure: Figure) -> None:
    """Writes a PNG; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
