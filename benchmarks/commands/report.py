"""The commands that read records: the report page, and the comparison of two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.records.agreement import agreements
from benchmarks.records.compare import compare as compare_records
from benchmarks.records.read import RecordsError, check_distinct, read_network, read_records
from benchmarks.report.compare_tables import show
from benchmarks.report.console import fail, wide_console


def report(
    files: Annotated[
        list[Path], typer.Argument(help="What --json of celeba40, layers or sweep wrote; files beside them are found.")
    ],
    out: Annotated[Path, typer.Option(help="The page.")] = Path("results/report.html"),
    markdown: Annotated[Path | None, typer.Option(help="Write the Markdown table there and do not print it.")] = None,
) -> None:
    """One HTML page of all records: speed-ups, bandwidth, scaling, memory, plans, machine; and a Markdown table."""
    from benchmarks.report import page

    try:
        sources = [page.Source(path.name, read_records(path), read_network(path)) for path in files]
        check_distinct([record for source in sources for record in source.records], "these files together")
    except RecordsError as error:
        fail(str(error))
    table = page.markdown(sources)
    if markdown is None:
        typer.echo(table, nl=bool(table))
    else:
        _write(markdown, table)
    _write(out, page.render(sources))


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="The run before.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The run after.")],
) -> None:
    """What became slower from one run to the other by more than the noise that they state.

    Exits with 1 if a fused layer or network did.
    """
    try:
        before, after = read_records(first), read_records(second)
        comparison = compare_records(before, after)
    except RecordsError as error:
        fail(str(error))
    show(wide_console(), comparison, agreements(before, after), str(first), str(second))
    if comparison.regressions:
        raise typer.Exit(1)


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        fail(f"{path} cannot be written: {error.strerror}")
    typer.echo(f"written: {path}", err=True)
