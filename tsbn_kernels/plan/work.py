"""What is to be done: one pass over a task-stacked activation, seen as ``[T, N, C, S]``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tsbn_kernels.activations import EPILOGUES, INVERSE, NONE
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
        activation: what the pass ends in: one of :data:`tsbn_kernels.activations.EPILOGUES`.
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
    def fuses(self) -> bool:
        """Whether the pass does more than the layer."""
        return self.activation != NONE or self.residual or self.fan_out

    @property
    def streams(self) -> int:
        """Tasks whose inputs are normalised apart: one where all share it."""
        return 1 if self.fan_out else self.tasks

    @property
    def gathers(self) -> bool:
        """Whether the gradients of many tasks are added up to one of their input."""
        return self.fan_out and self.direction == "backward"

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
    def input_bytes(self) -> int:
        """Bytes of x, and of dx."""
        return self.activation_bytes // self.tasks if self.fan_out else self.activation_bytes

    @property
    def reduces(self) -> bool:
        """Whether the pass sums over its slabs."""
        if self.direction == "forward":
            return self.training
        return (self.training and self.needs_dx) or self.needs_dweight or self.bias

    @property
    def recomputes(self) -> bool:
        """Whether a backward computes anew what went into the activation."""
        return self.direction == "backward" and self.activation != NONE

    @property
    def reads_residual(self) -> bool:
        """Whether the residual is read."""
        return self.residual and (self.direction == "forward" or self.recomputes)

    @property
    def reads_bias(self) -> bool:
        """Whether the bias itself is read (in a backward it is known of where its gradient is asked for)."""
        return self.bias and (self.direction == "forward" or (self.recomputes and self.activation != INVERSE))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of activations that must be read at least once: x; in a backward also dy, and x only for its values."""
        residual = self.activation_bytes * self.reads_residual
        if self.direction == "forward":
            return self.input_bytes + residual
        return self.activation_bytes + residual + self.input_bytes * (self.reduces or self.recomputes)

    @property
    def keeps_gradient(self) -> bool:
        """Whether dresidual is the gradient as it was computed, so that dx may be made of it without residual."""
        return self.needs_dresidual and (self.item_size == self.statistics_size or EPILOGUES[self.activation].selects)

    @property
    def bytes_to_sum(self) -> int:
        """Bytes of activations that must be read again once they have been summed, where they do not stay on chip."""
        if not self.reduces:
            return 0
        if self.direction == "forward":
            return self.input_bytes
        return 2 * self.activation_bytes if self.keeps_gradient else self.bytes_to_read

    @property
    def bytes_to_write(self) -> int:
        """Bytes of activations that must be written."""
        if self.direction == "forward":
            return self.activation_bytes
        return self.input_bytes * self.needs_dx + self.activation_bytes * self.needs_dresidual

    @property
    def useful_bytes(self) -> int:
        """What any implementation must move: forward x, residual and y; backward the same, dy, dx and dresidual."""
        return self.bytes_to_read + self.bytes_to_write
