"""Watches the worker of a step: what crashes or hangs is a failed case, and a fresh worker goes on behind it."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import results
from benchmarks.gpu_check.case import Setting
from benchmarks.gpu_check.results import ROOT, CaseResult, StepResult
from benchmarks.gpu_check.worker import DEVICE_LOST

MOST_LOSSES = 5  # workers that a step may lose before it is given up
START_SECONDS = 180.0  # until the first case: PyTorch may come from a slow disk
END_SECONDS = 30.0  # from its last event to its end
LAST_LINES = 25
SAVE_SECONDS = 1.0

# Called with the result after each event, and the name of the case that runs.
Notify = Callable[[StepResult, str], None]


@dataclass(frozen=True)
class Limits:
    """In seconds.

    Attributes:
        enough: of the cases that must be done.
        step: of the step, once those are done.
        case: of one case.
    """

    enough: float
    step: float
    case: float


class Worker:
    """A process that runs a step's cases."""

    def __init__(self, cases: str, setting: Setting, done: list[str], log: Path) -> None:
        path = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
        with log.open("a") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_check.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
                text=True,
                start_new_session=True,  # so that what it starts can be ended with it
            )
        assert self._process.stdin is not None
        self._order = self._process.stdin  # open until the end: the worker ends with it
        with contextlib.suppress(BrokenPipeError):  # it has died: the end of its events says so
            self._order.write(json.dumps({"cases": cases, "setting": asdict(setting), "done": done}) + "\n")
            self._order.flush()
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                self._events.put(json.loads(line))
            except ValueError:
                break  # cut off in the middle of a line
        self._events.put(None)

    def event(self, seconds: float) -> dict[str, Any] | None:
        """The next event; None after the last one.

        Raises:
            queue.Empty: none came in time.
        """
        return self._events.get(timeout=max(0.0, seconds))

    def status(self) -> int | None:
        """How the process ended; None where it does not."""
        self._wait(END_SECONDS)
        return self._process.poll()

    def end(self) -> None:
        """Ends it and all that it has started; SIGABRT first, which leaves a traceback in the log."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGABRT)
            self._wait(3)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):
            self._order.close()
        self._wait(10)  # one that waits for a driver cannot be ended; the next has a process of its own

    def _wait(self, seconds: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)


def run_step(
    cases: str, setting: Setting, result: StepResult, limits: Limits, folder: Path, notify: Notify
) -> StepResult:
    """Runs what ``result`` does not have yet, and adds it there and to ``folder/<step>.json``.

    Args:
        cases: ``module:function`` that gives the step's cases for a setting.
        setting: where they run.
        result: what an earlier call has found, or an empty one.
        limits: of the time. What is running when it is over is left for a later call.
        folder: where the log is written as well, to ``<step>.log``.
        notify: is told of every event.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{result.name}.log"
    log.write_text("")
    start = time.monotonic()
    losses = 0
    try:
        while _watch(cases, setting, result, limits, start, log, notify):
            losses += 1
            if losses == MOST_LOSSES and result.missing:
                result.problem = f"given up after {losses} crashes, {len(result.missing)} cases were not tried"
                break
    finally:
        results.save(folder, result)
    return result


def _watch(
    cases: str, setting: Setting, result: StepResult, limits: Limits, start: float, log: Path, notify: Notify
) -> bool:
    """Follows one worker of a step that began at ``start``; whether it was lost, and another should go on."""
    worker = Worker(cases, setting, list(result.cases), log)
    current, started, saved = "", time.monotonic(), time.monotonic()
    begun = log.stat().st_size  # where what the current case has written to the log begins
    patience = START_SECONDS

    def lost(message: str) -> bool:
        worker.end()
        if current:
            seconds = time.monotonic() - started
            result.cases[current] = CaseResult("failed", message, seconds, output=_last_lines(log, begun))
            notify(result, "")
        else:
            result.output = _last_lines(log, begun)
            result.problem = ": ".join([f"the step's process {message}", *result.output.splitlines()[-1:]])
        return bool(current)

    try:
        while True:
            limit = started + patience
            deadline = start + (limits.step if result.has_enough else limits.enough)
            try:
                event = worker.event(min(limit, deadline) - time.monotonic())
            except queue.Empty:
                if time.monotonic() >= deadline:
                    result.reason = "its time was over"
                    return False
                return lost(f"no answer within {patience:.0f} s")
            if event is None:
                status = worker.status()
                if status == DEVICE_LOST and not current:
                    return bool(result.missing)
                return lost(_how_it_ended(status)) if current or status != 0 else False
            if "left_out" in event:
                result.left_out, result.reason = True, event["left_out"]
            elif "planned" in event:
                result.planned, result.enough, result.about = event["planned"], event["enough"], event["about"]
            elif "begins" in event:
                current, patience, begun = event["begins"], limits.case, event["log"]
            else:
                current, name = "", event.pop("ends")
                output = _last_lines(log, begun) if event["status"] == "failed" else ""
                result.cases[name] = CaseResult(**event, output=output)
                if time.monotonic() - saved > SAVE_SECONDS:
                    results.save(log.parent, result)
                    saved = time.monotonic()
            started = time.monotonic()
            notify(result, current)
    finally:
        worker.end()


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "did not end"
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _last_lines(log: Path, begun: int) -> str:
    """Of what was written to the log since it had ``begun`` bytes."""
    with log.open("rb") as file:
        file.seek(begun)
        lines = file.read().decode(errors="replace").splitlines()
    return "\n".join(lines[-LAST_LINES:])
