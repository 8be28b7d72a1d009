"""The command that measures what a call costs on the host."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from benchmarks.layers.run import QUICK_EFFORT
from benchmarks.records.workloads import BATCH_NORM, WORKLOADS, layers_named
from benchmarks.report.console import choices, fail, wide_console

NETWORKS = sorted(name for name, of in WORKLOADS.items() if {layer.norm for layer in of.layers} == {BATCH_NORM})


def host(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    network: Annotated[
        list[str] | None, typer.Option(help=f"All layers of a network instead: {', '.join(NETWORKS)}.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
) -> None:
    """What a call of the Triton backend costs on the host, by Triton's launcher on a driver that launches nothing."""
    networks = choices(network or (), NETWORKS, "--network")
    try:
        from benchmarks.hot_paths.fake_driver import COMPILER
        from benchmarks.hot_paths.host_cost import EFFORT, fake_gpu, host_times, network_times
    except ImportError as error:
        fail(f"the Triton backend is not installed: {error}")
    if COMPILER is None:
        fail("Triton's launcher needs a C compiler")
    effort = QUICK_EFFORT if quick else EFFORT
    with fake_gpu() as driver:
        if networks:
            table = Table("host time, ms", "layers", "launches", "forward", "forward + backward")
            for name in networks:
                seconds, launches = network_times(driver, WORKLOADS[name], effort)
                layers = sum(layers_named(layer.name) for layer in WORKLOADS[name].layers)
                table.add_row(name, str(layers), str(launches), *(f"{1e3 * each:.2f}" for each in seconds))
        else:
            times, launches = host_times(driver, tasks, effort)
            title = f"{tasks} tasks, {launches} launches of the fused layer"
            table = Table("host time of one call, us", "forward", "forward + backward", title=title)
            for name, passes in times.items():
                table.add_row(name, *(f"{1e6 * each.median:.0f} ± {1e6 * each.iqr / 2:.0f}" for each in passes))
    wide_console().print(table)
