"""What is to be done: one pass over a task-stacked activation, seen as ``[T, N, C, S]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsbn_kernels.layout import Family

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Work:
    """One forward or backward pass.

    Attributes:
        tasks, samples, channels, positions: T, N, C and S.
        item_size: bytes of a value of the activation.
        family: which of positions (rows) and channels (columns) are contiguous.
        training: statistics of the batch, not given ones.
        shared_input: all tasks read the same x (a task stride of 0).
        bias: whether the layer has one; in the backward, whether its gradient is asked for.
        needs_dx, needs_dweight: which gradients are asked for.
        parameter_size: bytes of a value of weight and bias.
        activation: what the pass ends in; "none" or one of :data:`tsbn_kernels.activations.ACTIVATIONS`.
        residual: whether a residual is added before the activation.
        needs_dresidual: whether its gradient is asked for.
        fan_out: x is one input for all tasks, read once for all of them.
    """

    tasks: int
    samples: int
    channels: int
    positions: int
    item_size: int
    family: Family = "rows"
    direction: Direction = "forward"
    training: bool = True
    shared_input: bool = False
    bias: bool = False
    needs_dx: bool = True
    needs_dweight: bool = True
    parameter_size: int = 4
    activation: str = "none"
    residual: bool = False
    needs_dresidual: bool = False
    fan_out: bool = False

    @property
    def values(self) -> int:
        """Values that share statistics: ``M = N * S``."""
        return self.samples * self.positions

    @property
    def elements(self) -> int:
        """Values of the activation."""
        return self.tasks * self.channels * self.values

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activation."""
        return self.elements * self.item_size

    @property
    def vectors(self) -> int:
        """Values of a ``[T, C]`` vector."""
        return self.tasks * self.channels

    @property
    def statistics_size(self) -> int:
        """Bytes of a mean or variance, which is also the type of the arithmetic."""
        return 8 if self.item_size == 8 else 4

    @property
    def reduces(self) -> bool:
        """Whether the pass sums over its slabs."""
        if self.direction == "forward":
            return self.training
        return self.training or self.needs_dweight or self.bias

    @property
    def tensors_read(self) -> int:
        """Activations that must be read at least once."""
        return 2 if self.direction == "backward" and self.reduces else 1

    @property
    def tensors_written(self) -> int:
        """Activations that must be written."""
        return 1 if self.direction == "forward" or self.needs_dx else 0

    @property
    def useful_bytes(self) -> int:
        """What any implementation must move: forward x and y; backward x, dy and dx."""
        return (self.tensors_read + self.tensors_written) * self.activation_bytes
