"""The command that compiles every kernel that the compile gate asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks.report.console import fail


def compile_kernels(
    path: Annotated[
        Path | None, typer.Option("--csv", help="Default: the table beside this package's sources.")
    ] = None,
    anew: Annotated[
        bool, typer.Option("--all", help="Compile all anew, not only what has changed since the table was written.")
    ] = False,
) -> None:
    """Compile the Triton kernels of known networks' layers for every kind of GPU, and write what they take.

    No GPU is needed. All take a quarter of an hour on two cores. Exits with 1 if a kernel spills or exceeds its budget.
    """
    from tools.compile_gate.table import TABLE, by_fingerprint, everything, read, rows, write

    console = Console()
    path = path or TABLE
    known = by_fingerprint(read(path)) if path.exists() and not anew else {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=None)

        def notify(left: int) -> None:
            total = progress.tasks[0].total or left
            progress.update(bar, total=total, completed=total - left)

        table = rows(everything(), known, notify=notify)
    write(path, table)
    console.print(f"{len(table)} kernels: {path}", highlight=False, soft_wrap=True)
    if over := [row for row in table if not row.within_budget]:
        fail("spills, or more than the budget:\n" + "\n".join(map(str, over)))
