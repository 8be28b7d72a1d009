"""The picture of the layers, in its narrowest and its widest form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.synthetic import simulated_run

from benchmarks.report.figures import time_in_copies
from benchmarks.report.plot import COLORS

PEERS = tuple(COLORS)


@pytest.mark.parametrize("panels", [1, 4])
@pytest.mark.parametrize("peers", [1, 5, len(PEERS)])
def test_the_legend_is_whole(peers: int, panels: int) -> None:
    fused = [record for record in simulated_run() if record.impl == "fused"]
    if panels == 1:
        fused = [r for r in fused if r.dtype == "float32" and r.memory_format != "channels_last"]
    figure = time_in_copies([replace(record, impl=name) for record in fused for name in PEERS[:peers]])
    assert len(figure.axes) == 2 * panels
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [*PEERS[:peers], "at the bandwidth of a copy"]
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 < box.x1 <= page.x1
    assert page.y0 <= box.y0 < box.y1 < figure.axes[-1].get_window_extent().y0
