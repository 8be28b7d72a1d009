"""The command that measures what a call costs on the host."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from benchmarks.layers.run import QUICK_EFFORT
from benchmarks.report.console import fail, wide_console


def host(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
) -> None:
    """What a call of the Triton backend costs on the host, by Triton's launcher on a driver that launches nothing."""
    try:
        from benchmarks.hot_paths.fake_driver import COMPILER
        from benchmarks.hot_paths.host_cost import EFFORT, host_times
    except ImportError as error:
        fail(f"the Triton backend is not installed: {error}")
    if COMPILER is None:
        fail("Triton's launcher needs a C compiler")
    times, launches = host_times(tasks, QUICK_EFFORT if quick else EFFORT)
    title = f"{tasks} tasks, {launches} launches of the fused layer"
    table = Table("host time of one call, us", "forward", "forward + backward", title=title)
    for name, passes in times.items():
        table.add_row(name, *(f"{1e6 * each.median:.0f} ± {1e6 * each.iqr / 2:.0f}" for each in passes))
    wide_console().print(table)
