"""The report: one HTML page, readable without a network and without scripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from string import Template

from matplotlib.figure import Figure
from rich.table import Table

from benchmarks import plot_report, svg
from benchmarks.network_run import NetworkRun
from benchmarks.records import PASSES, Record
from benchmarks.report import layers_table, means_table, network_table
from benchmarks.settings import Setting, backend_of, machine, series_of_slabs, series_of_tasks, settings
from benchmarks.tables import as_html, as_markdown

TEMPLATE = Path(__file__).with_name("page.html")
SECTIONS = {
    "summary": "Speed-up over each peer",
    "layers": "Speed-up of each layer",
    "bandwidth": "Bandwidth against the copy",
    "sizes": "Scaling with size",
    "tasks": "Scaling with the number of tasks",
    "slabs": "Scaling with the size of a slab",
    "network": "Training step of the network",
    "plan": "What ran",
    "machines": "Machines and versions",
    "measurements": "All measurements",
    "method": "How it was measured",
}
OPEN_SETTINGS = 2
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
SEVERAL = """<p class="warning">The records are of several machines or versions: a difference between two of them need
not be one of the code.</p>
"""


@dataclass(frozen=True)
class Source:
    """What one file holds."""

    name: str
    records: Sequence[Record]
    network: NetworkRun | None


@dataclass
class _Page:
    """Figures get numbers, and so identifiers of their own."""

    sources: Sequence[Source]
    figures: int = 0
    settings: list[Setting] = field(init=False)

    def __post_init__(self) -> None:
        self.records = [record for source in self.sources for record in source.records]
        self.settings = settings(self.records)

    def figure(self, figure: Figure | None, caption: str) -> str:
        if figure is None:
            return ""
        self.figures += 1
        drawn = svg.inline(figure, f"figure{self.figures}", caption)
        return f"<figure>\n{drawn}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n"

    def each_setting(self, content: Callable[[Setting], str], *, sweeps: bool = False) -> str:
        """The content for each setting that has some, under its name; of many all but the first are folded."""
        chosen = [one for one in self.settings if sweeps or not one.sweep]
        if self.settings and not chosen:
            return _none("The records are of series alone, whose scaling is shown below")
        parts = [(escape(one.name), found) for one in chosen if (found := content(one))]
        folded = len(parts) - 1 if len(parts) > OPEN_SETTINGS else 0
        text = [f"<h3>{name}</h3>\n{found}" for name, found in parts[: len(parts) - folded]]
        text += [
            f"<details>\n<summary>{name}</summary>\n{found}</details>\n" for name, found in parts[len(parts) - folded :]
        ]
        return "".join(text)

    def summary(self) -> str:
        def content(one: Setting) -> str:
            rows = one.means
            drawn = self.figure(
                plot_report.mean_speedups(rows),
                "Time of each peer over that of the fused layer, geometric means over the layers, and their intervals.",
            )
            return drawn + as_html(means_table(rows)) if rows else ""

        return self.each_setting(content) or _none("The fused layer was not measured at every layer of any setting")

    def layers(self) -> str:
        def content(one: Setting) -> str:
            return "".join(
                self.figure(
                    plot_report.speedups(one.records, pass_),
                    f"{pass_}: time of each peer over that of the fused layer.",
                )
                for pass_ in PASSES
            )

        return self.each_setting(content) or _none("No peer was measured beside the fused layer")

    def bandwidth(self) -> str:
        caption = (
            "Useful bytes a second over the bytes a second of a copy of the same tensor. Filled: the fused layer; "
            "hollow: the best peer at that layer."
        )
        content = self.each_setting(lambda one: self.figure(plot_report.copy_fractions(one.records), caption))
        return content or _none("The fused layer was not measured")

    def sizes(self) -> str:
        def content(one: Setting) -> str:
            return "".join(
                self.figure(
                    plot_report.by_size(one.records, pass_),
                    f"{pass_}: useful bytes a second by the size of the activation; the copy is the roof of what "
                    "streams from memory. Small activations stay in caches.",
                )
                for pass_ in PASSES
            )

        return self.each_setting(content) or _none("The records are of one size; measure several --layers")

    def tasks(self) -> str:
        series = series_of_tasks(self.records)
        drawn = "".join(
            self.figure(
                plot_report.by_tasks(series, pass_), f"{pass_}: time a task; flat is a time in proportion to the tasks."
            )
            for pass_ in PASSES
        )
        return drawn or _none(
            "The records do not differ in the number of tasks alone; measure `sweep tasks`, or several --tasks with "
            "the same --batch, and give all files"
        )

    def slabs(self) -> str:
        series = series_of_slabs(self.records)
        drawn = "".join(
            self.figure(
                plot_report.by_slab(series, pass_),
                f"{pass_}: useful bytes a second over the copy's, by how many values each mean is taken of.",
            )
            for pass_ in PASSES
        )
        return drawn or _none("The records do not differ in the size of the activation alone; measure `sweep slab`")

    def network(self) -> str:
        parts = []
        for source in self.sources:
            if source.network is not None:
                parts.append(f"<h3>{escape(source.name)}</h3>\n" if len(self.sources) > 1 else "")
                parts.append(
                    self.figure(
                        plot_report.network_step(source.network),
                        "Time (whiskers: half of the interquartile range) and peak memory above what lay there before "
                        "the step. Grey: a loop of BatchNorms; each line has what the lines above it have, up to the "
                        "leaky ones.",
                    )
                )
                parts.append(as_html(network_table(source.network)))
        return "".join(parts) or _none(
            "No file lies beside the records with the network's step; measure without --no-network"
        )

    def plan(self) -> str:
        table = Table(title="Backend of the fused layer")
        for name in ("workload", "machine", "backend", "kernels"):
            table.add_column(name)
        for row in dict.fromkeys((record.workload, machine(record), *backend_of(record)) for record in self.records):
            table.add_row(*row)
        return as_html(table) + self.each_setting(_plan, sweeps=True)

    def machines(self) -> str:
        table = Table(title="Of the files' records")
        columns: dict[tuple[tuple[str, str], ...], set[str]] = {}
        for source in self.sources:
            for record in source.records:
                facts = {"device": record.device} | {key: str(value) for key, value in record.versions.items()}
                columns.setdefault(tuple(facts.items()), set()).add(source.name)
        table.add_column("")
        for files in columns.values():
            table.add_column(", ".join(sorted(files)))
        found = [dict(column) for column in columns]
        for key in dict.fromkeys(key for facts in found for key in facts):
            table.add_row(key, *(facts.get(key, "-") for facts in found))
        return SEVERAL * (len(found) > 1) + as_html(table)

    def measurements(self) -> str:
        content = self.each_setting(lambda one: as_html(layers_table(one.records)), sweeps=True)
        if not content:
            return _none("No layer was measured")
        count = sum(len(one.records) for one in self.settings)
        return f"<details>\n<summary>{count} records</summary>\n{content}</details>\n"

    def method(self) -> str:
        return METHOD

    def sections(self) -> Iterator[str]:
        for name, title in SECTIONS.items():
            content: str = getattr(self, name)()
            yield f'<section id="{name}">\n<h2>{title}</h2>\n{content}</section>\n'


def _plan(one: Setting) -> str:
    if one.records[0].device == "cpu":  # it has no plans, and the rules of those of GPUs need PyTorch
        return ""
    from benchmarks.chosen import plans, plans_table

    rows = plans(one.records)
    note = "<p>The plan of each pass by the rules of this version: bytes and times are predicted, not measured.</p>\n"
    return note + as_html(plans_table(rows)) if rows else ""


def _none(why: str) -> str:
    return f'<p class="note">{escape(why)}.</p>\n'


def render(sources: Sequence[Source]) -> str:
    """The page of all files' records, which must be distinct."""
    page = _Page(sources)
    workloads = " and ".join(dict.fromkeys(record.workload for record in page.records))
    machines = "; ".join(dict.fromkeys(machine(record) for record in page.records))
    with svg.style():
        return Template(TEMPLATE.read_text()).substitute(
            title=escape(f"tsbn-kernels on {workloads}"),
            subtitle=escape(f"{machines}. From {', '.join(source.name for source in sources)}."),
            contents="\n".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in SECTIONS.items()),
            sections="".join(page.sections()),
        )


def markdown(sources: Sequence[Source]) -> str:
    """The geometric means of every setting, for a README."""
    found = settings([record for source in sources for record in source.records])
    parts = [f"{one.name}. {as_markdown(means_table(rows))}" for one in found if (rows := one.means)]
    return "\n".join(parts)
