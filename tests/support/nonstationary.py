"""Activations whose values are not alike throughout a slab."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ops = torch.ops.tsbn


def _with(x: Tensor, index: tuple[object, ...], value: float) -> Tensor:
    x = x.clone()
    x[index] = value
    return x


NONSTATIONARY: dict[str, Callable[[Tensor], Tensor]] = {
    "first value of each plane an outlier": lambda x: _with(x, (..., 0, 0), 300.0),
    "first value an outlier, the rest far from zero": lambda x: _with(x + 1000.0, (..., 0, 0), 300.0),
    "first sample far from the rest": lambda x: _with(x, (0,), 100.0) + x,
    "samples with means that differ hugely": lambda x: x + 50.0 * torch.arange(x.shape[0]).view(-1, 1, 1, 1),
    "last sample far from the rest": lambda x: (
        x + 200.0 * (torch.arange(x.shape[0]) == x.shape[0] - 1).view(-1, 1, 1, 1)
    ),
    "a ramp along the rows": lambda x: x + torch.linspace(-30, 90, x.shape[-1]),
    "channels of very different sizes": lambda x: x * torch.logspace(-3, 3, x.shape[1]).view(1, -1, 1, 1),
    "constant but for one value": lambda x: _with(torch.full_like(x, 7.0), (1, ..., 2, 3), 7.5),
    "mean 300 times the spread, first plane zero": lambda x: _with(x + 300.0, (0,), 0.0),
}
