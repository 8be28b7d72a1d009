"""The report: one HTML page, readable without a network and without scripts."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from io import BytesIO
from pathlib import Path
from string import Template
from typing import NamedTuple, TypeVar

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.records.groups import (
    RecordGroup,
    backend_of,
    groups,
    machine,
    series_of_slabs,
    series_of_tasks,
    series_of_widths,
)
from benchmarks.records.network_run import NetworkRun
from benchmarks.records.record import PASSES, Record
from benchmarks.report import figures
from benchmarks.report.markup import as_html, as_markdown
from benchmarks.report.tables import layers_table, means_table, network_table

TEMPLATE = Path(__file__).with_name("page.html")
DOTS_PER_INCH = 120
Shown = TypeVar("Shown")
METHOD = """<p>Every implementation is verified against the reference in float64 before it is timed. All of them take
turns in one process, after rounds that warm up until none becomes faster, on as many sets of buffers as exceed the
largest cache. Each case is visited several times, with all other cases between two visits. A figure is the median of
all rounds, ± its interquartile range, and whiskers are half of that range, of both times that a ratio is made of; a
round outside of the quartiles by more than 1.5 ranges is marked by a star. The intervals of the means hold them with
95 % (Student's t), by how the visits differ. A <em>copy</em> is <code>Tensor.copy_</code> of the layer's activation,
timed in the same rounds; useful bytes are those that must be read or written at least: twice the activation in a
forward pass, five times in forward and backward. A layer that moves no others, at the bandwidth of the copy, has a
fraction of 1. Means over layers are geometric; a shape that two layers of the network have counts twice. On a CPU what
a step frees is kept for the next one, and page faults are in no figure, but in a setting of fresh memory.</p>
"""
SEVERAL = """<p class="note"><strong>The records are of several machines or versions: a difference between two of them
need not be one of the code.</strong></p>
"""
PREDICTED = "<p>The plan of each pass by the rules of this version: bytes and times are predicted, not measured.</p>\n"


@dataclass(frozen=True)
class Source:
    """What one file holds."""

    name: str
    records: Sequence[Record]
    network: NetworkRun | None


@dataclass(frozen=True)
class Found:
    """What all files hold."""

    sources: Sequence[Source]

    @cached_property
    def records(self) -> list[Record]:
        """The records of all files."""
        return [record for source in self.sources for record in source.records]

    @cached_property
    def groups(self) -> list[RecordGroup]:
        """The records of layers, by what was measured together."""
        return groups(self.records)


def _figure(figure: Figure | None, caption: str) -> str:
    """An image inside the page, and nothing where there is no figure."""
    if figure is None:
        return ""
    drawn = BytesIO()
    figure.savefig(drawn, dpi=DOTS_PER_INCH)
    data, text, width = b64encode(drawn.getvalue()).decode(), escape(caption), 6.2 * figure.get_figwidth()
    image = f'<img alt="{text}" style="width: {width:.0f}rem" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"


def _each_pass(draw: Callable[[Shown, str], Figure | None], shown: Shown, caption: str) -> str:
    return "".join(_figure(draw(shown, pass_), f"{pass_}: {caption}") for pass_ in PASSES)


def _each(found: Sequence[RecordGroup], content: Callable[[RecordGroup], str]) -> str:
    """The content for each setting that has some, under its name; of many all but the first are folded."""
    parts = [(escape(one.name), text) for one in found if (text := content(one))]
    several = len(parts) > 2
    return "".join(
        f"<details>\n<summary>{name}</summary>\n{text}</details>\n" if several and index else f"<h3>{name}</h3>\n{text}"
        for index, (name, text) in enumerate(parts)
    )


def _layers_of(content: Callable[[RecordGroup], str]) -> Callable[[Found], str]:
    """Makes a section of the groups that are no series."""

    def section(found: Found) -> str:
        chosen = [one for one in found.groups if not one.sweep]
        if found.groups and not chosen:
            return _note("The records are of series alone, whose scaling is shown below")
        return _each(chosen, content)

    return section


@_layers_of
def _summary(one: RecordGroup) -> str:
    caption = "Time of each peer over that of the fused layer, geometric means over the layers, and their intervals."
    rows = one.means
    return _figure(figures.mean_speedups(rows), caption) + as_html(means_table(rows)) if rows else ""


def _by_layer(draw: Callable[[Sequence[Record], str], Figure | None], caption: str) -> Callable[[Found], str]:
    return _layers_of(lambda one: _each_pass(draw, one.records, caption))


def _network(found: Found) -> str:
    caption = (
        "Time (whiskers: half of the interquartile range) and peak memory above what lay there before the step. Grey: "
        "a loop of BatchNorms; each line has what the lines above it have, up to the leaky ones."
    )
    return "".join(
        f"<h3>{escape(source.name)}</h3>\n" * (len(found.sources) > 1)
        + _figure(figures.network_step(source.network), caption)
        + as_html(network_table(source.network))
        for source in found.sources
        if source.network is not None
    )


def _plan(found: Found) -> str:
    table = Table("workload", "machine", "backend", "kernels", title="Backend of the fused layer")
    for row in dict.fromkeys((record.workload, machine(record), *backend_of(record)) for record in found.records):
        table.add_row(*row)
    return as_html(table) + _each(found.groups, _plans)


def _plans(one: RecordGroup) -> str:
    if one.records[0].device == "cpu":  # it has no plans, and the rules of those of GPUs need PyTorch
        return ""
    from benchmarks.report.what_ran import plans, plans_table

    rows = plans(one.records)
    return PREDICTED + as_html(plans_table(rows)) if rows else ""


def _machines(found: Found) -> str:
    files: dict[tuple[tuple[str, str], ...], dict[str, None]] = {}
    for source in found.sources:
        for record in source.records:
            facts = {"device": record.device} | {key: str(value) for key, value in record.versions.items()}
            files.setdefault(tuple(facts.items()), {})[source.name] = None
    table = Table("", *(", ".join(names) for names in files.values()), title="Machines of the files' records")
    columns = [dict(facts) for facts in files]
    for key in dict.fromkeys(key for facts in columns for key in facts):
        table.add_row(key, *(facts.get(key, "-") for facts in columns))
    return SEVERAL * (len(files) > 1) + as_html(table)


def _measurements(found: Found) -> str:
    content = _each(found.groups, lambda one: as_html(layers_table(one.records)))
    count = sum(len(one.records) for one in found.groups)
    return f"<details>\n<summary>{count} records</summary>\n{content}</details>\n" if content else ""


class Section(NamedTuple):
    """A part of the page: what it shows, and what it says where there is nothing to show."""

    title: str
    content: Callable[[Found], str]
    otherwise: str = ""


SECTIONS: Mapping[str, Section] = {
    "summary": Section(
        "Speed-up over each peer", _summary, "The fused layer was not measured at every layer of any setting"
    ),
    "layers": Section(
        "Speed-up of each layer",
        _by_layer(figures.speedups, "time of each peer over that of the fused layer."),
        "No peer was measured beside the fused layer",
    ),
    "bandwidth": Section(
        "Bandwidth against the copy",
        _by_layer(
            figures.copy_fractions,
            "useful bytes a second over the bytes a second of a copy of the same tensor, which is the line.",
        ),
        "The fused layer was not measured",
    ),
    "sizes": Section(
        "Scaling with size",
        _by_layer(
            figures.by_size,
            "useful bytes a second by the size of the activation; the copy is the roof of what streams from memory. "
            "Small activations stay in caches.",
        ),
        "The records are of one size; measure several --layers",
    ),
    "tasks": Section(
        "Scaling with the number of tasks",
        lambda found: _each_pass(
            figures.by_tasks,
            series_of_tasks(found.records),
            "time a task; flat is a time in proportion to the tasks.",
        ),
        "The records do not differ in the number of tasks alone; measure `sweep tasks`, or several --tasks with the "
        "same --batch, and give all files",
    ),
    "slabs": Section(
        "Scaling with the size of a slab",
        lambda found: _each_pass(
            figures.by_slab,
            series_of_slabs(found.records),
            "useful bytes a second over the copy's, by how many values each mean is taken of.",
        ),
        "The records do not differ in the size of the activation alone; measure `sweep slab`",
    ),
    "widths": Section(
        "Scaling with the length of a row",
        lambda found: _each_pass(
            figures.by_width,
            series_of_widths(found.records),
            "useful bytes a second over the copy's, by how many values a layer normalisation takes its mean of.",
        ),
        "The records do not differ in the length of a normalised row alone; measure `sweep width`",
    ),
    "network": Section(
        "Training step of the network",
        _network,
        "No file lies beside the records with the network's step; measure without --no-network",
    ),
    "plan": Section("What ran", _plan),
    "machines": Section("Machines and versions", _machines),
    "measurements": Section("All measurements", _measurements, "No layer was measured"),
    "method": Section("How it was measured", lambda _: METHOD),
}


def _note(text: str) -> str:
    return f'<p class="note">{escape(text)}.</p>\n'


def render(sources: Sequence[Source]) -> str:
    """The page of all files' records, which must be distinct."""
    found = Found(sources)
    workloads = " and ".join(dict.fromkeys(record.workload for record in found.records))
    machines = "; ".join(dict.fromkeys(machine(record) for record in found.records))
    sections = [
        f'<section id="{name}">\n<h2>{one.title}</h2>\n{one.content(found) or _note(one.otherwise)}</section>\n'
        for name, one in SECTIONS.items()
    ]
    return Template(TEMPLATE.read_text()).substitute(
        title=escape(f"tsbn-kernels on {workloads}"),
        subtitle=escape(f"{machines}. From {', '.join(source.name for source in sources)}."),
        contents="\n".join(f'<li><a href="#{name}">{one.title}</a></li>' for name, one in SECTIONS.items()),
        sections="".join(sections),
    )


def markdown(sources: Sequence[Source]) -> str:
    """The geometric means of every setting, for a README."""
    found = Found(sources).groups
    return "\n".join(f"{one.name}. {as_markdown(means_table(rows))}" for one in found if (rows := one.means))
