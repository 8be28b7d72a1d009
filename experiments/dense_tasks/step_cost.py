"""What a training step of dense tasks costs: time in turns on one batch, memory in a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.timing.environment import memory_in_use
from benchmarks.timing.fresh_process import in_fresh_process
from benchmarks.timing.measure import Effort, measure, step_candidate, summarize, timer_for
from experiments.dense_tasks.methods import MAKERS, Layout, make_backbone, make_heads, make_network
from experiments.dense_tasks.tasks import DEPTH, NORMALS, SEGMENTATION, Depth, Normals, Segmentation, Task, total_loss
from experiments.dense_tasks.ways import WAYS, task_specific
from experiments.training.methods import TS_SIGMA_BN
from experiments.training.step_cost import StepCost
from experiments.training.study import on_device, optimizer_of

NAMES = (*WAYS, *(method for method in MAKERS if method != TS_SIGMA_BN))  # which is the way "fused"
Shape = tuple[int, int, int]  # batch, height, width


def three_tasks() -> dict[str, Task]:
    """The tasks of NYUv2."""
    return {task.name: task for task in (Segmentation(13), Depth(), Normals())}


def step_costs(
    names: Sequence[str], layout: Layout, shape: Shape, device: torch.device, effort: Effort
) -> dict[str, StepCost]:
    """Measures ways and methods of :data:`NAMES`, three tasks, on one random batch."""
    arguments = layout, shape, str(device), torch.get_num_threads()
    peaks = {name: in_fresh_process(peak_bytes, name, *arguments) for name in names}
    steps = {name: measured_step(name, layout, shape, device) for name in names}
    candidates = {name: step_candidate(step) for name, (step, _) in steps.items()}
    times = summarize(measure(candidates, effort, timer_for(device)))
    return {name: StepCost(steps[name][1], times[name][0], peaks[name]) for name in names}


def peak_bytes(name: str, layout: Layout, shape: Shape, device_name: str, threads: int) -> int:
    """The most bytes of the first two steps, after which Adam has its buffers.

    It must run in a fresh process: the peak is that of the process's life.
    """
    torch.set_num_threads(threads)
    device = torch.device(device_name)
    step, _ = measured_step(name, layout, shape, device)
    before, _ = memory_in_use(device)
    step()
    step()
    return memory_in_use(device)[1] - before


def measured_step(name: str, layout: Layout, shape: Shape, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A training step on a random batch, and the number of trainable parameters."""
    tasks = three_tasks()
    torch.manual_seed(0)
    if name in WAYS:
        backbone = make_backbone(layout)
        network = task_specific(name, backbone, make_heads(tasks, layout, backbone.features))
    else:
        network = make_network(name, tasks, layout)
    network = network.to(device).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(network, 1e-4, 1.0)
    batch, height, width = shape
    images = on_device(torch.rand(batch, 3, height, width), device)
    truths = {
        SEGMENTATION: torch.randint(-1, tasks[SEGMENTATION].outputs, (batch, height, width)).to(device),
        DEPTH: torch.rand(batch, 1, height, width).to(device),
        NORMALS: functional.normalize(torch.randn(batch, 3, height, width), dim=1).to(device),
    }

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = total_loss(tasks, network(images), truths)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
