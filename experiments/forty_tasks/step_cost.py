"""A training step of each method, to be measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.network.data import Splits
from benchmarks.network.model import train_step
from benchmarks.timing.measure import Effort
from experiments.forty_tasks.methods import LOOP, AnyLayout, make_network
from experiments.training import step_cost
from experiments.training.run import on_device, optimizer_of
from experiments.training.sizes import trainable
from experiments.training.step_cost import Step, StepCost


def step_costs(
    methods: Sequence[str], splits: Splits, layout: AnyLayout, batch: int, device: torch.device, effort: Effort
) -> dict[str, StepCost]:
    """Measures these methods, and :data:`LOOP`, on the first ``batch`` training samples."""
    samples, labels = (torch.stack(parts) for parts in zip(*(splits.train[i] for i in range(batch)), strict=True))
    arguments = layout, samples.numpy(), labels.numpy()
    return step_cost.step_costs(measured_step, [*methods, LOOP], arguments, device, effort)


def measured_step(
    name: str, layout: AnyLayout, samples: np.ndarray, labels: np.ndarray, device: torch.device
) -> tuple[Step, int]:
    """A training step, and the number of trainable parameters."""
    network = make_network(name, labels.shape[1], layout).to(device).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(network, 1e-4, 1.0)
    inputs, truth = on_device(torch.from_numpy(samples), device), torch.from_numpy(labels).to(device)
    return lambda: train_step(network, optimizer, inputs, truth), trainable(network)
