"""Figures of matplotlib as SVG inside a page: without namespaces, with the page's colours and identifiers apart."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from io import StringIO
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from benchmarks.plot import COLORS

INK, GRID = "#010203", "#040506"  # stand for the page's colours, which may be dark or light
# In a style sheet each may have a lighter twin for dark pages; without one they are these.
VARIABLES = {INK: "currentColor", GRID: "var(--grid)"} | {
    color: f"var(--{name.replace('_', '-')}, {color})" for name, color in COLORS.items()
}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tsbn",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "font.size": 9,
    "axes.titlesize": 9.5,
}


def style() -> AbstractContextManager[None]:
    """In which figures of the page are drawn."""
    return mpl.rc_context(_STYLE)  # type: ignore[arg-type]


def inline(figure: Figure, name: str, label: str) -> str:
    """The figure as an ``<svg>`` element, and closes it.

    Args:
        figure: drawn in :func:`style`.
        name: of the figure, unique on the page: its identifiers start with it.
        label: what the figure shows, for those who cannot see it.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        parent.attrib = {key.rpartition("}")[2]: _local(value, name) for key, value in parent.attrib.items()}
        parent.attrib.pop("space", None)
        if "id" in parent.attrib:
            parent.attrib["id"] = f"{name}-{parent.attrib['id']}"
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    width = float(root.attrib.pop("width").removesuffix("pt"))
    for attribute in ("height", "version"):
        root.attrib.pop(attribute)
    root.attrib |= {"role": "img", "aria-label": label, "style": f"width: {width / 9:.1f}rem"}
    text = ElementTree.tostring(root, encoding="unicode")
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text


def _local(value: str, name: str) -> str:
    """References to identifiers of the same figure."""
    return re.sub(r"^#|(?<=url\()#", f"#{name}-", value) if "#" in value and not _is_color(value) else value


def _is_color(value: str) -> bool:
    return re.fullmatch(r"#[0-9a-f]{6}", value) is not None
