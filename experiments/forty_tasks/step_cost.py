"""What a training step of each method costs: time in turns on one batch, memory in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from benchmarks.network.data import Splits
from benchmarks.network.model import train_step
from benchmarks.timing.environment import memory_in_use
from benchmarks.timing.fresh_process import in_fresh_process
from benchmarks.timing.measure import Effort, measure, step_candidate, summarize, timer_for
from experiments.forty_tasks.methods import LOOP, AnyLayout, make_network
from experiments.training.step_cost import StepCost
from experiments.training.study import on_device, optimizer_of


def step_costs(
    methods: Sequence[str], splits: Splits, layout: AnyLayout, batch: int, device: torch.device, effort: Effort
) -> dict[str, StepCost]:
    """Measures these methods, and :data:`LOOP`, on the first ``batch`` training samples."""
    samples, labels = (torch.stack(parts) for parts in zip(*(splits.train[i] for i in range(batch)), strict=True))
    names = [*methods, LOOP]
    arguments = layout, samples.numpy(), labels.numpy(), str(device), torch.get_num_threads()
    peaks = {name: in_fresh_process(peak_bytes, name, *arguments) for name in names}
    steps = {name: measured_step(name, layout, samples, labels, device) for name in names}
    candidates = {name: step_candidate(step) for name, (step, _) in steps.items()}
    times = summarize(measure(candidates, effort, timer_for(device)))
    return {name: StepCost(steps[name][1], times[name][0], peaks[name]) for name in names}


def peak_bytes(
    name: str, layout: AnyLayout, samples: np.ndarray, labels: np.ndarray, device_name: str, threads: int
) -> int:
    """The most bytes of the first two steps, after which Adam has its buffers.

    It must run in a fresh process: the peak is that of the process's life.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    step, _ = measured_step(name, layout, torch.from_numpy(samples), torch.from_numpy(labels), device)
    before, _ = memory_in_use(device)
    step()
    step()
    return memory_in_use(device)[1] - before


def measured_step(
    name: str, layout: AnyLayout, samples: Tensor, labels: Tensor, device: torch.device
) -> tuple[Callable[[], Tensor], int]:
    """A training step, and the number of trainable parameters."""
    network = make_network(name, labels.shape[1], layout).to(device).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(network, 1e-4, 1.0)
    samples, labels = on_device(samples, device), labels.to(device)
    parameters = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    return lambda: train_step(network, optimizer, samples, labels), parameters
