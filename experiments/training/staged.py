"""Backbones that run in stages, between which methods look at their features or mix them."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor, nn


class Staged(nn.Module):
    """A backbone of several stages, one after the other.

    Attributes:
        count: of its stages.
        features: channels of what it returns.
    """

    count: int
    features: int

    @abstractmethod
    def run_stage(self, index: int, x: Tensor, kept: list[Tensor]) -> Tensor:
        """Runs a stage, which may append to what is kept for others, or take from it."""

    def forward(self, x: Tensor) -> Tensor:
        """Runs all stages."""
        kept: list[Tensor] = []
        for index in range(self.count):
            x = self.run_stage(index, x, kept)
        return x
