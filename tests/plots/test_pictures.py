"""Pictures of two tasks and of forty: every name is inside of the picture, and what is drawn is what was found."""

from __future__ import annotations

import re
import sys
from functools import cache, partial

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text

from tsbn_kernels import analysis, plots
from tsbn_kernels.analysis import Conflicts, Importance

SIZES = {2: (4, 6), 40: (64, 128, 512)}


@cache
def run(tasks: int, seed: int = 0) -> Importance:
    random = torch.Generator().manual_seed(seed)
    names = ("depth", "segmentation")[:tasks] if tasks == 2 else tuple(f"task_number_{i}" for i in range(tasks))
    layers = tuple(f"backbone.layer{index}.bn" for index in range(len(SIZES[tasks])))
    matrix = torch.rand(tasks, sum(SIZES[tasks]), generator=random, dtype=torch.float64)
    return Importance(matrix, names, layers, SIZES[tasks])


def conflicts(tasks: int) -> list[Conflicts]:
    found = []
    for _ in range(3):
        cosine = torch.rand(tasks, tasks).double() - 0.5
        found.append(Conflicts(cosine + cosine.T, torch.ones(tasks), run(tasks).tasks))
    return found


PICTURES = {
    "importance": lambda tasks: plots.importance_map(run(tasks)),
    "capacity": lambda tasks: plots.capacity_bars(analysis.capacity(run(tasks))),
    "specialised": lambda tasks: plots.specialized_by_depth(analysis.specialized_filters(run(tasks))),
    "similarity": lambda tasks: plots.similarity_map(run(tasks)),
    "together": lambda tasks: plots.together_map(analysis.cluster_tasks([run(tasks), run(tasks, 1)])),
    "gates": lambda tasks: plots.gate_histograms({"x1": run(tasks), "x100": [run(tasks), run(tasks, 1)]}),
    "conflicts": lambda tasks: plots.conflict_histograms({"TSBN": conflicts(tasks), "hard sharing": conflicts(tasks)}),
    "drops": lambda tasks: plots.drops_map(torch.rand(tasks, tasks).double(), run(tasks).tasks),
}


def assert_readable(figure: Figure) -> None:
    """No word leaves the picture, whose edge would cut it; numbers beside an axis are not drawn."""
    figure.draw_without_rendering()
    whole = figure.bbox
    texts = [text for text in figure.findobj(Text) if text.get_visible() and re.search("[a-z]", text.get_text())]
    assert texts
    for text in texts:
        box = text.get_window_extent()
        assert box.x0 > -2 and box.y0 > -2 and box.x1 < whole.width + 2 and box.y1 < whole.height + 2, text


@pytest.mark.parametrize("tasks", [2, 40])
@pytest.mark.parametrize("name", PICTURES)
def test_pictures_hold_all_their_names(name: str, tasks: int) -> None:
    figure = PICTURES[name](tasks)
    assert_readable(figure)
    words = " ".join(text.get_text() for text in figure.findobj(Text))
    if name not in ("specialised", "gates", "conflicts"):
        assert all(task in words for task in run(tasks).tasks)


def test_a_graph_holds_all_its_names() -> None:
    assert_readable(plots.task_graph(run(40)))
    with pytest.raises(ValueError, match="three tasks or more, got 2"):
        plots.task_graph(run(2))


def test_points_are_those_of_every_task() -> None:
    pytest.importorskip("sklearn")
    figure = plots.task_points(torch.rand(3, 5, 4), ("a", "b", "c"))
    clouds = figure.axes[0].collections
    assert [len(cloud.get_offsets()) for cloud in clouds] == [5, 5, 5]
    assert_readable(figure)
    assert_readable(plots.task_points(torch.rand(40, 2, 4), run(40).tasks))
    with pytest.raises(ValueError, match=r"\[T, N, D\] of the 2 tasks, got shape \[3, 5, 4\]"):
        plots.task_points(torch.rand(3, 5, 4), ("a", "b"))
    with pytest.raises(ValueError, match="three points"):
        plots.task_points(torch.rand(1, 2, 4), ("a",))


def test_bars_are_the_parts_of_the_capacity() -> None:
    found = analysis.capacity(run(2))
    shared, independent = plots.capacity_bars(found).axes[0].containers
    order = found.independent.argsort()
    for bars, values in ((shared, found.shared), (independent, found.independent)):
        assert [bar.get_width() for bar in bars] == pytest.approx(values[order].tolist())


def test_a_similarity_stands_in_the_order_of_its_tree() -> None:
    source = run(40)
    left, right = plots.similarity_map(source).axes[:2]
    order = analysis.cluster_tasks(source).order
    expected = analysis.similarity(source)[order][:, order]
    assert np.allclose(right.images[0].get_array(), expected)
    assert [label.get_text() for label in right.get_yticklabels()] == [source.tasks[task] for task in order.tolist()]
    assert left.get_ylim() == (400, 0)  # the first leaf, at 5, is on top, as is the first row


def test_no_specialised_filter_is_said() -> None:
    figure = plots.specialized_by_depth(analysis.specialized_filters(run(40)))
    assert any("no filter has a task with more than 50%" in text.get_text() for text in figure.findobj(Text))


def test_one_task_has_no_conflict() -> None:
    with pytest.raises(ValueError, match="no pair"):
        plots.conflict_histograms({"a": [Conflicts(torch.ones(1, 1), torch.ones(1), ("one",))]})


@pytest.mark.parametrize("package", ["matplotlib", "sklearn.manifold"])
def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "matplotlib":
        monkeypatch.delitem(sys.modules, "tsbn_kernels.plots")
    draw = partial(plots.task_points, torch.rand(3, 5, 4), ("a", "b", "c"))
    with pytest.raises(ImportError, match=r"tsbn-kernels\[plots\]"):
        __import__("tsbn_kernels.plots") if package == "matplotlib" else draw()
