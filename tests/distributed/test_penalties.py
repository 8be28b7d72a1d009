"""Penalties of a model whose tasks are sharded over 2 processes, against one process."""

from __future__ import annotations

from typing import Any

import torch
from support import ranks
from support.training import batch, multitask
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tsbn_kernels import shard_tasks
from tsbn_kernels.layers.participation import local
from tsbn_kernels.regularizers import orthogonal_gradients, receding_importance


def penalised(model: Any, num_tasks: int, group: Any = None) -> Tensor:
    """Runs a backward pass with both penalties; returns their sum."""
    images, upstream = batch(num_tasks, 0)
    losses = {task: (y * upstream[task]).tanh().mean() for task, y in model(images).items()}
    shared = next(parameter for parameter in model.parameters() if parameter.dim() == 4)
    penalty = receding_importance(model, 0.3, task_weights=range(1, num_tasks + 1))
    penalty = penalty + orthogonal_gradients(losses, shared, 0.5, group)
    (torch.stack([*losses.values()]).sum() + penalty).backward()
    return penalty.detach()


def case_penalties(num_tasks: int) -> tuple[Tensor, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tasks",))
    model = shard_tasks(multitask(num_tasks), mesh)
    penalty = penalised(model, num_tasks, mesh.get_group("tasks"))
    return penalty, {name: local(parameter.grad) for name, parameter in model.named_parameters()}


def test_penalties_equal_those_of_one_process() -> None:
    """Each rank has its own rows of the gates; gradients are kept apart from those of the other's tasks too."""
    found = ranks.run(case_penalties, 2, 3)
    one = multitask(3)
    penalty = penalised(one, 3)
    expected = {name: parameter.grad for name, parameter in one.named_parameters()}
    for (its_penalty, gradients), own in zip(found, (slice(0, 2), slice(2, 3)), strict=True):
        torch.testing.assert_close(its_penalty, penalty, rtol=1e-9, atol=0)
        for name, gradient in gradients.items():
            whole = expected[name]
            wanted = whole if gradient.shape == whole.shape else whole[own]
            torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-9)
