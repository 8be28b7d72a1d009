"""The command line."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import celeba40 as runs
from benchmarks import environment, host_memory, report, terminal
from benchmarks.cases import DTYPES, MEMORY_FORMATS, cases, choose_batch
from benchmarks.cli_fit import fit_plans
from benchmarks.cli_gpu_check import gpu_check
from benchmarks.cli_gpu_day import gpu_day
from benchmarks.cli_layers import (
    Device,
    Dtypes,
    Formats,
    FreshMemory,
    Impls,
    Json,
    announce,
    layers,
    parse_device,
    parse_impls,
    parse_layers,
    sweep,
    tell,
)
from benchmarks.cli_profile import profile
from benchmarks.cli_report import compare
from benchmarks.cli_report import report as report_command
from benchmarks.cli_train import train
from benchmarks.data import DataError
from benchmarks.fan_out import TOLERANCE, outcome
from benchmarks.layers import FULL_PLAN, QUICK_PLAN, part_of, run_cases, work
from benchmarks.load import network_file
from benchmarks.measure import Plan
from benchmarks.predict import predictions
from benchmarks.predict import table as prediction_table
from benchmarks.records import write_json
from benchmarks.self_test import self_test
from benchmarks.verify import MismatchError
from benchmarks.workloads import CELEBA, NO_ACTIVATION
from tsbn_kernels.plan import DEVICES, devices

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Benchmarks of the fused layers.")

NETWORK_PLAN, QUICK_NETWORK_PLAN = Plan(3, 5, 20.0), Plan(3, 3)
QUICK_LAYERS, QUICK_BATCH = ("bn6", "bn8"), 16
NETWORK_BATCH = 8
QUICK_NETWORK_TASKS, QUICK_NETWORK_BATCH = 4, 4


@app.callback()
def _commands() -> None:
    """Benchmarks of the fused layers."""


app.command()(layers)
app.command()(sweep)
app.command()(train)
app.command()(profile)
app.command("gpu-check")(gpu_check)
app.command("gpu-day")(gpu_day)
app.command("fit-plans")(fit_plans)
app.command("report")(report_command)
app.command()(compare)


@app.command()
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
    device: Device = None,
    network: Annotated[bool, typer.Option(help="Also a training step of the whole network.")] = True,
    network_batch: Annotated[int | None, typer.Option(min=4, help="Images of the training step.")] = None,
    data: Annotated[Path | None, typer.Option(help="CelebA folder. Default: faces that scikit-image holds.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Within two minutes: layers bn6 to bn9, few rounds, a small network.")
    ] = False,
    fresh_memory: FreshMemory = False,
    predict: Annotated[
        str | None,
        typer.Option(help=f"Measure nothing: bytes and time predicted for the CUDA kernels on {', '.join(DEVICES)}."),
    ] = None,
    json_path: Json = None,
    plot_path: Annotated[Path, typer.Option("--plot", help="The picture.")] = Path("results/celeba40.png"),
) -> None:
    """The normalisation layers of the 40-task CelebA network, fused and by every peer, and a training step of it.

    Exits with 1 if a result differs from the reference.
    """
    console = terminal.console()
    dtypes = terminal.choices(dtype or ["float32", "bfloat16"], list(DTYPES), "--dtype")
    formats = terminal.choices(memory_format or list(MEMORY_FORMATS), list(MEMORY_FORMATS), "--memory-format")
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
    from benchmarks import plot

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
        terminal.fail(str(error))
    todo = cases(
        chosen_layers, tasks=tasks, batch=samples, dtypes=dtypes, memory_formats=formats, device=where,
        activation="relu" if relu else NO_ACTIVATION, workload=CELEBA.name,
    )  # fmt: skip
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
        with host_memory.keep_freed(not fresh_memory), terminal.progress(console) as notify:
            steps = {}
            if faces is not None:
                notify("network: loss, gradients and memory of a step", 0.0)
                steps = runs.verify_network(faces, where, impls)
            plan = QUICK_PLAN if quick else FULL_PLAN
            records = run_cases(todo, impls, plan, part_of(notify, begin, end), partial(tell, console))
            if json_path is not None:
                write_json(json_path, records)  # what there is: the network's steps take long, and may be interrupted
            if faces is not None:
                notify("network: time of a training step", end)
                network_plan = QUICK_NETWORK_PLAN if quick else NETWORK_PLAN
                network_run, more = runs.run_network(faces, where, network_plan, steps)
                records += more
    except MismatchError as error:
        terminal.fail(str(error))

    report.show(console, records, network_run)
    plot.draw(plot_path, records)
    console.print(f"plot: {plot_path}", highlight=False, soft_wrap=True)
    if json_path is not None:
        write_json(json_path, records)
        console.print(f"records: {json_path}", highlight=False, soft_wrap=True)
        if network_run is not None:
            beside = network_file(json_path)
            beside.write_text(json.dumps(asdict(network_run), indent=1) + "\n")
            console.print(f"network, with its memory and differences: {beside}", highlight=False, soft_wrap=True)


@app.command("fan-out")
def fan_out(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    batch: Annotated[int, typer.Option(min=2, help="Samples.")] = 8,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: the accelerator, or else cpu.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
    fresh_memory: FreshMemory = False,
) -> None:
    """The first layer of the CelebA network and its ReLU: one input fanned out, against expanding it first."""
    where = parse_device(device)
    plan = QUICK_PLAN if quick else FULL_PLAN
    outcomes = []
    console = terminal.console()
    try:
        for dtype in TOLERANCE:
            for memory_format in MEMORY_FORMATS:
                with host_memory.keep_freed(not fresh_memory), console.status(f"{dtype} {memory_format}"):
                    outcomes.append(outcome(tasks, batch, dtype, memory_format, where, plan))
    except MismatchError as error:
        terminal.fail(str(error))
    console.print(report.fan_out_table(outcomes, tasks, batch))


@app.command()
def host(
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    quick: Annotated[bool, typer.Option("--quick", help="Few rounds.")] = False,
) -> None:
    """What a call of the Triton backend costs on the host, by Triton's launcher on a driver that launches nothing."""
    try:
        from benchmarks.fake_driver import COMPILER
        from benchmarks.host import PLAN, host_times
    except ImportError as error:
        terminal.fail(f"the Triton backend is not installed: {error}")
    if COMPILER is None:
        terminal.fail("Triton's launcher needs a C compiler")
    times, launches = host_times(tasks, QUICK_PLAN if quick else PLAN)
    title = f"{tasks} tasks, {launches} launches of the fused layer"
    table = Table("host time of one call, us", "forward", "forward + backward", title=title)
    for name, passes in times.items():
        table.add_row(name, *(f"{1e6 * each.median:.0f} ± {1e6 * each.iqr / 2:.0f}" for each in passes))
    Console().print(table)


@app.command("compiled-kernels")
def compiled_kernels_command(
    path: Annotated[
        Path | None, typer.Option("--csv", help="Default: the table beside this package's sources.")
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Compile all anew, not only what has changed since the table was written.")
    ] = False,
) -> None:
    """Compile the Triton kernels of known networks' layers for every kind of GPU, and write what they take.

    No GPU is needed. All take a quarter of an hour on two cores. Exits with 1 if a kernel spills or exceeds its budget.
    """
    from benchmarks import compiled_kernels

    console = Console()
    path = path or compiled_kernels.TABLE
    known = compiled_kernels.by_fingerprint(compiled_kernels.read(path)) if path.exists() and not everything else {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compiling", total=None)

        def notify(left: int) -> None:
            total = progress.tasks[0].total or left
            progress.update(bar, total=total, completed=total - left)

        table = compiled_kernels.rows(compiled_kernels.everything(), known, notify=notify)
    compiled_kernels.write(path, table)
    console.print(f"{len(table)} kernels: {path}", highlight=False, soft_wrap=True)
    if over := [row for row in table if not row.within_budget]:
        terminal.fail("spills, or more than the budget:\n" + "\n".join(map(str, over)))


def main() -> None:
    """Entry of ``python -m benchmarks``."""
    torch.set_float32_matmul_precision("highest")
    app()
