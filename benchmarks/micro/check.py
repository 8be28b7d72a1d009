"""The command that fails where a hot path has become slower than its baseline."""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.micro.baselines import (
    INSTRUCTIONS,
    TIME,
    Baselines,
    Comparison,
    counting_machine,
    timing_machine,
)
from benchmarks.micro.instructions import UncountableError, count
from benchmarks.micro.paths import CHECKED, one_thread
from benchmarks.micro.ratios import ratios
from benchmarks.terminal import console, fail

ACCEPT = "make speed-baselines"


def times(machine: str, stored: Baselines, accept: bool) -> dict[str, float]:
    """The time of each path in units of PyTorch's."""
    before = stored.of(TIME, machine)

    def again(path: str, ratio: float) -> bool:
        """A new baseline is measured as carefully as a path that seems to be too slow."""
        return accept or ratio > TIME.limit * before.get(path, ratio)

    torch.manual_seed(0)
    with one_thread():
        return ratios(CHECKED, again)


def table(comparisons: list[Comparison]) -> Table:
    """A row for each path."""
    result = Table("path", title="hot paths, and what has changed since their baselines")
    rows: dict[str, list[str]] = {}
    for measure in dict.fromkeys(entry.measure for entry in comparisons):
        result.add_column(measure.name, justify="right")
        result.add_column("", justify="right")
    for entry in comparisons:
        change = f"{entry.change - 1:+.1%}" if entry.known else "-"
        rows.setdefault(entry.path, []).extend(
            [entry.measure.shown(entry.now), f"[red]{change}" if entry.too_slow else change]
        )
    for path, cells in rows.items():
        result.add_row(path, *cells)
    return result


def complaint(slow: list[Comparison]) -> str:
    """What is too slow, by how much, against what, and what to do."""
    lines = [
        f"  {entry.path}: {entry.measure.name} {entry.measure.shown(entry.now)}, {entry.change:.2f} times the "
        f"baseline's {entry.measure.shown(entry.before)}; at most {entry.measure.limit} is accepted"
        for entry in slow
    ]
    return "\n".join(
        [
            "these hot paths are slower than in benchmarks/micro/baselines.json:",
            *lines,
            f"If that is meant: {ACCEPT} on a quiet machine, and commit the file with the reason.",
        ]
    )


def check(
    accept: Annotated[bool, typer.Option("--accept", help="Make what is measured now the baseline.")] = False,
) -> None:
    """Compares the instructions and the relative time of each hot path with the baseline of machines like this one."""
    stored = Baselines()
    measured = []
    try:
        instruction_set, counts = count()
        measured.append((INSTRUCTIONS, counting_machine(instruction_set), counts))
    except UncountableError as error:
        typer.echo(f"instructions are not counted, and not checked: {error}")
    machine = timing_machine()
    measured.append((TIME, machine, times(machine, stored, accept)))

    comparisons: list[Comparison] = []
    for measure, machine, values in measured:
        found = stored.compare(measure, machine, values)
        comparisons += found
        unknown = sum(not entry.known for entry in found)
        if accept:
            stored.accept(measure, machine, values)
        elif unknown:
            typer.echo(f"{measure.name}: {unknown} paths without a baseline for '{machine}' are not checked ({ACCEPT})")
    console().print(table(comparisons))
    slow = [entry for entry in comparisons if entry.too_slow]
    if slow and not accept:
        fail(complaint(slow))
