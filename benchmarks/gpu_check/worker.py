"""``python -m benchmarks.gpu_check.worker``: runs the cases of one step and says so, a line of JSON for each event.

The order comes as a line on stdin, whose end is that of the caller. The events go to what was stdout; what the cases
and the libraries below them print goes to stderr, which the caller keeps as the log.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from typing import Any

from benchmarks.gpu_check.case import Case, Cases, Setting, SkippedError

DEVICE_LOST = 3  # exit status: a kernel has left the device unusable to this process


def main() -> None:
    """Entry of a worker."""
    faulthandler.enable()  # a crash, and the SIGABRT of a caller who has waited too long, leave a traceback
    with os.fdopen(os.dup(1), "w", buffering=1) as channel:
        os.dup2(2, 1)

        def say(**event: Any) -> None:
            channel.write(json.dumps(event, default=str) + "\n")

        order = json.loads(sys.stdin.readline())
        threading.Thread(target=_end_with_the_caller, daemon=True).start()
        setting = Setting(**order["setting"])
        _choose_device(setting.device)
        module, _, function = order["cases"].partition(":")
        try:
            planned: Cases = getattr(importlib.import_module(module), function)(setting)
        except SkippedError as error:
            say(left_out=str(error))
            return
        names = [case.name for case in planned.cases]
        say(planned=names, enough=len(names) if planned.enough is None else planned.enough, about=planned.about)
        for case in planned.cases:
            if case.name in order["done"]:
                continue
            print(f"--- {case.name}", file=sys.stderr, flush=True)
            say(begins=case.name, log=os.fstat(2).st_size)
            result = attempt(case, setting.device)
            say(ends=case.name, **result)
            if result["status"] == "failed" and not _usable(setting.device):
                sys.exit(DEVICE_LOST)


def attempt(case: Case, device: str) -> dict[str, Any]:
    """Status, message, details and time of a case."""
    started = time.perf_counter()
    status, message, details = "passed", "", None
    try:
        details = case.run()
        _synchronize(device)  # an error of a kernel is that of the case that launched it
    except SkippedError as error:
        status, message = "skipped", str(error)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        status, message = "failed", f"{type(error).__name__}: {lines[0]}"
    return {
        "status": status,
        "message": message,
        "seconds": time.perf_counter() - started,
        "details": details or {},
    }


def _end_with_the_caller() -> None:
    """Leaves nothing behind on the device, nor what a case has started, where the caller is killed."""
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


def _choose_device(device: str) -> None:
    _, _, index = device.partition(":")
    if index:
        import torch

        torch.accelerator.set_device_index(int(index))


def _synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.accelerator.synchronize()


def _usable(device: str) -> bool:
    """Whether the device still computes for this process: after an illegal access it does not."""
    if device == "cpu":
        return True
    import torch

    try:
        return torch.ones(1, device=device).add_(1).item() == 2
    except Exception:
        return False


if __name__ == "__main__":
    main()
