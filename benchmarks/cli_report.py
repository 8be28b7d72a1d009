"""The command that compares two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks import report_compare, terminal
from benchmarks.compare import compare as compare_records
from benchmarks.load import RecordsError, read_records


def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="The run before.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="The run after.")],
) -> None:
    """What became slower from one run to the other by more than the noise that they state.

    Exits with 1 if a fused layer or network did.
    """
    try:
        comparison = compare_records(read_records(first), read_records(second))
    except RecordsError as error:
        terminal.fail(str(error))
    report_compare.show(terminal.console(), comparison, str(first), str(second))
    if comparison.regressions:
        raise typer.Exit(1)
