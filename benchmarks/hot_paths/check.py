"""The command that fails where a hot path takes more instructions than its baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.hot_paths.baselines import LIMIT, Baselines, Growth, machine_of
from benchmarks.hot_paths.instructions import UncountableError, count
from benchmarks.report.console import fail, wide_console

ACCEPT = "make speed-baselines"


def table(found: Sequence[Growth]) -> Table:
    """A row for each path."""
    result = Table("path", title="hot paths: instructions of a call, and what has changed since their baselines")
    result.add_column("instructions", justify="right")
    result.add_column("", justify="right")
    for one in found:
        change = "-" if one.factor is None else f"{one.factor - 1:+.1%}"
        result.add_row(one.path, f"{one.now:,.0f}", change, style="red" if one.too_much else None)
    return result


def complaint(slow: Sequence[Growth]) -> str:
    """What is too slow, by how much, against what, and what to do."""
    lines = [
        f"  {one.path}: {one.now:,.0f} instructions, {one.factor:.2f} times the baseline's {one.before:,.0f}; at most "
        f"{LIMIT} is accepted"
        for one in slow
    ]
    return "\n".join(
        [
            "these hot paths are slower than in benchmarks/hot_paths/baselines.json:",
            *lines,
            f"If that is meant: {ACCEPT}, and commit the file with the reason.",
        ]
    )


def check(
    accept: Annotated[bool, typer.Option("--accept", help="Make what is counted now the baseline.")] = False,
) -> None:
    """Compares the instructions of each hot path with the baseline of machines like this one."""
    try:
        instruction_set, counts = count()
    except UncountableError as error:
        fail(f"instructions cannot be counted, and nothing is checked: {error}")
    stored, machine = Baselines(), machine_of(instruction_set)
    found = stored.compare(machine, counts)
    wide_console().print(table(found))
    if accept:
        stored.accept(machine, counts)
        return
    if unknown := sum(one.before is None for one in found):
        typer.echo(f"{unknown} paths without a baseline for '{machine}' are not checked ({ACCEPT})")
    if slow := [one for one in found if one.too_much]:
        fail(complaint(slow))
