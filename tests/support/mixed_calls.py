"""Calls of the operators of mixed batches, compared with the definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.mixed import T
from support.problems import in_memory_format
from support.tolerances import BACKWARD, FORWARD, STATISTICS, Tolerance, assert_within
from tsbn_kernels.definition import mixed_batch_norm as reference
from tsbn_kernels.definition.options import Gradients, Needs, Normalized, Options, Saved

SOME, MANY, ALL_OF_ONE = (3, 0, 5, 1), (6, 5, 24, 0), (0, 0, 9, 0)
EVERY = Needs(True, True, True, True)


def index_of(counts: tuple[int, ...]) -> Tensor:
    """The tasks of samples in a random order."""
    index = torch.repeat_interleave(torch.arange(T), torch.tensor(counts))
    return index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]


class Call:
    """A call of the operators, and what the definition gives.

    Args:
        counts: the samples of each task.
        shape: of a sample.
    """

    def __init__(
        self,
        counts: tuple[int, ...],
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        activation: str = "none",
        memory_format: str = "contiguous",
        mean: float = 0.0,
    ) -> None:
        torch.manual_seed(1)
        self.index = index_of(counts)
        stacked = (torch.randn(len(self.index), *shape) for _ in range(3))
        x, self.residual, self.dy = (in_memory_format(t.to(dtype), "task_major", memory_format) for t in stacked)
        self.x = x + mean
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.weight, self.bias = (torch.randn(T, shape[0], dtype=wide) for _ in range(2))
        self.options = Options(T, 1e-5, "sigmoid", "task_major", activation)
        self.needs = EVERY._replace(dresidual=activation != "none")

    def permuted(self, order: Tensor) -> Call:
        """The same with its samples in another order."""
        other = Call.__new__(Call)
        rows = {name: getattr(self, name)[order] for name in ("index", "x", "residual", "dy")}
        vars(other).update(vars(self) | rows)
        return other

    def forward(self, compute: Any) -> Normalized:
        """A forward pass in training."""
        x, weight, bias, residual, _ = self._tensors(compute)
        found: Normalized = compute.mixed_forward_training(x, self.index, weight, bias, residual, self.options)
        return found

    def _tensors(self, compute: Any) -> list[Tensor]:
        tensors = self.x, self.weight, self.bias, self.residual, self.dy
        return [t.double() if compute is reference else t for t in tensors]

    def run(self, compute: Any, training: bool = True) -> tuple[Normalized, Gradients]:
        """A forward and a backward pass; in evaluation by the statistics of the batch too."""
        x, weight, bias, residual, dy = self._tensors(compute)
        found = self.forward(compute)
        saved = Saved(x, weight, bias, residual, found.mean, found.var)
        if not training:
            found = found._replace(y=compute.mixed_forward_eval(saved, self.index, self.options))
        return found, compute.mixed_backward(dy, saved, self.index, training, self.needs, self.options)

    def check(self, compute: Any, training: bool = True) -> None:
        """Compares all results with those of the definition."""
        found, gradients = self.run(compute, training)
        forward, expected = self.run(reference, training)
        self.check_forward(found, forward)
        y, dtype = found.y, self.x.dtype
        for name, computed, wanted in zip(Needs._fields, gradients, expected, strict=True):
            assert (computed is None) == (wanted is None)
            if computed is None or wanted is None:
                continue
            if name in ("dweight", "dbias"):
                assert_within(computed, wanted, Tolerance(STATISTICS[dtype], 1), scale=4 * (y.numel() / 5) ** 0.5)
            else:
                assert_within(computed, wanted, BACKWARD[dtype], scale=max(1.0, float(wanted.abs().max()) / 4))

    def check_forward(self, found: Normalized, wanted: Normalized) -> None:
        """Compares y and the statistics with those of the definition."""
        (y, *computed), (exact, *statistics), dtype = found, wanted, self.x.dtype
        assert y.stride() == self.x.stride()
        assert_within(y, exact, FORWARD[dtype], scale=max(1.0, float(exact.abs().max()) / 4))
        for got, sought in zip(computed, statistics, strict=True):
            assert_within(got, sought, Tolerance(STATISTICS[dtype], 1), scale=1.0)
