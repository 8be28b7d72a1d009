"""The command that holds the plans' rules to a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.gpu_day import sweep
from benchmarks.gpu_day.fit import ALLOWED, Choice, RulesFit, fits
from benchmarks.report.console import fail, wide_console


def fit_plans(
    archive: Annotated[Path, typer.Argument(help="What gpu-day wrote.")],
) -> None:
    """What a sweep says of the rules that choose kernels: times predicted and measured, and better constants.

    Exits with 1 if a choice is slow whatever the constants: then the rule itself is wrong.
    """
    console = wide_console()
    try:
        records = sweep.read(archive)
    except (OSError, ValueError) as error:
        fail(str(error))
    found = fits(records)
    if not found:
        fail(f"{archive}: no plan of the sweep has a time")
    console.print(f"{len(records)} plans, of which {sum('failure' in record for record in records)} failed")
    if any("stand_in" in record for record in records):
        console.print("stand-ins were timed, not the kernels: these numbers mean nothing", style="yellow")
    for one in found:
        console.print(table(one))
        for line in verdict(one):
            console.print(line, highlight=False, soft_wrap=True)
    if any(one.wrong for one in found):
        raise typer.Exit(1)


def table(of: RulesFit) -> Table:
    """A line for each pass."""
    result = Table(title=f"{of.backend}: what the rules choose, and the fastest plan of the sweep")
    for name in ("layer, dtype, format, pass", "chosen"):
        result.add_column(name)
    for name in ("predicted ms", "measured ms", "of a copy's rate", "fastest ms", "slower by"):
        result.add_column(name, justify="right")
    result.add_column("fastest")
    for choice in of.now:
        measured = ["not measured", "", f"{choice.of.best_ms:.3g}", ""]
        if choice.ms is not None and choice.regret is not None:
            slower = f"{100 * (choice.regret - 1):.0f} %"
            measured = [f"{choice.ms:.3g}", f"{choice.of_copy:.2f}", f"{choice.of.best_ms:.3g}", slower]
        other = choice.of.fastest if choice.of.fastest != choice.plan else "the same"
        style = "red" if choice.is_slow else None
        result.add_row(choice.of.name, choice.plan, f"{choice.predicted_ms:.3g}", *measured, other, style=style)
    return result


def verdict(of: RulesFit) -> list[str]:
    """Constants to change, and rules that are wrong; or that neither is."""
    lines = [f"{of.backend}: {constant} {constant.value:g} -> {value:g}" for constant, value in of.values.items()]
    lines += [f"{of.backend}: the rule is wrong for {_against(choice)}" for choice in of.wrong]
    lost = sum(choice.ms is None for choice in of.now)
    lines += [f"{of.backend}: {lost} choices are not in the sweep: measure again"] * bool(lost)
    return lines or [f"{of.backend}: every choice is within {100 * (ALLOWED - 1):.0f} % of the fastest plan"]


def _against(choice: Choice) -> str:
    return (
        f"{choice.of.name}: {choice.plan} took {choice.ms:.3g} ms, {choice.of.fastest} {choice.of.best_ms:.3g} ms, "
        f"and no constant leads there"
    )
