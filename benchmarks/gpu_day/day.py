"""Runs the steps one after the other within the time, and archives what there is after every case."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import environment
from benchmarks.gpu_check import results
from benchmarks.gpu_check.case import Setting
from benchmarks.gpu_check.results import StepResult
from benchmarks.gpu_check.supervise import Limits, run_step
from benchmarks.gpu_day import archive, risky
from benchmarks.gpu_day.steps import Step, for_backends

ARCHIVE_SECONDS = 1.0  # of the cases that end within it, the last is archived
LEAST = 5.0  # seconds without which no step is begun
CPU_PATIENCE = 4  # how much longer all may take there: tests run on slow machines
BACKENDS = {"cuda": ("triton", "cuda"), "cpu": ("cpu",)}


def run(
    setting: Setting, home: Path, seconds: float, steps: Sequence[Step],
    finished: Callable[[StepResult], None],
) -> list[StepResult]:  # fmt: skip
    """Runs what an earlier call has not finished.

    Args:
        setting: the device, and the folder of what the archive is made of.
        home: the archive; what is in it has been done.
        seconds: for all of it.
        steps: in their order.
        finished: is told of every step at its end.
    """
    started = time.monotonic()
    folder = Path(setting.folder)
    archive.unpack(home, folder)
    risky.forget(folder)
    archive.write(folder, home)
    name = environment.device_name(torch.device(setting.device))
    patience = CPU_PATIENCE if setting.device == "cpu" else 1

    archived = time.monotonic()

    def told(result: StepResult, case: str) -> None:
        nonlocal archived
        if not case and time.monotonic() - archived > ARCHIVE_SECONDS:
            archive.write(folder, home)
            archived = time.monotonic()

    done = []
    for step in for_backends(steps, BACKENDS[torch.device(setting.device).type]):
        key = results.key_of(device=name, quick=setting.quick, torch=torch.__version__)  # anew, for one step builds
        result = results.load(folder, step.name, key)
        left = seconds - (time.monotonic() - started)
        if reason := step.why_not(setting):
            result.left_out, result.reason = True, reason
        elif result.planned and not result.missing:
            pass  # an earlier call has done all of it
        elif left < LEAST:
            result.reason = "no time was left"
        else:
            most = min(left, patience * step.seconds)
            limits = Limits(enough=most, step=most, case=patience * step.case_seconds)
            run_step(step.cases, replace(setting, backend=step.backend), result, limits, folder, told)
        done.append(result)
        finished(result)
        archive.write(folder, home)
    return done
