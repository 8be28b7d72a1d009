"""What happens to all tasks when the filters that one of them uses most are taken away."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tsbn_kernels.analysis.gates import Importance, importance, layers
from tsbn_kernels.layers.participation import local
from tsbn_kernels.operator import checks

_SHUT = -1e4  # its sigmoid is 0 in every dtype
_NEARLY_SHUT = 1e-30

Metric = Callable[[Any], "Tensor | Sequence[float] | Mapping[str, float]"]


def specialization_test(model: nn.Module, metric: Metric, k: int = 200) -> Tensor:
    """Takes the ``k`` most important filters of each task in turn from all tasks, and measures every task.

    A filter is taken away by a gate and a bias of 0, for the time of a call of ``metric``. A module of a user's own
    needs the ``weight`` that its ``gates`` are of: these are ``weight``, or ``sigmoid(weight)`` where its attribute
    ``gate`` is ``"sigmoid"``.

    Args:
        model: with T tasks, in the mode in which it is to be measured.
        metric: takes the model, and gives a score of each task, in their order or by their names. Higher is better; of
            an error it gives the negative.
        k: how many filters; 200 in the paper.

    Returns:
        Float64 ``[T, T]``: what task j loses, in units of the metric, where the filters of task i are gone.

    Raises:
        ValueError: ``k`` is more than there are filters, or the metric gives another number of scores.
        TypeError: the gates of a module cannot be set.
    """
    checks.check_module("model", model)
    k = checks.count("k", k)
    found = importance(model)
    if k > found.matrix.shape[1]:
        raise ValueError(f"k must be at most the {found.matrix.shape[1]} filters of the model, got {k}")
    before = _scores(metric, model, found)
    drops = []
    for row in found.matrix:
        with _without(model, found, row.argsort(descending=True, stable=True)[:k]):
            drops.append(before - _scores(metric, model, found))
    return torch.stack(drops)


def _scores(metric: Metric, model: nn.Module, found: Importance) -> Tensor:
    scores: Any = metric(model)
    if isinstance(scores, Mapping):
        if set(scores) != set(found.tasks):
            raise ValueError(f"the metric must score {', '.join(found.tasks)}, got {', '.join(map(str, scores))}")
        scores = [float(scores[task]) for task in found.tasks]
    values = torch.as_tensor(scores, dtype=torch.float64).detach().cpu()
    if values.shape != (len(found.tasks),):
        raise ValueError(f"the metric must score {len(found.tasks)} tasks, got shape {list(values.shape)}")
    return values


@contextmanager
def _without(model: nn.Module, found: Importance, columns: Tensor) -> Iterator[None]:
    """Shuts filters for all tasks, and opens them again."""
    kept: list[tuple[Tensor, Tensor]] = []
    try:
        with torch.no_grad():
            for (name, layer), part in zip(layers(model), found.slices.values(), strict=True):
                own = columns[(columns >= part.start) & (columns < part.stop)] - part.start
                for vector, value in _vectors(name, layer):
                    kept.append((vector, vector.clone()))
                    flat = vector.view(vector.shape[0], -1)
                    flat[:, own.to(vector.device)] = value
                shut = local(layer.gates).flatten(1)[:, own.to(layer.weight.device)]
                if bool((shut.abs() > _NEARLY_SHUT).any()):
                    raise TypeError(
                        f"the gates of {name!r} ({type(layer).__name__}) do not follow from its weight; where they are "
                        f"its sigmoid, set gate = 'sigmoid'"
                    )
        yield
    finally:
        with torch.no_grad():
            for vector, before in reversed(kept):
                vector.copy_(before)


def _vectors(name: str, layer: Any) -> Iterator[tuple[Tensor, float]]:
    """The weight and the bias of a layer, as this process has them, and what shuts a filter."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != layer.gates.shape:
        raise TypeError(f"{name!r} ({type(layer).__name__}) needs a weight of the shape of its gates to shut them by")
    yield local(weight), _SHUT if getattr(layer, "gate", "identity") == "sigmoid" else 0.0
    bias = getattr(layer, "bias", None)
    if isinstance(bias, Tensor) and bias.shape == weight.shape:
        yield local(bias), 0.0
