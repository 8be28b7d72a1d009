"""What the measuring commands share: options, how they are read, and what is said before the first measurement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.layers.cases import DTYPES, MEMORY_FORMATS, Case
from benchmarks.layers.registry import NAMES, defaults, runnable
from benchmarks.records.workloads import BATCH_NORM, Layer, select_layers
from benchmarks.report.console import choices, fail
from benchmarks.timing import environment, host_memory

Dtypes = Annotated[list[str] | None, typer.Option("--dtype", help=f"Repeatable: {', '.join(DTYPES)}.")]
Formats = Annotated[list[str] | None, typer.Option("--memory-format", help=f"Repeatable: {', '.join(MEMORY_FORMATS)}.")]
Impls = Annotated[
    list[str] | None,
    typer.Option("--impl", help=f"Repeatable: {', '.join(NAMES)}. Default: all, on a CPU those quickly compiled."),
]
OnDevice = Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... Default: the accelerator, or else cpu.")]
FreshMemory = Annotated[
    bool,
    typer.Option(
        "--fresh-memory",
        help="Let the C library return freed memory, as by default: each step pays for page faults. Else it is kept.",
    ),
]
Json = Annotated[Path | None, typer.Option("--json", help="Write one record for each measurement.")]


def parse_device(name: str | None) -> torch.device:
    """The device of an option; ends the command where there is none."""
    try:
        return environment.parse_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def parse_impls(given: Sequence[str] | None, device: torch.device, norms: Iterable[str] = (BATCH_NORM,)) -> list[str]:
    """The implementations of an option, or the defaults for what is normalised."""
    return choices(given or defaults(device, norms), NAMES, "--impl")


def parse_layers(names: Sequence[str] | None, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """Reads an option that may be repeated or have commas; none means all. Ends the command where a name is unknown."""
    try:
        return select_layers([name for part in names or () for name in part.split(",")], layers)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--layers") from None


def announce(console: Console, impls: Sequence[str], todo: Sequence[Case], fresh_memory: bool) -> list[str]:
    """Prints the machine and what cannot run; gives what can, and ends the command where nothing does."""
    device = todo[0].device
    found, skipped = runnable(impls, todo)
    for name, why in skipped.items():
        tell(console, f"{name} is left out: {why}")
    if not found:
        fail("no implementation is left to measure; choose another --impl")
    console.print(machine_line(device), highlight=False)
    if device.type == "cpu":
        kept = host_memory.will_keep(not fresh_memory)
        console.print(f"freed memory {'is kept for the next step' if kept else 'goes back to the system'}")
    return found


def machine_line(device: torch.device) -> str:
    """The device, and the versions that its times depend on."""
    versions = environment.versions(device)
    return (
        f"{environment.device_name(device)} ({versions['cpu']}, {versions['threads']} threads), "
        f"PyTorch {versions['torch']}, backend {versions['backend']}"
    )


def tell(console: Console, text: str) -> None:
    """Says what is left out."""
    console.print(text, style="yellow", markup=False, highlight=False)
