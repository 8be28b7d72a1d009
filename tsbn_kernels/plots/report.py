"""The page of ``python -m tsbn_kernels analyse``: one HTML file with all pictures inside, and what each means."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from tsbn_kernels.analysis import (
    Capacity,
    Importance,
    Source,
    capacity,
    cluster_tasks,
    importance,
    rank_correlations,
    specialized_filters,
    stability,
)
from tsbn_kernels.plots.bars import capacity_bars, specialized_by_depth
from tsbn_kernels.plots.histograms import gate_histograms
from tsbn_kernels.plots.maps import importance_map, similarity_map, together_map
from tsbn_kernels.plots.tasks import task_graph

_DOTS_PER_INCH = 110
_HISTOGRAMS = 8
_STYLE = """
:root { color-scheme: light; }
body { font: 1rem/1.5 system-ui, sans-serif; color: #202020; background: #fff; max-width: 76rem; margin: 0 auto;
       padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .3rem; }
p { max-width: 48rem; margin: .3rem 0 .8rem; }
.scroll { overflow-x: auto; }
img { display: block; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { white-space: nowrap; padding: .15rem .7rem .15rem 0; text-align: left; } td + td { text-align: right; }
th + th { text-align: right; } thead th { border-bottom: 1px solid #999; }
"""


def write_report(
    runs: Mapping[str, Source], path: str | Path, *, threshold: float = 0.5, clusters: int | None = None
) -> None:
    """Writes a page that needs no network and no other file; it needs SciPy.

    Args:
        runs: one run or several of the same tasks, by their names, each as
            :func:`~tsbn_kernels.analysis.importance` takes it. Pictures of one run are of the first.
        path: of the page; its folder is made.
        threshold: of specialised filters.
        clusters: how many; see :func:`~tsbn_kernels.analysis.cluster_tasks`.

    Raises:
        ValueError: there is no run, or the runs have different tasks.
    """
    if not runs:
        raise ValueError("expected one run or more, got none")
    found = {name: importance(source) for name, source in runs.items()}
    first = next(iter(found.values()))
    body = [
        f"<h1>What {_count(len(first.tasks), 'task')} use of {_count(len(first.layers), 'layer')}</h1>",
        f"<p>{_count(first.matrix.shape[1], 'filter')}, {_count(len(found), 'run')}: "
        f"{escape(', '.join(found))}. {'Pictures of one run are of the first. ' if len(found) > 1 else ''}"
        f"The importance of a filter for a task is the absolute value of its gate.</p>",
        *_of_one(first, threshold),
        _section(
            "Gates",
            "The more of them stand at the ends, the more the tasks have decided what they use; all at one half or at "
            "one have not learnt yet.",
            gate_histograms(dict(list(found.items())[:_HISTOGRAMS])),
        ),
    ]
    if len(found) > 1:
        body += _of_several(found, clusters)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{len(first.tasks)} tasks"
    path.write_text(
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body>\n{''.join(body)}</body></html>\n"
    )


def _of_one(run: Importance, threshold: float) -> list[str]:
    parts = capacity(run)
    special = specialized_filters(run, threshold)
    sections = [
        _section(
            "Importance",
            "Each row is a task and each column a filter: a bright column is used by all, a bright spot by one.",
            importance_map(run),
        ),
        _section(
            "Capacity",
            "How much of the network a task uses: the shared part is what the other tasks' choices can make up for, "
            "the independent part is its own.",
            capacity_bars(parts),
            _capacity_table(parts),
        ),
        _section(
            "Specialised filters",
            f"The percent of each layer's filters of which one task has more than {threshold:.0%} of all importance; "
            f"tasks part where the bars are high.",
            specialized_by_depth(special),
        ),
    ]
    if len(run.tasks) > 1:
        sections += [
            _section(
                "Similarity",
                "Tasks that use the same filters have a cosine near 1, and meet early in the tree on the left; white "
                "lines part the clusters.",
                similarity_map(run),
            )
        ]
    if len(run.tasks) > 2:
        sections += [
            _section(
                "Graph of tasks",
                "The pairs of tasks that are most alike are joined by a line, the stronger the more alike; neighbours "
                "on the circle are neighbours in the tree.",
                task_graph(run),
            ),
        ]
    return sections


def _of_several(found: Mapping[str, Importance], clusters: int | None) -> list[str]:
    runs = list(found.values())
    sections = []
    try:
        agreement = rank_correlations(runs)
    except ValueError as error:
        sections.append(f"<h2>Stability</h2>\n<p>None: {escape(str(error))}.</p>\n")
    else:
        head = "".join(f"<th>{number or 'run'}</th>" for number in range(len(found) + 1))
        rows = "".join(
            f"<tr><td>{number}: {escape(name)}</td>{''.join(f'<td>{float(value):.2f}</td>' for value in row)}</tr>"
            for number, (name, row) in enumerate(zip(found, agreement, strict=True), 1)
        )
        sections.append(
            f"<h2>Stability: {stability(runs):.2f}</h2>\n<p>The mean rank correlation between the similarities of two "
            f"runs: near 1 they agree on who is alike, near 0 what one run shows is chance.</p>\n"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead>{rows}</table></div>\n'
        )
    if len(runs[0].tasks) > 1:
        groups = cluster_tasks(runs, clusters)
        listed = "".join(f"<li>{escape(', '.join(group))}</li>" for group in groups.groups())
        sections.append(
            _section(
                "Clusters",
                "How often two tasks fall into one cluster: groups that stay together in all runs are no chance.",
                together_map(groups),
                f"<ol>{listed}</ol>\n",
            )
        )
    return sections


def _section(title: str, meaning: str, drawn: Figure, more: str = "") -> str:
    png = BytesIO()
    drawn.savefig(png, dpi=_DOTS_PER_INCH)
    data = b64encode(png.getvalue()).decode()
    width = round(drawn.get_figwidth() * 96)
    return (
        f"<h2>{escape(title)}</h2>\n<p>{escape(meaning)}</p>\n"
        f'<div class="scroll"><img alt="{escape(meaning)}" width="{width}" src="data:image/png;base64,{data}"></div>\n'
        f"{more}"
    )


def _capacity_table(found: Capacity) -> str:
    rows = "".join(
        f"<tr><td>{escape(task)}</td><td>{total:.3f}</td><td>{shared:.3f}</td><td>{own:.3f}</td></tr>"
        for task, total, shared, own in zip(
            found.tasks, found.total.tolist(), found.shared.tolist(), found.independent.tolist(), strict=True
        )
    )
    head = "<tr><th>task</th><th>total</th><th>shared</th><th>independent</th></tr>"
    return (
        f'<details><summary>As a table</summary><div class="scroll"><table><thead>{head}</thead>{rows}</table></div>'
        f"</details>\n"
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def names_of(paths: Sequence[Path]) -> list[str]:
    """Short names of files, which differ: the stems, or where two are equal with their number."""
    stems = [path.stem for path in paths]
    if len(set(stems)) == len(stems):
        return stems
    return [f"{number} {stem}" for number, stem in enumerate(stems, 1)]
