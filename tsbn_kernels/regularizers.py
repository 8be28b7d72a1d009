"""Penalties that are added to a loss: gates of filters that nobody needs recede, and gradients of tasks stay apart.

They are those of arXiv 2204.06404 and arXiv 1912.06844, written for gates of each task's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from tsbn_kernels.layers.task_specific import whole
from tsbn_kernels.operator import checks


def receding_importance(
    model: nn.Module, strength: float = 1e-4, shift: float = 3.0, task_weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """Pushes gates towards zero, but leaves open ones alone (arXiv 2204.06404).

    ``strength * sum(s * (1 - log(s)))`` with ``s = sigmoid(weight + shift)``, over all tasks and filters of all layers.
    Its slope is that of an L1 penalty times ``-log(s)``, and so gates part into open and closed ones.

    Args:
        model: its modules with ``gates``, of which those with ``gate="identity"`` are left out; the others' gates are
            ``sigmoid(weight)``.
        strength: a factor, which a schedule may change from step to step. The paper takes 1e-4.
        shift: moves where the penalty is steepest, ``weight = -shift``. The paper takes 3, and 0 for ResNet-56.
        task_weights: ``[T]``, a further factor for each task.

    Returns:
        The penalty, a scalar in the dtype of the gates.

    Raises:
        TypeError, ValueError: ``model`` is no module or has no sigmoid gates; ``strength`` is no finite number of 0 or
            more, ``shift`` no finite number, ``task_weights`` not a number for each task.
    """
    strength, shift = checks.number("strength", strength, 0.0), checks.number("shift", shift)
    log_s = logsigmoid(_sigmoid_weights(model) + shift)
    return strength * _weighted(log_s.exp() * (1 - log_s), task_weights).sum()


def l1_of_gates(
    model: nn.Module, strength: float = 1e-4, task_weights: Sequence[float] | Tensor | None = None
) -> Tensor:
    """The sum of all sigmoid gates times ``strength``: what :func:`receding_importance` is compared with.

    Arguments, result and errors are those of :func:`receding_importance`.
    """
    strength = checks.number("strength", strength, 0.0)
    return strength * _weighted(_sigmoid_weights(model).sigmoid(), task_weights).sum()


def orthogonal_gradients(
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    parameters: Tensor | Iterable[Tensor],
    alpha: float = 0.1,
    process_group: Any = None,
) -> Tensor:
    """Keeps the gradients of different tasks at right angles (arXiv 1912.06844).

    ``alpha / (T * (T - 1)) * norm(G^T G - I)**2`` in the Frobenius norm. The columns of G are the gradients of the T
    losses, each divided by its length; a gradient of zeros stays zero. The result differentiates gradients: its
    backward pass runs the second derivative of what lies between the parameters and the losses, whose graph is kept.
    ``torch.compile`` takes a step with this penalty in one graph inside
    ``with torch._dynamo.config.patch(trace_autograd_ops=True)``, losses and all. Without that setting, it breaks its
    graph here, and compiled losses cannot be differentiated twice: the backward pass raises a RuntimeError.

    Args:
        losses: the loss of each task, a scalar, by name or in order.
        parameters: those that all tasks share and that the gradients are taken of. The paper takes the last layer of
            the shared encoder.
        alpha: a factor. The paper takes 0.1 in networks with batch normalisation, and 10 without.
        process_group: of the ranks that have the losses of the other tasks: ``mesh.get_group("tasks")`` of
            :func:`~tsbn_kernels.shard_tasks`. All must call this. Each gets the penalty of all tasks, whose gradient
            comes from its own losses alone: the sum over the ranks, which is what ``shard_tasks`` makes, is the whole.

    Raises:
        TypeError: a loss is no tensor.
        ValueError: there are fewer than two losses on all ranks, or no parameters, a loss is no scalar or has no graph,
            ``alpha`` is no finite number of 0 or more.
    """
    alpha = checks.number("alpha", alpha, 0.0)
    named = checks.named_losses(losses)
    shared = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if len(named) < (2 if process_group is None else 1) or not shared:
        raise ValueError(f"expected two losses or more and a parameter, got {len(named)} and {len(shared)}")
    columns = []
    for loss in named.values():
        gradients = torch.autograd.grad(loss, shared, create_graph=True, materialize_grads=True)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        columns.append(flat / torch.where(flat.any(), flat, 1).norm())
    unit = torch.stack(columns)
    if process_group is not None:
        unit = _of_all_ranks(unit, process_group)
    count = len(unit)
    excess = unit @ unit.T - torch.eye(count, dtype=unit.dtype, device=unit.device)
    return alpha / max(1, count * (count - 1)) * excess.square().sum()


def _of_all_ranks(rows: Tensor, group: Any) -> Tensor:
    """The rows of all ranks, of which this rank's alone have a graph. Ranks may have different numbers of them."""
    from torch import distributed

    ranks = distributed.get_world_size(group)
    counts = [torch.empty(1, dtype=torch.int64, device=rows.device) for _ in range(ranks)]
    distributed.all_gather(counts, counts[0].new_full((1,), len(rows)), group=group)
    sizes = [int(count) for count in counts]
    padded = rows.new_zeros(max(sizes), rows.shape[1])
    padded[: len(rows)] = rows.detach()
    gathered = [torch.empty_like(padded) for _ in sizes]
    distributed.all_gather(gathered, padded, group=group)
    parts = [part[:size] for part, size in zip(gathered, sizes, strict=True)]
    parts[distributed.get_rank(group)] = rows
    return torch.cat(parts)


def _sigmoid_weights(model: nn.Module) -> Tensor:
    """The weights of all sigmoid gates side by side, ``[T, F]``."""
    checks.check_module("model", model)
    found = list(_gated(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no layer with sigmoid gates, as FusedTSigmaBN2d has them")
    tasks = {weight.shape[0] for weight in found}
    if len(tasks) > 1:
        raise ValueError(f"all layers must have the same number of tasks, got {checks.some(map(str, sorted(tasks)))}")
    return torch.cat([whole(weight).flatten(1) for weight in found], 1)


def _gated(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if hasattr(module, "gates") and getattr(module, "gate", "sigmoid") == "sigmoid":
            yield module.weight  # type: ignore[misc]


def _weighted(values: Tensor, task_weights: Sequence[float] | Tensor | None) -> Tensor:
    if task_weights is None:
        return values
    factors = torch.as_tensor(task_weights, dtype=values.dtype, device=values.device)
    if factors.shape != values.shape[:1]:
        raise ValueError(
            f"task_weights must have a number for each of {values.shape[0]} tasks, got shape {list(factors.shape)}"
        )
    return factors.unsqueeze(1) * values
