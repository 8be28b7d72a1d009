"""The tables of ``python -m benchmarks profile``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.table import Table

from benchmarks.profile import ncu
from benchmarks.profile.profiling import KINDS, OPTIMIZER, OTHER, Profile


def kinds_table(profiles: Mapping[str, Profile]) -> Table:
    """Milliseconds and share of each kind of operator, a column for each variant."""
    table = Table(title="A training step, by what its operators are for")
    table.add_column("")
    for name in profiles:
        table.add_column(f"{name}\nms", justify="right")
        table.add_column("\n%", justify="right")
    for kind in (*KINDS, OPTIMIZER, OTHER):
        cells = []
        for profile in profiles.values():
            cells += [f"{1e3 * profile.seconds_of(kind):.1f}", f"{100 * profile.share_of(kind):.1f}"]
        table.add_row(kind, *cells)
    table.add_section()
    total = [cell for each in profiles.values() for cell in (f"{1e3 * each.seconds:.1f}", f"{100 * each.named:.1f}")]
    table.add_row("step, and how much of it is named", *total)
    return table


def operators_table(name: str, profile: Profile, most: int) -> Table:
    """The operators that take most, themselves without what they call."""
    table = Table("operator", "for", title=f"{name}: the {most} operators that take most")
    for column in ("ms", "%", "calls"):
        table.add_column(column, justify="right")
    for each in profile.operators[:most]:
        share = 100 * each.seconds / profile.seconds
        table.add_row(each.name, each.kind, f"{1e3 * each.seconds:.2f}", f"{share:.1f}", str(each.calls))
    return table


def launches_table(launches: Sequence[ncu.MeasuredLaunch]) -> Table:
    """What Nsight Compute measured."""
    table = Table("kernel", title="Launches, by Nsight Compute")
    for column in ("us", "MB read", "MB written", "GB/s", "% of peak", "occupancy %", "registers", "local", "sectors"):
        table.add_column(column, justify="right")
    for launch in launches:
        values = launch.values
        table.add_row(
            launch.kernel,
            f"{1e6 * values[ncu.SECONDS]:.1f}",
            f"{values[ncu.READ] / 1e6:.1f}",
            f"{values[ncu.WRITTEN] / 1e6:.1f}",
            f"{launch.bytes_per_second / 1e9:.0f}",
            *(f"{values[name]:.0f}" for name in (ncu.MEMORY_SHARE, ncu.OCCUPANCY, ncu.REGISTERS)),
            f"{values[ncu.LOCAL_LOADS] + values[ncu.LOCAL_STORES]:.0f}",
            f"{values[ncu.SECTORS]:.1f}",
        )
    return table
