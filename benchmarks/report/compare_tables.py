"""The tables of a comparison, in the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.records.agreement import Agreement
from benchmarks.records.compare import Change, Comparison
from benchmarks.records.groups import batch
from benchmarks.records.record import Record
from benchmarks.report.tables import milliseconds

SAYS_LITTLE = ("tsbn_kernels",)  # differs where two versions of the package are compared: no cause for a warning


def _verdict(change: Change) -> str:
    if change.slower:
        return "SLOWER" if change.ours else "slower (a peer)"
    return ("faster" if change.ours else "faster (a peer)") if change.faster else ""


def _cells(change: Change) -> list[str]:
    low, high = change.interval
    return [f"{change.ratio:.3f}", f"{low:.2f} to {high:.2f}", _verdict(change)]


def _style(change: Change) -> str | None:
    if change.regression:
        return "bold red"
    return "green" if change.faster and change.ours else None


def changes_table(changes: Sequence[Change]) -> Table:
    """A line for each measurement that both runs have."""
    table = Table(title="Time of B over A, corrected for the machine's speed: medians ± interquartile range")
    for name in ("layer", "shape", "dtype", "format", "pass", "impl"):
        table.add_column(name)
    for name in ("A ms", "B ms", "B / A", "interval"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in changes:
        ((a, b),) = change.pairs
        times = [f"{milliseconds(record.median_ms)} ± {milliseconds(record.iqr_ms)}" for record in (a, b)]
        named = a.layer, "x".join(map(str, a.shape)), a.dtype, a.memory_format, a.pass_, a.impl
        table.add_row(*named, *times, *_cells(change), style=_style(change))
    return table


def means_table(changes: Sequence[Change]) -> Table:
    """A line for each pass of each implementation."""
    table = Table(title="Geometric means of B over A, over all records of a pass")
    for name in ("workload", "pass", "impl"):
        table.add_column(name)
    for name in ("records", "B / A", "interval"):
        table.add_column(name, justify="right")
    table.add_column("")
    for change in changes:
        record = change.pairs[0][0]
        named = record.workload, record.pass_, record.impl, str(len(change.pairs))
        table.add_row(*named, *_cells(change), style=_style(change))
    return table


def agreements_table(rows: Sequence[Agreement]) -> Table:
    """A line for each mean speed-up that both runs have."""
    table = Table(title="Speed-ups of the fused layer in both runs, with the intervals that each run states")
    for name in ("setting", "pass", "dtype", "format", "over"):
        table.add_column(name)
    for name in ("A", "B"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        cells = [f"{interval.middle:.3g} ({interval})" for interval in row.intervals]
        named = row.setting, row.pass_, row.dtype, row.memory_format, row.over
        table.add_row(*named, *cells, "" if row.holds else "APART", style=None if row.holds else "yellow")
    return table


def _alone(records: Sequence[Record]) -> list[str]:
    """A line for each case and its passes, with the implementations."""
    passes: dict[tuple[str, str], list[str]] = {}
    for r in records:
        case = f"{r.workload} {r.layer}, {batch(r)}, {r.dtype} {r.memory_format}"
        passes.setdefault((case, r.impl), []).append(r.pass_)
    impls: dict[str, list[str]] = {}
    for (case, impl), names in passes.items():
        impls.setdefault(f"  {case}, {' and '.join(names)}", []).append(impl)
    return [f"{case}: {', '.join(names)}" for case, names in impls.items()]


def show(console: Console, comparison: Comparison, speedups: Sequence[Agreement], first: str, second: str) -> None:
    """Prints the comparison; the verdict comes last."""
    console.print(f"A is {first}, B is {second}", highlight=False)
    console.print(changes_table(comparison.changes))
    if comparison.means:
        console.print(means_table(comparison.means))
    if speedups:
        console.print(agreements_table(speedups))
        agree = sum(row.holds for row in speedups)
        console.print(f"{agree} of {len(speedups)} mean speed-ups agree within their intervals", highlight=False)
    for name, records in (("A", comparison.only_first), ("B", comparison.only_second)):
        if records:
            console.print(f"only in {name}, {len(records)} records:", *_alone(records), sep="\n", highlight=False)
    machine = comparison.machine
    if machine.copies:
        text = (
            f"copies took {math.exp(machine.log_ratio):.3f} times as long in B (median of {machine.copies}), by which "
            f"the ratios are divided; one copy differs from that by {math.expm1(machine.spread):.1%}, which is part of "
            "the intervals"
        )
    else:
        text = "no copies were timed: the ratios are not corrected for the machine's speed"
    console.print(text, highlight=False)
    if odd := {name: both for name, both in comparison.differences.items() if name not in SAYS_LITTLE}:
        console.print("[bold yellow]warning: the runs differ in more than this package:[/]")
        for name, (a, b) in odd.items():
            console.print(f"  {name}: {a} in A, {b} in B", highlight=False, markup=False, style="yellow")
    if worse := comparison.regressions:
        console.print(f"[bold red]{len(worse)} of ours slower beyond the noise[/]")
    else:
        console.print(
            f"nothing of ours is slower beyond the noise, in {len(comparison.changes)} records", highlight=False
        )
