"""Step: the sweep over plans, a case for each of its candidates, named by its number."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_day import sweep
from benchmarks.gpu_day.step_api import Measurement, Setting
from benchmarks.timing import environment
from benchmarks.timing.measure import Timer, timer_for

MOST_QUICK = 4


def cases(setting: Setting) -> list[Measurement]:
    """Most telling first."""
    device = torch.device(setting.device)
    found = sweep.candidates(environment.device_name(device))
    timer = timer_for(device)
    return [
        Measurement(str(number), partial(run, candidate, timer, setting))
        for number, candidate in enumerate(found[: MOST_QUICK if setting.quick else None])
    ]


def run(candidate: sweep.SweptPlan, timer: Timer, setting: Setting) -> None:
    """A line of the sweep's file."""
    found = candidate.run(timer)
    with (Path(setting.folder) / sweep.FILE).open("a") as file:
        file.write(json.dumps(found) + "\n")
