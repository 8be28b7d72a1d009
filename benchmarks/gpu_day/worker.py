"""``python -m benchmarks.gpu_day.worker``: runs the cases of one step that are still to be done, and notes each."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from functools import partial

from benchmarks.gpu_day import journal, results
from benchmarks.gpu_day.results import CaseResult
from benchmarks.gpu_day.step_api import Measurement, Setting, SkippedError

DEVICE_LOST = 3  # exit status: a kernel has left the device unusable to this process
START_SECONDS = 180.0  # until the first case: PyTorch may come from a slow disk


def main(name: str, cases: str, key: str, seconds: str, where: str) -> None:
    """Runs a step.

    Args:
        name: of the step.
        cases: ``module:function`` that gives its cases for a setting.
        key: of the results.
        seconds: after which a case is taken to hang, and the process ends with a traceback.
        where: the setting as JSON.
    """
    faulthandler.enable()
    faulthandler.dump_traceback_later(START_SECONDS, exit=True)
    threading.Thread(target=_end_with_the_caller, daemon=True).start()
    setting = Setting(**json.loads(where))
    note = partial(journal.note, setting.folder, step=name, key=key)
    module, _, function = cases.partition(":")
    try:
        planned: list[Measurement] = getattr(importlib.import_module(module), function)(setting)
    except SkippedError as error:
        note("step", left_out=str(error))
        return
    note("step", planned=[case.name for case in planned])
    done = results.read(setting.folder, name, key).cases
    gc.collect()
    gc.freeze()  # all that was imported: looking through it for garbage would take as long as the kernels
    for case in planned:
        if case.name in done:
            continue
        print(f"--- {case.name}", flush=True)
        note("case", case=case.name, status="begun")
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        result = attempt(case, setting.device)
        faulthandler.cancel_dump_traceback_later()
        note("case", case=case.name, **asdict(result))
        if result.status == "failed" and not is_usable(setting.device):
            sys.exit(DEVICE_LOST)


def attempt(case: Measurement, device: str) -> CaseResult:
    """What becomes of a case; an error of a kernel is that of the case that launched it."""
    started = time.perf_counter()
    status, message, details = "passed", "", None
    try:
        details = case.run()
        if device != "cpu":
            import torch

            torch.accelerator.synchronize()
    except SkippedError as error:
        status, message = "skipped", str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        status, message = "failed", f"{type(error).__name__}: {lines[0]}"
    return CaseResult(status, message, time.perf_counter() - started, details or {})


def is_usable(device: str) -> bool:
    """Whether the device still computes for this process: after an illegal access it does not."""
    if device == "cpu":
        return True
    import torch

    try:
        return torch.ones(1, device=device).add_(1).item() == 2
    except Exception:
        return False


def _end_with_the_caller() -> None:
    """Leaves nothing behind on the device, nor what a case has started, where the caller is killed."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
