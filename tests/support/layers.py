"""The layers of T tasks, by what they normalise: what holds for a task-specific layer is tested with all of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tsbn_kernels import FusedTSigmaBN2d, FusedTSigmaLN, FusedTSigmaLN2d, FusedTSigmaRMSNorm

T, N, C = 3, 4, 5
SHAPE = (T * N, C, 3, 3)  # an input of all of them

LAYERS: dict[str, Callable[..., Any]] = {
    "BN": partial(FusedTSigmaBN2d, T, C),
    "LN": partial(FusedTSigmaLN, T, (3, 3)),
    "RMS": partial(FusedTSigmaRMSNorm, T, 3),
    "LN2d": partial(FusedTSigmaLN2d, T, C),
}
WITH_BIAS = ("BN", "LN", "LN2d")
GATES = {"BN": "gates", "LN": "layer_norm_gates", "RMS": "layer_norm_gates", "LN2d": "layer_norm_gates"}
of_any_kind = pytest.mark.parametrize("kind", LAYERS)
with_a_bias = pytest.mark.parametrize("kind", WITH_BIAS)


def trained(kind: str = "BN", **options: Any) -> Any:
    """A layer with parameters and statistics of its own."""
    return train(LAYERS[kind](**options))


def train(layer: Any) -> Any:
    """Gives a layer parameters and statistics of its own."""
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean"):
            if (tensor := getattr(layer, name, None)) is not None:
                tensor.normal_()
        if (var := getattr(layer, "running_var", None)) is not None:
            var.uniform_(0.5, 1.5)
    return layer


def assert_batches(layer: Any, count: int) -> None:
    """Where a layer has statistics, each task has seen so many batches."""
    if hasattr(layer, "num_batches_tracked"):
        assert layer.num_batches_tracked.tolist() == [count] * T


def gradients(module: nn.Module, x: Tensor, dy: Tensor, call: Callable[..., Tensor] | None = None) -> list[Any]:
    """Of x and all parameters; by ``backward()``, which is all that re-entrant checkpointing takes."""
    x = x.clone().requires_grad_()
    (module(x) if call is None else call(module, x)).backward(dy)
    result = [x.grad, *(parameter.grad for parameter in module.parameters())]
    module.zero_grad()
    return result


def assert_same(left: Any, right: Any) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)
