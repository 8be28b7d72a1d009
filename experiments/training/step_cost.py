"""What a training step costs: time in turns on one batch, memory in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.records.summary import Summary
from benchmarks.timing.environment import memory_in_use
from benchmarks.timing.fresh_process import in_fresh_process
from benchmarks.timing.measure import Effort, measure, step_candidate, summarize, timer_for

Step = Callable[[], Tensor]
# Of a name, arguments that can be pickled, and a device: the step, and the number of trainable parameters.
MakeStep = Callable[..., tuple[Step, int]]


@dataclass(frozen=True)
class StepCost:
    """Trainable parameters, seconds of a training step, and the most bytes during one above what lay there before."""

    parameters: int
    step: Summary
    peak_bytes: int

    def cells(self) -> tuple[str, str, str]:
        """How a table shows it: parameters, milliseconds, MiB."""
        time = f"{1e3 * self.step.median:.1f} ± {1e3 * self.step.iqr:.1f}"
        return f"{self.parameters:,}", time, f"{self.peak_bytes / 2**20:.0f} MiB"


def step_costs(
    make: MakeStep, names: Sequence[str], arguments: Sequence[Any], device: torch.device, effort: Effort
) -> dict[str, StepCost]:
    """Measures the steps ``make(name, *arguments, device)``."""
    threads = torch.get_num_threads()
    peaks = {name: in_fresh_process(peak_bytes, make, name, arguments, str(device), threads) for name in names}
    steps = {name: make(name, *arguments, device) for name in names}
    candidates = {name: step_candidate(step) for name, (step, _) in steps.items()}
    times = summarize(measure(candidates, effort, timer_for(device)))
    return {name: StepCost(steps[name][1], times[name][0], peaks[name]) for name in names}


def peak_bytes(make: MakeStep, name: str, arguments: Sequence[Any], device_name: str, threads: int) -> int:
    """The most bytes of the first two steps, after which Adam has its buffers.

    It must run in a fresh process: the peak is that of the process's life.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    step, _ = make(name, *arguments, device)
    before, _ = memory_in_use(device)
    step()
    step()
    return memory_in_use(device)[1] - before
