"""Whether the losses of tasks pull the shared weights in different directions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tsbn_kernels.analysis.likeness import cosines
from tsbn_kernels.models.parameter_groups import split_parameters
from tsbn_kernels.operator import checks

_FREE = 1 << 22  # values of gradients that may be held however small the model is
_COLUMNS = 1 << 16  # of gradients that are multiplied in float64 at once


@dataclass(frozen=True, eq=False)
class Conflicts:
    """Gradients of T losses against each other.

    Attributes:
        cosine: float64 ``[T, T]``; below 0 two tasks are in conflict.
        norms: float64 ``[T]``, the length of each gradient.
        tasks: the names of the losses.
    """

    cosine: Tensor
    norms: Tensor
    tasks: tuple[str, ...]


def gradient_conflicts(
    model: nn.Module,
    losses: Mapping[str, Tensor] | Sequence[Tensor],
    parameters: Iterable[Tensor] | None = None,
) -> Conflicts:
    """Compares the gradients of all pairs of losses.

    The T gradients are never held whole: parameters are taken in groups, and for each group there is one backward pass
    a loss. What is held is no more than one gradient of all parameters (4 million values where these are fewer), or T
    times that of the largest one. ``grad`` of the parameters stays as it is, and the graph of the losses is kept.

    Args:
        model: whose parameters these are.
        losses: the loss of each task, a scalar, by name or in order, all from one forward pass or from several.
        parameters: of which gradients are taken; by default those that :func:`~tsbn_kernels.split_parameters` calls
            shared. The paper takes the shared convolutions:
            ``[m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]``.

    Raises:
        ValueError: there is no loss or no parameter, a loss is no scalar or has no graph, or a parameter needs no
            gradient.
        TypeError: a loss is no tensor.
    """
    checks.check_module("model", model)
    named = checks.named_losses(losses)
    chosen = list(dict.fromkeys(split_parameters(model)[0] if parameters is None else parameters))
    if not named or not chosen:
        raise ValueError(f"expected losses and parameters, got {len(named)} losses and {len(chosen)} parameters")
    if any(not parameter.requires_grad for parameter in chosen):
        raise ValueError("all parameters must require a gradient; leave out those that are frozen")
    gram = torch.zeros(len(named), len(named), dtype=torch.float64)
    most = max(_FREE, sum(parameter.numel() for parameter in chosen)) // len(named)
    for group in _groups(chosen, most):
        gradients = [torch.autograd.grad(loss, group, retain_graph=True, allow_unused=True) for loss in named.values()]
        for parameter, *rows in zip(group, *gradients, strict=True):
            flat = [torch.zeros_like(parameter).flatten() if row is None else row.flatten() for row in rows]
            for columns in range(0, parameter.numel(), _COLUMNS):
                part = torch.stack([row[columns : columns + _COLUMNS] for row in flat]).double()
                gram += (part @ part.T).cpu()
    norms = gram.diagonal().clamp_min(0).sqrt()
    return Conflicts(cosines(gram, norms), norms, tuple(named))


def _groups(parameters: Sequence[Tensor], most: int) -> Iterator[list[Tensor]]:
    """Parameters in groups of at most ``most`` values, or of one parameter."""
    group: list[Tensor] = []
    values = 0
    for parameter in parameters:
        if group and values + parameter.numel() > most:
            yield group
            group, values = [], 0
        group.append(parameter)
        values += parameter.numel()
    yield group
