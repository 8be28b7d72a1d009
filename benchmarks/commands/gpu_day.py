"""The command for a rented GPU."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu_day import archive, day, table
from benchmarks.gpu_day.clocks import Clocks
from benchmarks.gpu_day.results import StepResult
from benchmarks.gpu_day.step_api import Setting
from benchmarks.gpu_day.steps import STEPS
from benchmarks.report.console import fail
from tsbn_kernels.backends.plan import DEVICES


def gpu_day(
    out: Annotated[Path, typer.Option(help="Folder of the archive, which is its only file.")] = Path("results/gpu-day"),
    seconds: Annotated[float, typer.Option(min=1, help="For all of it.")] = 480.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu: every step, small.")] = "cuda",
    compile_only: Annotated[
        str | None,
        typer.Option(help="Only compile Triton's kernels, for sm_90 and the like, without a GPU."),
    ] = None,
) -> None:
    """What decides about the kernels on a GPU, most valuable first, in one archive that is whole at any time.

    Needs no network and builds what is missing. A later call goes on where the archive ends. Exits with 1 if something
    failed.
    """
    if compile_only is not None:
        _compile(compile_only)
        return
    if device not in day.DEVICES:
        raise typer.BadParameter(f"expected one of {', '.join(day.DEVICES)}, got {device!r}", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no GPU here; `--device cpu` goes through all", param_hint="--device")
    if device == "cpu":
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of small tensors wait for each other most of the time
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    steps: list[StepResult] = []
    started = time.monotonic()

    def finished(result: StepResult) -> None:
        steps.append(result)
        line = f"{time.monotonic() - started:4.0f} s  {result.status:10} {result.name}: {result.summary}"
        print(line[:200], flush=True)

    out.mkdir(parents=True, exist_ok=True)
    home = out.resolve() / archive.NAME
    with tempfile.TemporaryDirectory(prefix="gpu-day-") as name, Clocks(Path(name)):
        folder = Path(name)
        try:
            day.run(Setting(device, device == "cpu", name), home, seconds, STEPS, finished)
        finally:
            found = table.text(folder, steps)
            (folder / table.FILE).write_text(found)
            archive.write(folder, home)
            print(f"{found}{home}: {home.stat().st_size / 2**20:.2f} MiB", flush=True)
    if any(step.status == "failed" for step in steps):
        raise typer.Exit(1)


def _compile(target: str) -> None:
    import triton

    from benchmarks.gpu_day import kernels

    on_paper = next((device for device in DEVICES.values() if device.target == target), None)
    if on_paper is None:
        known = dict.fromkeys(device.target for device in DEVICES.values())
        raise typer.BadParameter(f"expected one of {', '.join(known)}, got {target!r}", param_hint="--compile-only")
    for of in (kernels.planned, kernels.swept):
        made = kernels.compile_all(of, on_paper)
        print(f"{made.count} kernels ({of.__name__}) for {target} in {made.seconds:.0f} s: {triton.knobs.cache.dir}")
        if made.errors:
            fail("\n".join(made.errors))
