"""Learning curves of several methods, and the colors by which pictures tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from experiments.training.methods import (
    CROSS_STITCH,
    HARD_SHARING,
    MTAN,
    SINGLE_TASK,
    TS_SIGMA_BN,
    TS_SIGMA_LN,
    TSBN,
    TSLN,
)
from experiments.training.run import Settings

_PLAIN = {SINGLE_TASK: "#202020", HARD_SHARING: "#9aa0a6", CROSS_STITCH: "#5b7db1", MTAN: "#8e6bbf"}
_MAPS = dict.fromkeys((TS_SIGMA_BN, TS_SIGMA_LN), colormaps["YlGn"]) | dict.fromkeys((TSBN, TSLN), colormaps["OrRd"])


def colors_of(found: Mapping[str, Settings]) -> dict[str, object]:
    """A hue for each method; the darker, the higher the multiplier."""
    colors: dict[str, object] = {}
    for name, settings in found.items():
        same = sorted(one.multiplier for one in found.values() if one.method == settings.method)
        place = (same.index(settings.multiplier) + 1) / len(same)
        colors[name] = _PLAIN.get(settings.method) or _MAPS[settings.method](0.15 + 0.85 * place)
    return colors


def of_seeds(groups: Mapping[str, Sequence[object]]) -> str:
    """What a title says of the seeds of each method."""
    seeds = max(len(group) for group in groups.values())
    return "one seed" if seeds == 1 else f"mean of {seeds} seeds, and their range"


def draw_curves(axes: Axes, scores: Mapping[str, Sequence[Sequence[float]]], colors: Mapping[str, object]) -> None:
    """Scores ``[seeds][epochs]`` of each method by epoch: the mean of the seeds, and a band from worst to best.

    The first epoch is far from the rest, and may leave the picture.
    """
    from_second = []
    for name, rows in scores.items():
        values = np.array(rows)
        epochs = np.arange(1, values.shape[1] + 1)
        from_second.append(values[:, min(1, values.shape[1] - 1) :])
        axes.plot(epochs, values.mean(0), color=colors[name], marker="o", markersize=3, label=name)
        axes.fill_between(epochs, values.min(0), values.max(0), color=colors[name], alpha=0.15, linewidth=0)
    lowest, highest = min(part.min() for part in from_second), max(part.max() for part in from_second)
    margin = 0.05 * (highest - lowest) or 0.02
    axes.set_ylim(lowest - margin, highest + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch")
    axes.grid(color="#dddddd")
    axes.spines[["top", "right"]].set_visible(False)
