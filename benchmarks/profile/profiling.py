"""Where a training step's time goes: PyTorch's profiler around one step, its operators sorted by what they are for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

STEP = "training step"
NORMALISATION, ACTIVATION = "normalisation", "activation"
OPTIMIZER = "optimizer"
OTHER = "other"
# The first that an operator's name contains. Nothing but the loop splits and concatenates in the CelebA network.
KINDS = {
    NORMALISATION: r"^tsbn::|batch_norm|TaskBatchNorm|^aten::(cat|split)",
    "convolution": r"conv",
    ACTIVATION: r"relu|threshold",
    "pooling and mean": r"pool|^aten::mean",
    "linear": r"mm$|matmul|linear",
}


@dataclass(frozen=True)
class OperatorTime:
    """All calls of an operator within the step, and the seconds in it but not in what it calls."""

    name: str
    kind: str
    seconds: float
    calls: int


@dataclass(frozen=True)
class Profile:
    """One step. ``kernels`` are the names of what our operators launch, on accelerators."""

    seconds: float
    operators: tuple[OperatorTime, ...]
    kernels: tuple[str, ...]

    @property
    def named(self) -> float:
        """Share of the step that lies in an operator."""
        return sum(operator.seconds for operator in self.operators) / self.seconds

    def seconds_of(self, kind: str) -> float:
        """Seconds in all operators of a kind."""
        return sum(operator.seconds for operator in self.operators if operator.kind == kind)

    def share_of(self, kind: str) -> float:
        """Share of the step that a kind takes."""
        return self.seconds_of(kind) / self.seconds


def kind_of(name: str, callers: Sequence[str]) -> str:
    """What an operator is for, by its name or else by the nearest of its callers that tells."""
    if any(caller.startswith("Optimizer.step") for caller in callers):
        return OPTIMIZER
    for candidate in (name, *callers):
        for kind, pattern in KINDS.items():
            if re.search(pattern, candidate):
                return kind
    return OTHER


def profile_step(
    step: Callable[[], object], device: torch.device, trace: Path | None = None, warm_up: int = 2
) -> Profile:
    """Profiles one step after a few others; writes a trace for chrome://tracing or Perfetto where a path is given.

    Every operator is a range of its own, ours are called ``tsbn::*``. On an accelerator the seconds are the kernels'.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every missing driver
    on_host = device.type == "cpu"
    activities = [ProfilerActivity.CPU]
    if not on_host:
        activities.append(getattr(ProfilerActivity, device.type.upper(), ProfilerActivity.CUDA))
    for _ in range(warm_up):
        step()
    with profile(activities=activities) as profiler, record_function(STEP):
        step()
        if not on_host:
            torch.accelerator.synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    return _profile(profiler.events(), on_host)


def _profile(events: Any, on_host: bool) -> Profile:
    def seconds_of(event: Any) -> float:
        return float(event.self_cpu_time_total if on_host else event.self_device_time_total) / 1e6

    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    kernels: dict[str, None] = {}
    total = 0.0
    for event in events:
        if event.name == STEP:
            total = total or float(event.time_range.elapsed_us()) / 1e6
            continue
        callers = _callers(event)
        if not callers or callers[-1] != STEP:  # a kernel's own entry: its operator has its time
            continue
        found[event.name, kind_of(event.name, callers)].append(seconds_of(event))
        if event.name.startswith("tsbn::"):
            kernels |= dict.fromkeys(kernel.name for kernel in event.kernels)
    operators = (OperatorTime(*key, sum(times), len(times)) for key, times in found.items())
    return Profile(total, tuple(sorted(operators, key=lambda each: -each.seconds)), tuple(kernels))


def _callers(event: Any) -> list[str]:
    names = []
    while (event := event.cpu_parent) is not None:
        names.append(event.name)
    return names
