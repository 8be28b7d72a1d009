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
    """What was measured."""
    result = Table("path", "measure", title="hot paths against their baselines")
    for title in ("baseline", "now", "change"):
        result.add_column(title, justify="right")
    for entry in comparisons:
        before = "-" if entry.before is None else f"{entry.before:.4g}"
        change = "-" if entry.change is None else f"{entry.change - 1:+.1%}"
        style = "red" if entry.too_slow else None
        result.add_row(entry.path, entry.measure.name, before, f"{entry.now:.4g}", change, style=style)
    return result


def complaint(slow: list[Comparison]) -> str:
    """What is too slow, by how much, against what, and what to do."""
    lines = [
        f"  {entry.path}: {entry.measure.name} {entry.now:.4g}, which is {entry.change:.2f} of the baseline's "
        f"{entry.before:.4g}; the limit is {entry.measure.limit}"
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
        if accept:
            stored.accept(measure, machine, values)
        comparisons += stored.compare(measure, machine, values)
        unknown = sum(entry.before is None for entry in comparisons if entry.measure is measure)
        if unknown:
            typer.echo(f"{measure.name}: {unknown} paths without a baseline for '{machine}' are not checked ({ACCEPT})")
    console().print(table(comparisons))
    slow = [entry for entry in comparisons if entry.too_slow]
    if slow:
        fail(complaint(slow))
