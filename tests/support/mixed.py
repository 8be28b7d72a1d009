"""Mixed batches, and the loop over masks that stands for what they mean."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

T = 4
# How many samples each task has: some, none, one, all, nearly all.
MIXES = [(3, 2, 4, 3), (5, 0, 1, 2), (0, 0, 7, 0), (1, 1, 1, 1), (1, 20, 1, 0)]


def mixes(seed: int = 0) -> Iterator[Tensor]:
    """The tasks of samples in a random order, int64 ``[N]``: of each of the mixes, and some at random."""
    generator = torch.Generator().manual_seed(seed)
    for counts in MIXES:
        index = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))
        yield index[torch.randperm(len(index), generator=generator)]
    for samples in (2, 9):
        yield torch.randint(T, (samples,), generator=generator)


def masked_loop(
    x: Tensor,
    index: Tensor,
    gates: Tensor,
    bias: Tensor | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalises the samples of one task after the other, without an activation; ``gates`` are ``[T, C]``."""
    y = torch.zeros_like(x)
    for task in range(len(gates)):
        mask = (index == task).nonzero().flatten()
        if len(mask) == 0:
            continue
        statistics: tuple[Any, ...] = (None, None)
        if running_mean is not None and running_var is not None:
            statistics = running_mean[task], running_var[task]
        own_bias = None if bias is None else bias[task]
        normalized = functional.batch_norm(
            x.index_select(0, mask), *statistics, gates[task], own_bias, training, momentum, eps
        )
        y = y.index_copy(0, mask, normalized)
    return y
