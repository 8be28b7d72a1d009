"""The command that measures the networks of single tasks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table

from benchmarks.commands.options import machine_line
from benchmarks.layers.run import FULL_EFFORT, QUICK_EFFORT
from benchmarks.network.data import DataError
from benchmarks.network.exported import (
    BATCHES,
    BLOCK,
    HARD_SHARING,
    UNPRUNED,
    Exported,
    exported,
    load_network,
    network_of,
)
from benchmarks.network.model import CELEBA, DIGITS
from benchmarks.report.console import fail, wide_console
from benchmarks.report.tables import milliseconds
from tsbn_kernels import Pruning

_SIZES = {CELEBA.inputs: 64, DIGITS.inputs: 28}


def export(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Of a ts_sigma_bn run of train. Default: the CelebA network with random gates.")
    ] = None,
    amount: Annotated[float | None, typer.Option(help="Share of a task's filters that goes. Default: 0.5.")] = None,
    threshold: Annotated[float | None, typer.Option(help="In place of it: gates below it are closed.")] = None,
    min_filters: Annotated[int, typer.Option(min=1, help="That each layer keeps.")] = 3,
    tasks: Annotated[int, typer.Option(min=1, help="How many tasks are exported, the first ones.")] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
) -> None:
    """Exported networks of single tasks on the CPU, pruned and not, and hard sharing: size, operations, latency."""
    console = wide_console()
    try:
        network, names = load_network(checkpoint) if checkpoint else (network_of(40, CELEBA), ())
    except DataError as error:
        fail(str(error))
    chosen = {
        index: names[index] if names else f"task {index}" for index in range(min(tasks, len(network.head_weight)))
    }
    share = 0.5 if amount is None and threshold is None else amount
    size = _SIZES[network.convolutions[0].in_channels]  # type: ignore[index]
    console.print(machine_line(torch.device("cpu")), highlight=False)
    try:
        with console.status("exporting") as status:
            found = exported(
                network,
                chosen,
                size,
                QUICK_EFFORT if quick else FULL_EFFORT,
                lambda example: Pruning(example, share, threshold, min_filters),
                status.update,
            )
    except (ImportError, ValueError) as error:
        fail(str(error))
    console.print(export_table(found))
    pruned = [one for name, one in found.items() if name not in (UNPRUNED, HARD_SHARING)]
    for kind, what in (("flops", "as written"), ("blocked_flops", f"of convolutions in blocks of {BLOCK} channels")):
        fewer = statistics.median(getattr(found[UNPRUNED], kind) / getattr(one, kind) for one in pruned)
        console.print(f"operations {what}: {fewer:.2f} times fewer than unpruned in the median", highlight=False)
    for batch in BATCHES:
        faster = [found[UNPRUNED].seconds[batch].median / one.seconds[batch].median for one in pruned]
        console.print(
            f"batch {batch}: {statistics.median(faster):.2f} times as fast as unpruned in the median of {len(faster)} "
            f"tasks, {min(faster):.2f} to {max(faster):.2f}",
            highlight=False,
        )


def export_table(found: Mapping[str, Exported]) -> Table:
    """Each network on its own; hard sharing answers for all tasks in its one pass."""
    table = Table(title="Exported networks of one task each; hard sharing: one for all tasks")
    table.add_column("network")
    for name in ("parameters", "MFLOPs", f"in blocks of {BLOCK}", *(f"ms, batch {batch}" for batch in BATCHES)):
        table.add_column(name, justify="right")
    for name, one in found.items():
        times = [
            f"{milliseconds(one.seconds[batch].median * 1e3)} ± {milliseconds(one.seconds[batch].iqr * 1e3)}"
            for batch in BATCHES
        ]
        table.add_row(name, f"{one.parameters:,}", f"{one.flops / 1e6:.2f}", f"{one.blocked_flops / 1e6:.2f}", *times)
    return table
