"""Step: the sweep over plans, a case for each of its candidates."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment
from benchmarks.gpu_check.case import Case, Cases, Setting
from benchmarks.measure import timer_for

FILE = "sweep.jsonl"
MOST_QUICK = 4


def cases(setting: Setting) -> Cases:
    """Most telling first."""
    from benchmarks.gpu_day import sweep

    found = sweep.candidates(environment.device_name(torch.device(setting.device)))
    return Cases([
        Case(f"{index}: {candidate}", partial(run, candidate, setting))
        for index, candidate in enumerate(found[: MOST_QUICK if setting.quick else None])
    ])  # fmt: skip


def run(candidate: Any, setting: Setting) -> None:
    """A line of the sweep's file."""
    device = torch.device(setting.device)
    found = candidate.run(timer_for(device))
    with (Path(setting.folder) / FILE).open("a") as file:
        file.write(json.dumps(found) + "\n")
