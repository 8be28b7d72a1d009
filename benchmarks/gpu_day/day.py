"""Runs the steps one after the other within the time, each in a process of its own, and archives what there is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.gpu_day import archive, journal, results, risky, sources
from benchmarks.gpu_day.results import StepResult
from benchmarks.gpu_day.step_api import Setting
from benchmarks.gpu_day.steps import Step
from benchmarks.gpu_day.worker import DEVICE_LOST
from benchmarks.timing import environment

ARCHIVE_SECONDS = 1.0  # of the cases that end within it, the last is archived
POLL_SECONDS = 0.1
LEAST = 5.0  # seconds without which no step is begun
CPU_PATIENCE = 4  # how much longer all may take there: tests run on slow machines
MOST_LOSSES = 5  # processes that a step may lose before it is given up
DEVICES = ("cuda", "cpu")


def run(
    setting: Setting,
    home: Path,
    seconds: float,
    steps: Sequence[Step],
    finished: Callable[[StepResult], None],
) -> list[StepResult]:
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
    archived, known = time.monotonic(), 0

    def keep() -> None:
        """Archives what was noted since, unless that was a moment ago."""
        nonlocal archived, known
        notes = folder / journal.FILE
        size = notes.stat().st_size if notes.exists() else 0
        if size != known and time.monotonic() - archived > ARCHIVE_SECONDS:
            archive.write(folder, home)
            archived, known = time.monotonic(), size

    done = []
    for step in steps:
        key = sources.digest(device=name, quick=setting.quick, torch=torch.__version__)  # anew, for one step builds
        result = results.read(folder, step.name, key)
        left = seconds - (time.monotonic() - started)
        if reason := step.why_not(setting):
            result.left_out, result.reason = True, reason
        elif result.status == "passed":
            result.kept = len(result.cases)  # an earlier call has done all of it
        elif left < LEAST:
            result.reason = "no time was left"
        else:
            result = run_step(step, setting, key, min(left, patience * step.seconds), keep)
        done.append(result)
        finished(result)
        archive.write(folder, home)
    return done


def run_step(step: Step, setting: Setting, key: str, seconds: float, keep: Callable[[], None]) -> StepResult:
    """Runs what is missing of a step; what crashes or hangs is a failed case, and a new process goes on behind it.

    Args:
        step: its cases and how long each may take.
        setting: where they run; the log is written to ``<step>.log`` in its folder.
        key: under which results are noted.
        seconds: after which the process is ended, with all that it has started.
        keep: is called again and again.
    """
    log = Path(setting.folder) / f"{step.name}.log"
    log.write_text("")
    deadline = time.monotonic() + seconds
    journal.note(setting.folder, "step", step=step.name, key=key)
    for _ in range(MOST_LOSSES):
        begun, lost = log.stat().st_size, risky.losses(setting.folder)
        status = _run_worker(step, setting, key, deadline, log, keep)
        result = results.read(setting.folder, step.name, key)
        if status is None:
            risky.take_back(setting.folder, lost)
            result.reason = "its time was over"
            return result
        if result.running:
            message = f"{_how_it_ended(status)}{_why(log, begun)}"
            journal.note(
                setting.folder, "case", step=step.name, key=key, case=result.running, status="failed", message=message
            )
        elif status not in (0, DEVICE_LOST):
            result.problem = f"the step's process {_how_it_ended(status)}{_why(log, begun)}"
            return result
        elif status == 0:
            return result
    result = results.read(setting.folder, step.name, key)
    if result.missing:
        result.problem = f"given up after {MOST_LOSSES} crashes, {len(result.missing)} cases were not tried"
    return result


def _run_worker(
    step: Step, setting: Setting, key: str, deadline: float, log: Path, keep: Callable[[], None]
) -> int | None:
    """How the process ended; None where its time was over."""
    patience = step.case_seconds * (CPU_PATIENCE if setting.device == "cpu" else 1)
    order = [step.name, step.cases, key, str(patience), json.dumps(asdict(setting))]
    with log.open("a") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu_day.worker", *order],
            stdin=subprocess.PIPE,  # open until the end: the worker ends with it
            stdout=output,
            stderr=output,
            cwd=sources.ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(sources.ROOT), *filter(None, sys.path)])},
            start_new_session=True,  # so that what it starts can be ended with it
        )
    try:
        while time.monotonic() < deadline:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(POLL_SECONDS)
            keep()
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # one that waits for a driver cannot be ended
            process.wait(10)
        assert process.stdin is not None
        process.stdin.close()


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _why(log: Path, begun: int) -> str:
    """What faulthandler says in what was written since the log had ``begun`` bytes; else its last line."""
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line for line in lines if line.startswith(("Timeout (", "Fatal Python error"))] or lines[-1:]
    return "".join(f": {line}" for line in said[:1])
