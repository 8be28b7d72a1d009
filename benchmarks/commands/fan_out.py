"""The command that compares fanning one input out with expanding it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.commands.options import FreshMemory, OnDevice, parse_device
from benchmarks.layers.cases import MEMORY_FORMATS
from benchmarks.layers.fan_out import TOLERANCE, WAYS, FanOutTimes, fan_out_times
from benchmarks.layers.run import FULL_EFFORT, QUICK_EFFORT
from benchmarks.layers.verify import MismatchError
from benchmarks.report.console import fail, wide_console
from benchmarks.report.tables import milliseconds
from benchmarks.timing import host_memory


def fan_out(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    batch: Annotated[int, typer.Option(min=2, help="Samples.")] = 8,
    device: OnDevice = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
    fresh_memory: FreshMemory = False,
) -> None:
    """The first layer of the CelebA network and its ReLU: one input fanned out, against expanding it first."""
    where = parse_device(device)
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    found = []
    console = wide_console()
    try:
        for dtype in TOLERANCE:
            for memory_format in MEMORY_FORMATS:
                with host_memory.keep_freed(not fresh_memory), console.status(f"{dtype} {memory_format}"):
                    found.append(fan_out_times(tasks, batch, dtype, memory_format, where, effort))
    except MismatchError as error:
        fail(str(error))
    console.print(fan_out_table(found, tasks, batch))


def fan_out_table(found: Sequence[FanOutTimes], tasks: int, batch: int) -> Table:
    """The first layer, fanned out and expanded."""
    table = Table(title=f"First layer and its ReLU, {tasks} tasks, batch {batch}; a copy is one of all tasks' outputs")
    for name in ("dtype", "format", "way"):
        table.add_column(name)
    for name in ("fwd ms", "copies", "faster", "fwd+bwd ms", "copies", "faster", "kept for the\nbackward"):
        table.add_column(name, justify="right")
    for one in found:
        first = [one.dtype, one.memory_format]
        for way in WAYS:
            cells = []
            for index, summary in enumerate(one.passes[way]):
                cells += [
                    f"{milliseconds(summary.median * 1e3)} ± {milliseconds(summary.iqr * 1e3)}",
                    f"{one.copies(way, index):.2f}",
                ]
                cells.append(f"{one.speedup(index):.1f}x" if way == WAYS[0] else "")
            table.add_row(*first, way, *cells, f"{one.saved_bytes[way] / 2**20:.1f} MiB")
            first = ["", ""]
        table.add_section()
    return table
