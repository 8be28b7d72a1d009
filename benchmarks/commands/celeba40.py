"""The command that measures the 40-task CelebA network: its layers, and a training step."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

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
from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS, cases, choose_batch
from benchmarks.layers.run import FULL_EFFORT, QUICK_EFFORT, part_of, run_cases, work
from benchmarks.layers.verify import MismatchError
from benchmarks.network import celeba40 as runs
from benchmarks.network.data import DataError
from benchmarks.profile.predict import predictions
from benchmarks.profile.predict import table as prediction_table
from benchmarks.records.read import network_file
from benchmarks.records.record import write_json
from benchmarks.records.workloads import CELEBA, NO_ACTIVATION
from benchmarks.report.console import choices, fail, progress, wide_console
from benchmarks.report.tables import show
from benchmarks.timing import environment, host_memory
from benchmarks.timing.measure import Effort
from benchmarks.timing.self_test import self_test
from tsbn_kernels.backends.plan import DEVICES, devices

NETWORK_EFFORT, QUICK_NETWORK_EFFORT = Effort(3, 5, 20.0), Effort(3, 3)
QUICK_LAYERS, QUICK_BATCH = ("bn6", "bn8"), 16
NETWORK_BATCH = 8
QUICK_NETWORK_TASKS, QUICK_NETWORK_BATCH = 4, 4


def celeba40(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    batch: Annotated[
        int | None, typer.Option(min=2, help="Samples of each task. Default: what fits in memory, on a CPU at most 16.")
    ] = None,
    dtype: Dtypes = None,
    memory_format: Formats = None,
    impl: Impls = None,
    names: Annotated[list[str] | None, typer.Option("--layers", help="Repeatable, or with commas: bn1 to bn9.")] = None,
    relu: Annotated[
        bool, typer.Option("--relu", help="With a ReLU: inside the fused layer, behind the others.")
    ] = False,
    device: OnDevice = None,
    network: Annotated[bool, typer.Option(help="Also a training step of the whole network.")] = True,
    network_batch: Annotated[int | None, typer.Option(min=4, help="Images of the training step.")] = None,
    data: Annotated[Path | None, typer.Option(help="CelebA folder. Default: faces that scikit-image holds.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Within two minutes: layers bn6 to bn9, few rounds, a small network.")
    ] = False,
    fresh_memory: FreshMemory = False,
    predict: Annotated[
        str | None,
        typer.Option(help=f"Measure nothing: bytes and time predicted on NVIDIA GPUs of {', '.join(DEVICES)}."),
    ] = None,
    json_path: Json = None,
    plot_path: Annotated[Path, typer.Option("--plot", help="The picture.")] = Path("results/celeba40.png"),
) -> None:
    """The normalisation layers of the 40-task CelebA network, fused and by every peer, and a training step of it.

    Exits with 1 if a result differs from the reference.
    """
    console = wide_console()
    dtypes = choices(dtype or ["float32", "bfloat16"], list(DTYPES), "--dtype")
    formats = choices(memory_format or list(MEMORY_FORMATS), list(MEMORY_FORMATS), "--memory-format")
    chosen_layers = parse_layers(names or (QUICK_LAYERS if quick else None), CELEBA.layers)
    if predict is not None:
        try:
            paper = devices.named(predict)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--predict") from None
        if not paper.target.startswith("sm_"):
            raise typer.BadParameter(f"{paper.name} does not run CUDA", param_hint="--predict")
        rows = predictions(chosen_layers, tasks, batch or CELEBA.batch, dtypes, formats, paper)
        console.print(f"{tasks} tasks, batch {batch or CELEBA.batch}", highlight=False)
        console.print(prediction_table(rows, paper))
        return
    from benchmarks.report.figures import time_in_copies
    from benchmarks.report.plot import save

    where = parse_device(device)
    impls = parse_impls(impl, where)
    network_tasks = min(tasks, QUICK_NETWORK_TASKS) if quick else tasks
    network_batch = network_batch or (QUICK_NETWORK_BATCH if quick else NETWORK_BATCH)
    try:
        faces = runs.load_faces(data, network_batch, network_tasks) if network else None
        if batch is not None:
            samples, reason = batch, "given"
        elif quick:
            samples, reason = QUICK_BATCH, "of --quick"
        else:
            available = environment.available_bytes(where)
            samples, reason = choose_batch(chosen_layers, tasks, dtypes, where, available)
    except (DataError, ValueError) as error:
        fail(str(error))
    todo = cases(
        chosen_layers,
        tasks=tasks,
        batch=samples,
        dtypes=dtypes,
        memory_formats=formats,
        device=where,
        activation="relu" if relu else NO_ACTIVATION,
        workload=CELEBA.name,
    )
    impls = announce(console, impls, todo, fresh_memory)
    console.print(f"{tasks} tasks, batch {samples} ({reason})", highlight=False)
    if faces is not None:
        console.print(f"network: {network_tasks} tasks, batch {network_batch}, {faces.source}", highlight=False)
    tested = self_test(where)
    console.print(str(tested), style=None if tested.passed else "yellow", highlight=False)

    network_work = (network_tasks * network_batch * 5.0) if faces is not None else 0.0
    begin, end = (part / (work(todo) + network_work) for part in (network_work / 2, work(todo) + network_work / 2))
    network_run = None
    try:
        with host_memory.keep_freed(not fresh_memory), progress(console) as notify:
            steps = {}
            if faces is not None:
                notify("network: loss, gradients and memory of a step", 0.0)
                steps = runs.verify_network(faces, where, impls)
            effort = QUICK_EFFORT if quick else FULL_EFFORT
            records = run_cases(todo, impls, effort, part_of(notify, begin, end), partial(tell, console))
            if json_path is not None:
                write_json(json_path, records)  # what there is: the network's steps take long, and may be interrupted
            if faces is not None:
                notify("network: time of a training step", end)
                network_effort = QUICK_NETWORK_EFFORT if quick else NETWORK_EFFORT
                network_run, more = runs.run_network(faces, where, network_effort, steps)
                records += more
    except MismatchError as error:
        fail(str(error))

    show(console, records, network_run)
    save(plot_path, time_in_copies(records))
    console.print(f"plot: {plot_path}", highlight=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, records)
        console.print(f"records: {json_path}", highlight=False, soft_wrap=True)
        if network_run is not None:
            beside = network_file(json_path)
            beside.write_text(json.dumps(asdict(network_run), indent=1) + "\n")
            console.print(f"network, with its memory and differences: {beside}", highlight=False, soft_wrap=True)
