"""What all pictures have in common: sizes, colours, and labels that have room."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

WIDTH = 9.0  # inches
ROW = 0.19  # inches that a task's name needs
SMALL = 8  # points
INK, GRID, SHARED, OWN, ACCENT = "#202020", "#dddddd", "#56b4e9", "#d55e00", "#0072b2"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#202020", "#9a8f00")  # Okabe and Ito's
SEQUENTIAL, DIVERGING = "cividis", "PuOr"  # both are read without red and green
FEW = 8  # tasks whose matrices have room for their values


def figure(height: float, width: float = WIDTH) -> Figure:
    """Makes an empty figure that no window holds; sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def plain(axes: Axes, *, grid: str = "y") -> None:
    """Leaves the axes without a box, with lines across one direction."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=GRID, zorder=0)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def task_rows(axes: Axes, tasks: Sequence[str]) -> None:
    """Names the rows of a picture by their tasks."""
    axes.set_yticks(range(len(tasks)), tasks, fontsize=SMALL)
    axes.tick_params(axis="y", length=0)


def task_columns(axes: Axes, tasks: Sequence[str]) -> None:
    """Names the columns of a picture by their tasks; many are turned."""
    axes.set_xticks(range(len(tasks)), tasks, fontsize=SMALL, rotation=90 if len(tasks) > FEW else 0)
    axes.tick_params(axis="x", length=0)


def rows_height(tasks: int, rest: float) -> float:
    """Inches that a picture of a row a task needs, beside ``rest`` for what stands around it."""
    return max(1.0, ROW * tasks) + rest


def values_inside(axes: Axes, image: Any, matrix: Any, form: str) -> None:
    """Writes the values into the cells of a small matrix, in the colour that is seen there."""
    if len(matrix) > FEW:
        return
    for row, values in enumerate(matrix):
        for column, value in enumerate(values):
            red, green, blue, _ = image.cmap(image.norm(float(value)))
            dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
            color = "white" if dark else "black"
            axes.text(column, row, format(float(value), form), ha="center", va="center", color=color, fontsize=SMALL)
