"""The profiling command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.commands.options import OnDevice, parse_device
from benchmarks.network import celeba40
from benchmarks.network.data import DataError
from benchmarks.network.training import prepared_step
from benchmarks.profile import ncu
from benchmarks.profile.profiling import NORMALISATION, profile_step
from benchmarks.profile.tables import kinds_table, launches_table, operators_table
from benchmarks.records.network_run import BEST, VARIANTS
from benchmarks.report.console import choices, fail, wide_console

DEFAULT_VARIANTS = ("loop", "fused", BEST)
MOST = 15  # operators of a table


def profile(
    variant: Annotated[
        list[str] | None,
        typer.Option(help=f"Repeatable: {'; '.join(VARIANTS)}. Default: {'; '.join(DEFAULT_VARIANTS)}."),
    ] = None,
    tasks: Annotated[int, typer.Option(min=1, help="Number of tasks.")] = 40,
    batch: Annotated[int, typer.Option(min=2, help="Images of a step.")] = 8,
    device: OnDevice = None,
    data: Annotated[Path | None, typer.Option(help="CelebA folder. Default: faces that scikit-image holds.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of the Chrome traces.")] = Path("results/profile"),
    nvtx: Annotated[
        bool, typer.Option("--nvtx", help="Mark the operators as NVTX ranges for Nsight, and profile nothing here.")
    ] = False,
    ncu_csv: Annotated[Path | None, typer.Option(help="Only show what the printed ncu command has written.")] = None,
) -> None:
    """Where the time of a training step of the CelebA network goes, before and after fusing.

    Writes a trace for chrome://tracing or Perfetto for each variant; on CUDA prints the ncu command for our kernels.
    """
    console = wide_console()
    if ncu_csv is not None:
        try:
            console.print(launches_table(ncu.read(ncu_csv)))
        except (OSError, ncu.NcuError) as error:
            fail(str(error))
        return
    variants = choices(variant or list(DEFAULT_VARIANTS), list(VARIANTS), "--variant")
    where = parse_device(device)
    try:
        faces = celeba40.load_faces(data, batch, tasks)
    except DataError as error:
        fail(str(error))
    profiles = {}
    for name in variants:
        step, _ = prepared_step(name, faces, where)
        if nvtx:
            step()
            with torch.autograd.profiler.emit_nvtx():
                step()
            continue
        trace = output / f"{name.replace(',', '').replace(' ', '_')}.json.gz"
        with console.status(f"{name}: a step"):
            profiles[name] = profile_step(step, where, trace)
        console.print(f"trace: {trace}", highlight=False, soft_wrap=True)
    for name, found in profiles.items():
        console.print(operators_table(name, found, MOST))
    if not profiles:
        return
    console.print(kinds_table(profiles))
    for name, found in profiles.items():
        console.print(
            f"normalisation is {100 * found.share_of(NORMALISATION):.0f} % of a step, {name}", highlight=False
        )
    last = profiles[variants[-1]]
    if last.kernels:
        program = [
            "python",
            "-m",
            "benchmarks",
            "profile",
            "--nvtx",
            "--variant",
            variants[-1],
            "--tasks",
            str(tasks),
            "--batch",
            str(batch),
            "--device",
            str(where),
        ]
        table = output / "ncu.csv"
        console.print("\nNsight Compute, and the table of what it finds:", highlight=False)
        console.print(ncu.command(last.kernels, table, program), highlight=False, soft_wrap=True)
        console.print(f"python -m benchmarks profile --ncu-csv {table}", highlight=False, soft_wrap=True)
