"""The command that checks a machine with a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import terminal
from benchmarks.gpu_check import check, verdict
from benchmarks.gpu_check.case import Setting
from benchmarks.gpu_check.results import StepResult
from benchmarks.gpu_check.steps import ENVIRONMENT, STEPS

NAMES = [step.name for step in STEPS if step.name != ENVIRONMENT]


def gpu_check(
    device: Annotated[str | None, typer.Option(help="cuda, xpu, cpu, ... Default: the accelerator.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/gpu-check"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what earlier calls have finished.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few small cases of each step: does the check itself run?")
    ] = False,
    seconds: Annotated[float, typer.Option(min=1, help="For all of it.")] = 600.0,
    step: Annotated[list[str] | None, typer.Option(help=f"Repeatable: {', '.join(NAMES)}. Default: all.")] = None,
) -> None:
    """All that was proved without a GPU, for real: results, determinism, graphs, streams, speed; then a verdict.

    Each step runs in a process of its own: a crash or a hang is a failed case, and the rest goes on. A later call
    goes on where an earlier one stopped, and runs again what failed. Exits with 1 if something failed or had no time.
    """
    only = terminal.choices(step or [], NAMES, "--step")
    setting = Setting(_device(device), quick, str(out.resolve()))
    console = terminal.wide_console()
    columns = TextColumn("{task.fields[step]}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        bar = progress.add_task("", step="", total=None)

        def notify(result: StepResult, case: str) -> None:
            progress.update(
                bar, step=result.name, total=len(result.planned) or None, completed=len(result.cases),
                description=escape(case), refresh=True,
            )  # fmt: skip

        def finished(result: StepResult) -> None:
            colour = verdict.COLOURS[result.status]
            console.print(
                f"[{colour}]{result.status:10}[/] {result.name}: {escape(result.summary)}",
                highlight=False,
                soft_wrap=True,
            )

        found = check.run(setting, seconds, notify, finished, only=only, fresh=fresh, steps=STEPS)
    verdict.write(found)
    console.print(verdict.table(found))
    console.print(verdict.sentence(found), highlight=False, soft_wrap=True)
    console.print(f"summary: {Path(setting.folder) / verdict.SUMMARY}", highlight=False, soft_wrap=True)
    if page := verdict.page(found):
        console.print(f"report: {page}", highlight=False, soft_wrap=True)
    if not verdict.is_good(found):
        raise typer.Exit(1)


def _device(name: str | None) -> str:
    """Without touching it: a process that holds a device lost to a kernel could not go on.

    Raises:
        typer.BadParameter: it is no device, or there is none but the CPU and none was named.
    """
    if name is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        if accelerator is None:
            raise typer.BadParameter(
                "PyTorch finds no accelerator here; `--device cpu` goes through every step on the CPU",
                param_hint="--device",
            )
        return accelerator.type
    try:
        return str(torch.device(name))
    except RuntimeError as error:
        raise typer.BadParameter(str(error).splitlines()[0], param_hint="--device") from None
