"""The picture: time in copies of the activation, for each layer and implementation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import PASSES, USEFUL_TENSORS, Record
from benchmarks.settings import machine
from benchmarks.workloads import NO_FORMAT

COLORS = {
    "fused": "#0b6e4f",
    "separate": "#7fb69f",
    "loop": "#9aa0a6",
    "folded": "#e0a030",
    "vmap": "#8e6bbf",
    "cudnn": "#2a9db0",
    "compiled_loop": "#63686d",
    "compiled_reference": "#c75146",
    "compiled_folded": "#5b7db1",
    "compiled_vmap": "#b79fd8",
    "autotuned_loop": "#3d4146",
    "autotuned_reference": "#8f2f27",
    "autotuned_folded": "#2f4f80",
    "autotuned_vmap": "#5b3a8c",
    "apex_groupbn": "#d97fb0",
    "apex_syncbn": "#a04a7a",
    "inplace_abn": "#8a6d3b",
}


def tick(name: str) -> str:
    """A layer's name, or that of a group of bars, on several short lines."""
    return re.sub(r"[,@ ]|(?<=\d{3})(?=x\d{3})", "\n", name)


_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


def _panel(axes: Axes, records: Sequence[Record], impls: Sequence[str], pass_: str) -> None:
    """Bars of one dtype, memory format and pass, grouped by layer."""
    layers = list(dict.fromkeys(record.layer for record in records))
    width = 0.85 / len(impls)
    for index, impl in enumerate(impls):
        found = {record.layer: record for record in records if record.impl == impl}
        places = [layers.index(layer) + (index - (len(impls) - 1) / 2) * width for layer in found]
        heights = [record.copies for record in found.values()]
        bars = axes.bar(places, heights, width, label=impl, color=COLORS.get(impl), zorder=2)
        if impl == "fused" or len(layers) <= 2:
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            axes.bar_label(bars, [f"{height:.1f}" for height in heights], fontsize=8, padding=2, bbox=box, zorder=4)
    bound = USEFUL_TENSORS[pass_] / 2
    axes.axhline(bound, color="black", linewidth=1, linestyle="--", zorder=3, label="at the bandwidth of a copy")
    axes.set_yscale("log")
    axes.set_yticks(_TICKS, [f"{value:g}" for value in _TICKS])
    axes.minorticks_off()
    axes.set_xticks(range(len(layers)), [tick(layer) for layer in layers])
    axes.grid(axis="y", which="major", color="#dddddd", zorder=0)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, entries: Mapping[str, Artist]) -> None:
    """Puts a legend below all panels, in as many columns as the figure has room for."""
    for columns in range(len(entries), 0, -1):
        drawn = figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=columns, frameon=False
        )
        if columns == 1 or drawn.get_window_extent().width < figure.bbox.width:
            return
        drawn.remove()


def draw(path: Path, records: Sequence[Record]) -> None:
    """Writes a PNG with a panel for each pass (rows), dtype and memory format (columns); creates the folder."""
    records = [record for record in records if record.pass_ in PASSES]
    impls = list(dict.fromkeys(record.impl for record in records))
    dtypes = list(dict.fromkeys(record.dtype for record in records))
    formats = list(dict.fromkeys(r.memory_format for r in records if r.memory_format != NO_FORMAT)) or [NO_FORMAT]
    columns = [(dtype, memory_format) for dtype in dtypes for memory_format in formats]
    figure, grid = plt.subplots(
        len(PASSES),
        len(columns),
        figsize=(max(7.0, 4.2 * len(columns)), 7.5),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for number, pass_ in enumerate(PASSES):
        for column, (dtype, memory_format) in enumerate(columns):
            axes = grid[number, column]
            chosen = [
                record
                for record in records
                if (record.pass_, record.dtype) == (pass_, dtype) and record.memory_format in (memory_format, NO_FORMAT)
            ]
            _panel(axes, chosen, impls, pass_)
            if number == 0:
                axes.set_title(dtype if memory_format == NO_FORMAT else f"{dtype}, {memory_format}")
            if column == 0:
                axes.set_ylabel(f"{pass_}\ntime in copies (log)")
    first = records[0]
    for row, pass_ in zip(grid, PASSES, strict=True):  # the panels of a row share one scale; ticks have widened it
        copies = [record.copies for record in records if record.pass_ == pass_]
        row[0].set_ylim(min(0.5, 0.8 * min(copies)), 1.5 * max(copies))
    figure.suptitle(
        f"{first.workload}: time of a layer in copies of its activation, lower is better\n"
        f"{machine(first)}, PyTorch {first.versions['torch']}"
    )
    (line, *bars), (bound, *names) = grid[0, 0].get_legend_handles_labels()
    legend(figure, dict(zip((*names, bound), (*bars, line), strict=True)))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
