"""The command that measures training steps of dense tasks."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from benchmarks.commands.options import OnDevice, machine_line, parse_device
from benchmarks.report.console import choices, wide_console
from benchmarks.timing.measure import Effort
from experiments.dense_tasks.methods import NETWORKS, Layout
from experiments.dense_tasks.step_cost import NAMES, measured_step, norm_share
from experiments.training.step_cost import step_costs

EFFORT = Effort(5, 15, 30.0)


def dense_step(
    network: Annotated[str, typer.Option(help=f"One of {', '.join(NETWORKS)}.")] = "segnet",
    width: Annotated[int, typer.Option(min=1, help="Channels of the first layer; 64 as in the paper.")] = 8,
    batch: Annotated[int, typer.Option(min=2)] = 4,
    height: Annotated[int, typer.Option(min=32)] = 192,
    image_width: Annotated[int, typer.Option(min=32)] = 256,
    name: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(NAMES)}. Default: all.")] = None,
    device: OnDevice = None,
) -> None:
    """A training step of three dense tasks, TS-sigma-BN in several ways and other methods: time, memory, norms."""
    console = wide_console()
    (network,) = choices([network], NETWORKS, "--network")
    names = choices(name or NAMES, NAMES, "--name")
    if height % 32 or image_width % 32:
        raise typer.BadParameter(f"must be multiples of 32, got {height}x{image_width}", param_hint="--height")
    where = parse_device(device)
    console.print(machine_line(where), highlight=False)
    arguments = Layout(network, width), (batch, height, image_width)
    found = step_costs(measured_step, names, arguments, where, EFFORT)
    table = Table(
        title=f"A training step of {network}, width {width}, batch {batch} of {height}x{image_width}, 3 tasks"
    )
    for column in ("", "parameters", "step\nms", "peak memory\nof the step", "norms and\nactivations"):
        table.add_column(column, justify="right" if column else "left")
    for key, cost in found.items():
        table.add_row(key, *cost.cells(), f"{norm_share(key, *arguments, where):.0%}")
    console.print(table)
