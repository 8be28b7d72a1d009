"""The commands that measure layers alone: those of a network, of given shapes, and in series."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.commands.options import (
    Dtypes,
    Formats,
    FreshMemory,
    Impls,
    Json,
    OnDevice,
    announce,
    parse_device,
    parse_impls,
    parse_layers,
    tell,
)
from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS, Case, batch_that_fits, cases, choose_batch
from benchmarks.layers.peers import ACTIVATIONS
from benchmarks.layers.run import FULL_EFFORT, QUICK_EFFORT, run_cases
from benchmarks.layers.verify import MismatchError
from benchmarks.records.record import Record, write_json
from benchmarks.records.workloads import (
    LAYER_NORM,
    NO_ACTIVATION,
    SERIES_BATCH,
    SERIES_TASKS,
    SLAB_LAYERS,
    SWEEP_SLAB,
    SWEEP_TASKS,
    SWEEP_WIDTH,
    TASK_COUNTS,
    TASKS_LAYER,
    WIDTH_LAYERS,
    WORKLOADS,
    parse_shape,
)
from benchmarks.report.console import choices, fail, progress, wide_console
from benchmarks.report.tables import show
from benchmarks.timing import environment, host_memory

SERIES = {"tasks": SWEEP_TASKS, "slab": SWEEP_SLAB, "width": SWEEP_WIDTH}
QUICK_SIZES, QUICK_POINTS = 2, slice(0, 6, 2)  # points of a series: every other one


def layers(
    workload: Annotated[str | None, typer.Argument(help=f"One of {', '.join(WORKLOADS)}; none with --shape.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable: TASKSxSAMPLES,CHANNELS[,HEIGHT,WIDTH], as in 40x16,64,32,32; of layer normalisation "
            "TASKSxSAMPLES,TOKENS,WIDTH, as in 5x8,1024,384."
        ),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--layers", help="Of the workload: repeatable, or with commas. Default: all.")
    ] = None,
    tasks: Annotated[int | None, typer.Option(min=1, help="Default: the workload's.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Samples of each task. Default: the workload's, or what fits in memory.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(help=f"What follows: {', '.join(ACTIVATIONS)}. Default: what does in the workload, or none."),
    ] = None,
    dtype: Dtypes = None,
    memory_format: Formats = None,
    impl: Impls = None,
    device: OnDevice = None,
    quick: Annotated[bool, typer.Option("--quick", help="Layers of the two smallest sizes, few rounds.")] = False,
    fresh_memory: FreshMemory = False,
    json_path: Json = None,
    plot_path: Annotated[
        Path | None, typer.Option("--plot", help="The picture of a workload. Default: results/WORKLOAD.png.")
    ] = None,
) -> None:
    """The normalisation layers of a network, or layers of given shapes, fused and by every peer.

    Exits with 1 if a result differs from the reference.
    """
    console = wide_console()
    dtypes = choices(dtype or ["float32", "bfloat16"], list(DTYPES), "--dtype")
    formats = choices(memory_format or list(MEMORY_FORMATS), list(MEMORY_FORMATS), "--memory-format")
    if activation is not None:
        choices([activation], ACTIVATIONS, "--activation")
    if (workload is None) == (not shape):
        raise typer.BadParameter("give either a workload or a --shape", param_hint="WORKLOAD")
    where = parse_device(device)
    if workload is None:
        if names or tasks or batch:
            raise typer.BadParameter("--layers, --tasks and --batch go with a workload", param_hint="--shape")
        todo = _of_shapes(shape or [], dtypes, formats, where, activation or NO_ACTIVATION)
    else:
        from benchmarks.report.figures import time_in_copies
        from benchmarks.report.plot import save

        choices([workload], list(WORKLOADS), "WORKLOAD")
        network = WORKLOADS[workload]
        tasks = tasks or network.tasks
        chosen = parse_layers(names, network.layers)
        if quick:
            smallest = sorted({layer.elements for layer in chosen})[:QUICK_SIZES]
            chosen = tuple(layer for layer in chosen if layer.elements in smallest)
        reason = "given"
        if batch is None:
            available = environment.available_bytes(where)
            try:
                batch, reason = choose_batch(chosen, tasks, dtypes, where, available, network.batch)
            except ValueError as error:
                fail(str(error))
        console.print(f"{workload}: {tasks} tasks, batch {batch} ({reason})", highlight=False)
        todo = cases(
            chosen,
            tasks=tasks,
            batch=batch,
            dtypes=dtypes,
            memory_formats=formats,
            device=where,
            activation=activation or network.activation,
            workload=workload,
        )
    _check_activation(activation, todo)
    records = _measure(console, todo, impl, quick, fresh_memory)
    show(console, records, None)
    if workload is not None:
        path = plot_path or Path(f"results/{workload}.png")
        save(path, time_in_copies(records))
        console.print(f"plot: {path}", highlight=False, soft_wrap=True)
    _keep(console, json_path, records)


def sweep(
    series: Annotated[
        str,
        typer.Argument(help="tasks: 1 to 128; slab: positions of each task and channel; width: rows of layer norms."),
    ],
    batch: Annotated[
        int | None, typer.Option(min=2, help="Samples of each task. Default: what fits in memory.")
    ] = None,
    dtype: Dtypes = None,
    memory_format: Formats = None,
    impl: Impls = None,
    device: OnDevice = None,
    quick: Annotated[bool, typer.Option("--quick", help="Three points, few rounds.")] = False,
    fresh_memory: FreshMemory = False,
    json_path: Json = None,
) -> None:
    """One layer for more and more tasks, larger and larger, or of longer rows, fused and by every peer.

    The report draws them.

    Exits with 1 if a result differs from the reference.
    """
    console = wide_console()
    choices([series], list(SERIES), "SERIES")
    dtypes = choices(dtype or ["float32"], list(DTYPES), "--dtype")
    formats = choices(memory_format or ["contiguous"], list(MEMORY_FORMATS), "--memory-format")
    where = parse_device(device)
    points = QUICK_POINTS if quick else slice(None)
    try:
        todo = _sweep(console, series, points, batch, dtypes, formats, where)
    except ValueError as error:
        fail(str(error))
    records = _measure(console, todo, impl, quick, fresh_memory)
    show(console, records, None)
    _keep(console, json_path, records)
    if json_path is not None:
        console.print(f"pictures: python -m benchmarks report {json_path}", highlight=False, soft_wrap=True)


def _of_shapes(
    shapes: Sequence[str], dtypes: Sequence[str], formats: Sequence[str], device: torch.device, activation: str
) -> list[Case]:
    todo = []
    for text in dict.fromkeys(shapes):
        try:
            tasks, batch, layer = parse_shape(text)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--shape") from None
        todo += cases(
            [layer],
            tasks=tasks,
            batch=batch,
            dtypes=dtypes,
            memory_formats=formats,
            device=device,
            activation=activation,
        )
    return todo


def _check_activation(given: str | None, todo: Sequence[Case]) -> None:
    """Ends the command where an activation was asked for that no layer has."""
    if given not in (None, NO_ACTIVATION) and any(case.norm == LAYER_NORM for case in todo):
        raise typer.BadParameter("layer normalisation has no activation", param_hint="--activation")


def _sweep(
    console: Console,
    series: str,
    points: slice,
    batch: int | None,
    dtypes: Sequence[str],
    formats: Sequence[str],
    device: torch.device,
) -> list[Case]:
    """The cases of a series, as far as they fit in memory.

    Raises:
        ValueError: none does.
    """
    available = environment.available_bytes(device)
    counts, sizes = TASK_COUNTS[points], (WIDTH_LAYERS if series == "width" else SLAB_LAYERS)[points]
    if series == "tasks":
        sizes, reason = (TASKS_LAYER,), "given"
        if batch is None:
            batch, reason = choose_batch(sizes, max(counts), dtypes, device, available)
    else:
        counts, batch, reason = (SERIES_TASKS,), batch or SERIES_BATCH, "given" if batch else "the default"
        fitting = tuple(size for size in sizes if batch_that_fits([size], SERIES_TASKS, dtypes, available)[0] >= batch)
        if missing := [size.name for size in sizes if size not in fitting]:
            tell(console, f"{', '.join(missing)} left out: too large for {available / 2**30:.1f} GiB of memory")
        if not fitting:
            raise ValueError(f"no size fits in memory with batch {batch}; choose a smaller --batch")
        sizes = fitting
    tasks = f"{counts[0]} to {counts[-1]} tasks" if len(counts) > 1 else f"{counts[0]} tasks"
    console.print(f"{tasks}, batch {batch} ({reason}), {', '.join(size.name for size in sizes)}", highlight=False)
    return [
        case
        for count in counts
        for case in cases(
            sizes,
            tasks=count,
            batch=batch,
            dtypes=dtypes,
            memory_formats=formats,
            device=device,
            workload=SERIES[series],
        )
    ]


def _measure(
    console: Console, todo: Sequence[Case], impl: Sequence[str] | None, quick: bool, fresh_memory: bool
) -> list[Record]:
    impls = parse_impls(impl, todo[0].device, dict.fromkeys(case.norm for case in todo))
    impls = announce(console, impls, todo, fresh_memory)
    try:
        with host_memory.keep_freed(not fresh_memory), progress(console) as notify:
            return run_cases(todo, impls, QUICK_EFFORT if quick else FULL_EFFORT, notify, partial(tell, console))
    except MismatchError as error:
        fail(str(error))


def _keep(console: Console, path: Path | None, records: Sequence[Record]) -> None:
    if path is not None:
        write_json(path, records)
        console.print(f"records: {path}", highlight=False, soft_wrap=True)
