"""A training step of dense tasks in several ways and by other methods, to be measured, and its share in norms."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.profile.profiling import ACTIVATION, NORMALISATION, profile_step
from experiments.dense_tasks.methods import MAKERS, Layout, make_backbone, make_heads, make_network
from experiments.dense_tasks.tasks import DEPTH, NORMALS, SEGMENTATION, Depth, Normals, Segmentation, Task, total_loss
from experiments.dense_tasks.ways import WAYS, task_specific
from experiments.training.methods import TS_SIGMA_BN
from experiments.training.run import on_device, optimizer_of
from experiments.training.sizes import trainable
from experiments.training.step_cost import Step

NAMES = (*WAYS, *(method for method in MAKERS if method != TS_SIGMA_BN))  # which is the way "fused"
PROFILED = 3  # steps, for the median of their shares
Shape = tuple[int, int, int]  # batch, height, width


def three_tasks() -> dict[str, Task]:
    """The tasks of NYUv2."""
    return {task.name: task for task in (Segmentation(13), Depth(), Normals())}


def measured_step(name: str, layout: Layout, shape: Shape, device: torch.device) -> tuple[Step, int]:
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

    return step, trainable(network)


def norm_share(name: str, layout: Layout, shape: Shape, device: torch.device) -> float:
    """The share of the step in normalisation and activations, which the fused layer computes at once.

    What splits and concatenates, as the loop does, counts too.
    """
    step, _ = measured_step(name, layout, shape, device)
    profiles = [profile_step(step, device, warm_up=1) for _ in range(PROFILED)]
    return statistics.median(each.share_of(NORMALISATION) + each.share_of(ACTIVATION) for each in profiles)
