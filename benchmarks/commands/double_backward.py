"""The command that compares second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.commands.options import FreshMemory, OnDevice, parse_device
from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS, cases
from benchmarks.layers.double_backward import COPY, PASSES, WAYS, DoubleTimes, double_times
from benchmarks.layers.run import FULL_EFFORT, QUICK_EFFORT
from benchmarks.layers.verify import MismatchError
from benchmarks.records.workloads import parse_shape
from benchmarks.report.console import fail, wide_console
from benchmarks.report.tables import milliseconds
from benchmarks.timing import host_memory

SHAPES = ["10x8,64,28,28", "40x8,64,14,14", "10x8,196,384"]


def double_backward(
    shape: Annotated[list[str], typer.Option(help="TASKSxSAMPLES,CHANNELS,HEIGHT,WIDTH, or ,TOKENS,WIDTH.")] = SHAPES,
    device: OnDevice = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
    fresh_memory: FreshMemory = False,
) -> None:
    """Forward, first and second derivative under ``create_graph``: the fused layer against a loop of PyTorch's."""
    where = parse_device(device)
    effort = QUICK_EFFORT if quick else FULL_EFFORT
    console = wide_console()
    found = []
    try:
        for text in shape:
            tasks, batch, layer = parse_shape(text)
            for case in cases(
                [layer],
                tasks=tasks,
                batch=batch,
                dtypes=list(DTYPES),
                memory_formats=list(MEMORY_FORMATS),
                device=where,
            ):
                with host_memory.keep_freed(not fresh_memory), console.status(str(case)):
                    found.append(double_times(case, effort))
    except (MismatchError, ValueError) as error:
        fail(str(error))
    console.print(double_table(found))


def double_table(found: Sequence[DoubleTimes]) -> Table:
    """A row for each case and way: milliseconds of the passes, and of the whole in copies of x."""
    table = Table(title="A step under create_graph")
    for name in ("tasks", "case", "way"):
        table.add_column(name)
    for name in (*(f"{name} ms" for name in PASSES), "step in\ncopies of x", "faster"):
        table.add_column(name, justify="right")
    for one in found:
        first = [str(one.case.tasks), str(one.case)]
        for way in WAYS:
            cells = [milliseconds(one.seconds(way, index) * 1e3) for index in range(len(PASSES))]
            copies = one.passes[way][-1].median / one.passes[COPY][0].median
            table.add_row(*first, way, *cells, f"{copies:.1f}", f"{one.speedup():.1f}x" if way == WAYS[0] else "")
            first = ["", ""]
        table.add_section()
    return table
