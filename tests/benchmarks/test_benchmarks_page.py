"""The report page: complete, self-contained, well-formed, and shown by a browser where there is one."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import fields
from html.parser import HTMLParser

import pytest
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from PIL import Image
from rich.table import Table
from support.synthetic import network_run, simulated_run, write_run
from typer.testing import CliRunner

from benchmarks.commands import app
from benchmarks.records.read import CHECKS, RecordsError, network_file, read_network, read_records
from benchmarks.records.record import FORWARD, PASSES, Record, means
from benchmarks.report import figures, page
from benchmarks.report.markup import as_html, as_markdown

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VOID = {"meta", "br", "hr", "img", "input", "link", "base", "source", "col", "wbr"}


class Reader(HTMLParser):
    """Every element must be closed where it was opened; collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: dict[str, list[str]] = {}
        self.section = ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID or "svg" in self.open, f"<{tag}/> is not closed in HTML"
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in VOID:
            assert not (tag == "p" and "p" in self.open)
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing, in {self.open}"
        self.section = "" if tag == "section" else self.section

    def handle_data(self, data):
        self.text.setdefault(self.section, []).append(data)

    def of(self, section):
        return " ".join(" ".join(self.text[section]).split())


def fused_1d(records):
    return [r for r in records if (r.layer, r.impl, r.dtype) == ("bn8,bn9", "fused", "float32")]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    """Page and Markdown of a full run, of a layer with other tasks on a GPU's record, and of a network's step."""
    folder = tmp_path_factory.mktemp("runs")
    network, steps = network_run()
    run = [r for r in simulated_run(1) if r.dtype == "float32"]
    a = write_run(folder / "a.json", run + steps, network)
    gpu = {"device": "cuda: NVIDIA H100 80GB HBM3", "backend": "triton: Triton 3.5"}
    b, c = (write_run(folder / f"{t}.json", fused_1d(simulated_run(t, tasks=t, **gpu))) for t in (2, 8))
    result = CliRunner().invoke(app.app, ["report", *map(str, (a, b, c)), "--out", str(folder / "out" / "report.html")])
    assert result.exit_code == 0, result.output
    return folder / "out" / "report.html", result.stdout


@pytest.fixture(scope="module")
def reader(rendered):
    return Reader(rendered[0].read_text())


def test_every_section_is_there_and_says_something(reader):
    sections = {
        "summary": ["float32 contiguous", "vs loop", "4 tasks, batch 2, A, 2 threads"],
        "layers": ["4 tasks, batch 2, A, 2 threads", "forward+backward: time of each peer"],
        "bandwidth": ["of a copy of the same tensor"],
        "sizes": ["the copy is the roof"],
        "tasks": ["time a task; flat"],
        "slabs": ["measure `sweep slab`"],
        "widths": ["measure `sweep width`"],
        "network": ["and late fan-out", "peak memory of the step", "1024 MiB", "4 tasks, batch 8"],
        "plan": ["native C++, avx512", "Plans for H100", "triton", "resident"],
        "machines": ["threads", "torch", "2.14", "several machines or versions"],
        "measurements": ["46 records", "8x512x8x8", "2.7 0.93"],
        "method": ["verified against the reference"],
    }
    assert set(sections) == set(page.SECTIONS)
    for name, texts in sections.items():
        for text in texts:
            assert text in reader.of(name), (name, text)
    links = {value for name, value in reader.attributes if name == "href" and value.startswith("#")}
    assert {f"#{name}" for name in sections} <= links


def test_the_page_is_self_contained(reader):
    assert not {"script", "link", "iframe", "image", "object"} & set(reader.tags)
    assert not {"srcset", "onclick"} & {name for name, _ in reader.attributes}
    sources = [value for name, value in reader.attributes if name == "src"]
    assert all(value.startswith("data:image/png;base64,") for value in sources)
    for tag in ("img", "figcaption"):
        assert reader.tags.count(tag) == reader.tags.count("figure") == len(sources) >= 9
    for name, value in reader.attributes:
        assert name == "src" or "//" not in value, (name, value)
        assert name != "href" or value.removeprefix("#") in page.SECTIONS


def labels(figure):
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    ticks = [" ".join(tick.get_text().split()) for axes in figure.axes for tick in axes.get_xticklabels()]
    titles, axis = ({get(axes) for axes in figure.axes} for get in (Axes.get_title, Axes.get_ylabel))
    return titles, axis - {""}, legends, ticks


def bars_of(axes, name):
    (bars,) = (found for found in axes.containers if isinstance(found, BarContainer) and found.get_label() == name)
    return bars


def test_figures_say_what_they_show():
    run = simulated_run(1)
    kinds = {f"{dtype}, {order}" for dtype in ("float32", "bfloat16") for order in ("contiguous", "channels_last")}
    titles, axis, legend, ticks = labels(figures.speedups(run, FORWARD))
    assert (titles, axis, legend) == (kinds, {"times as fast (log)"}, ["loop", "folded"])
    assert {"bn1", "bn2 bn3"} <= set(ticks)
    titles, axis, legend, _ = labels(figures.mean_speedups(means(run)))
    assert (titles, axis, legend) == (set(PASSES), {"times as fast (log)"}, ["loop", "folded"])
    titles, axis, legend, _ = labels(figures.copy_fractions(run, FORWARD))
    assert (titles, axis, legend) == (kinds, {"of the copy's bandwidth"}, ["fused", "best peer"])
    titles, axis, legend, _ = labels(figures.by_size(run, FORWARD))
    assert (titles, axis) == (kinds, {"useful GB/s (log)"})
    assert sorted(legend) == ["copy, the roof", "folded", "fused", "loop"]
    titles, *_ = labels(figures.network_step(network_run()[0]))
    assert titles == {"time of a step", "peak memory of a step"}


def test_figures_show_what_was_measured():
    """The bars of one panel, by what the records say."""
    run = [r for r in simulated_run(1) if r.memory_format == "contiguous" and r.dtype == "float32"]
    (axes,) = figures.speedups(run, FORWARD).axes
    times = {impl: [r.median_ms for r in run if (r.pass_, r.impl) == (FORWARD, impl)] for impl in ("fused", "folded")}
    drawn = [bar.get_y() + bar.get_height() for bar in bars_of(axes, "folded")]
    expected = [theirs / ours for theirs, ours in zip(times["folded"], times["fused"], strict=True)]
    assert [float(f"{height:.6g}") for height in drawn] == [float(f"{height:.6g}") for height in expected]
    (axes,) = figures.copy_fractions(run, FORWARD).axes
    fused = [r.fraction_of_copy_bandwidth for r in run if (r.pass_, r.impl) == (FORWARD, "fused")]
    assert [bar.get_height() for bar in bars_of(axes, "fused")] == fused


def test_markdown_is_a_table_of_means(rendered):
    lines = rendered[1].splitlines()
    assert lines[0].startswith("celeba40, 4 tasks, batch 2, A, 2 threads. Fused layer: geometric means")
    header = next(line for line in lines if line.startswith("| pass"))
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[:5] == ["pass", "dtype", "format", "layers", "vs loop"]  # and no column of what was not measured
    first = lines[lines.index(header) + 2].strip("|").split("|")
    assert len(first) == len(columns)
    assert first[columns.index("vs loop")].strip() == "7.3x (7.1-7.4)"
    assert first[columns.index("vs fastest peer over all layers")].strip() == "3.6x (3.6-3.7) folded"


@pytest.mark.skipif(
    not any(map(shutil.which, BROWSERS)), reason=f"no browser: none of {', '.join(BROWSERS)} is installed"
)
def test_a_browser_shows_it(rendered, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)))
    picture = tmp_path / "page.png"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1000,1200", f"--screenshot={picture}"]
    done = subprocess.run([*command, rendered[0].as_uri()], capture_output=True, text=True, timeout=60, check=False)
    assert picture.exists(), done.stderr[-2000:]
    with Image.open(picture) as shown:
        colors = {color: count for count, color in shown.convert("RGB").getcolors(1 << 24)}
    assert max(colors, key=colors.__getitem__) == (255, 255, 255)
    assert colors.get((0x9A, 0xA0, 0xA6), 0) > 5000  # bars of the loop
    assert colors.get((0xE0, 0xA0, 0x30), 0) > 3000  # and of the folded form


def test_what_was_not_measured_is_said():
    run = [r for r in simulated_run(1) if r.layer == "bn1" and r.impl == "fused" and r.dtype == "float32"]
    reader = Reader(page.render([page.Source("a.json", run, None)]))
    assert "No peer was measured" in reader.of("layers")
    assert "of one size" in reader.of("sizes")
    assert "several --tasks" in reader.of("tasks")
    assert "without --no-network" in reader.of("network")
    assert "Time of each peer" not in reader.of("summary") and "of copy bw" in reader.of("summary")
    reader = Reader(page.render([page.Source("a.json", network_run()[1], None)]))
    for name in ("summary", "layers", "bandwidth", "sizes", "tasks", "measurements"):
        assert reader.of(name).endswith((".", "measured")), name


def test_names_from_files_are_escaped():
    run = fused_1d(simulated_run(1, cpu="<b>&"))
    text = page.render([page.Source("<i>.json", run, None)])
    assert "b" not in Reader(text).tags and "i" not in Reader(text).tags
    assert "&lt;b&gt;&amp;" in text


def test_tables_keep_their_cells_and_drop_empty_columns():
    table = Table("a", "-", title="t", caption="c < d")
    table.add_column("n\nm", justify="right")
    table.add_row("1|2", "-", "3", style="bold")
    table.add_section()
    table.add_row("4", "-", "[5")
    assert as_markdown(table) == "t:\n\n| a | n m |\n| --- | ---: |\n| 1\\|2 | 3 |\n| 4 | [5 |\n"
    html = as_html(table)
    assert '<tr class="marked"><td>1|2</td><td class="num">3</td></tr>' in html
    assert "<tr><td>4</td>" in html and "c &lt; d" in html


def test_records_are_read_as_they_were_written(tmp_path):
    network, steps = network_run()
    run = simulated_run(1)[:6] + steps
    path = write_run(tmp_path / "run.json", run, network)
    assert read_records(path) == run
    assert read_network(path) == network
    assert set(CHECKS) == {field.name.rstrip("_") for field in fields(Record)}


def test_records_of_older_versions_are_read(tmp_path):
    path = write_run(tmp_path / "run.json", simulated_run(1)[:6])
    later = "rounds", "tasks", "outliers", "visits_ms"
    rows = [{name: value for name, value in row.items() if name not in later} for row in json.loads(path.read_text())]
    path.write_text(json.dumps(rows))
    assert {(r.rounds, r.tasks, r.outliers, r.visits_ms) for r in read_records(path)} == {(None,) * 4}


def changed(**values):
    return lambda rows: [rows[0] | values, *rows[1:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: [], "holds no record: the list is empty"),
        (lambda _: {"comparison": 1}, "holds no list of records"),
        (lambda _: [1], "holds no list of records"),
        (lambda rows: [{k: v for k, v in rows[0].items() if k != "median_ms"}], "record 0 has no median_ms"),
        (lambda rows: [rows[0] | {"quartiles": [1, 2]}], "record 0 has quartiles, unknown to these benchmarks"),
        (
            lambda rows: [rows[0], {k: v for k, v in rows[1].items() if k != "rounds"}],
            "mixes records of two versions: only some have rounds",
        ),
        (lambda rows: [*rows, rows[1]], "bn1 float32 contiguous forward+backward of fused is there twice"),
        (changed(median_ms=float("nan")), "record 0 has NaN for median_ms, expected a finite number above 0"),
        (changed(median_ms=-1.0), "has -1.0 for median_ms"),
        (changed(median_ms="1"), 'has "1" for median_ms'),
        (changed(iqr_ms=float("inf")), "has Infinity for iqr_ms, expected a finite number, 0 or more"),
        (changed(copy_ms=None), "has null for copy_ms, expected a finite number above 0"),
        (changed(shape=[4, 0]), "has [4, 0] for shape, expected a list of sizes"),
        (
            changed(**{"pass": "sideways"}),
            'has "sideways" for pass, expected forward or forward+backward or training_step',
        ),
        (changed(verified=False), "has false for verified"),
        (changed(rounds=True), "has true for rounds"),
        (changed(versions=[]), "has [] for versions, expected texts and numbers by name"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, change, message):
    path = write_run(tmp_path / "run.json", simulated_run(1)[:6])
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    result = CliRunner().invoke(app.app, ["report", str(path), "--out", str(tmp_path / "r.html")])
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "r.html").exists()


def test_other_bad_files_are_refused(tmp_path):
    good = write_run(tmp_path / "run.json", simulated_run(1)[:6])

    def output(*arguments):
        result = CliRunner().invoke(app.app, ["report", *map(str, arguments)])
        assert result.exit_code == 1
        return result.output

    assert "missing.json cannot be read: No such file" in output(tmp_path / "missing.json")
    (tmp_path / "text.json").write_text("forward 1 ms")
    assert "text.json is no JSON" in output(tmp_path / "text.json")
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x80")
    assert "bytes.json cannot be read: it is no text" in output(tmp_path / "bytes.json")
    assert "these files together: bn1 float32 contiguous forward of fused is there twice" in output(good, good)
    network_file(good).write_text("{}")
    assert "run.network.json is not what `celeba40 --json` writes" in output(good)
    assert "give the records that lie beside it, run.json" in output(network_file(good))


def test_a_network_of_other_variants_is_refused(tmp_path):
    network, steps = network_run()
    path = write_run(tmp_path / "run.json", steps, network)
    good = json.loads(network_file(path).read_text())
    for change, message in (
        (lambda c: [part.pop("loop") for part in c.values()], "variants loop: unknown, or missing"),
        (lambda c: c["losses"].pop("fused"), "are of different variants"),
        (lambda c: c["peak_bytes"].update(fused=float("nan")), "time and peak of 'fused' must be finite"),
        (lambda c: c["times"]["fused"].update(mode=1), "mode"),
    ):
        bad = json.loads(json.dumps(good))
        change(bad["comparison"])
        network_file(path).write_text(json.dumps(bad))
        with pytest.raises(RecordsError, match=message):
            read_network(path)
