"""What is to be done: one pass over a task-stacked activation, seen as ``[T, N, C, S]``, and what it must move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from tsbn_kernels.definition import layout
from tsbn_kernels.definition.activations import EPILOGUES, INVERSE, NONE
from tsbn_kernels.definition.layout import Family
from tsbn_kernels.definition.options import Needs, Options, of_input

Direction = Literal["forward", "backward"]


class Strides(NamedTuple):
    """The strides of a ``[T, N, C, S]`` view, in values; ``residue`` is the address in values modulo 16 bytes."""

    t: int
    n: int
    c: int
    s: int
    residue: int = 0


class Operands(NamedTuple):
    """Where the activations of a pass lie, None for those that it does not have; ``out`` is y, or dx."""

    x: Strides
    dy: Strides | None
    out: Strides | None
    residual: Strides | None = None
    dresidual: Strides | None = None


@dataclass(frozen=True)
class Work:
    """One forward or backward pass.

    Attributes:
        tasks, samples, channels, positions: T, N, C and S.
        item_size: bytes of a value of the activation.
        family: which of positions (rows) and channels (columns) are contiguous.
        training: statistics of the batch, not given ones.
        expanded: all tasks read the same x, by a task stride of 0.
        bias: whether the layer has one.
        needs_dx, needs_dweight, needs_dbias: which gradients are asked for.
        parameter_size: bytes of a value of weight and bias.
        activation: what the pass ends in: one of :data:`tsbn_kernels.definition.activations.EPILOGUES`.
        residual: whether a residual is added before the activation.
        needs_dresidual: whether its gradient is asked for; without an activation that is dy itself.
        fan_out: x is one input for all tasks, read once for all of them.
        strides: where the activations lie; None where they are dense and task-major.
    """

    tasks: int
    samples: int
    channels: int
    positions: int
    item_size: int
    family: Family = "rows"
    direction: Direction = "forward"
    training: bool = True
    expanded: bool = False
    bias: bool = False
    needs_dx: bool = True
    needs_dweight: bool = True
    needs_dbias: bool = False
    parameter_size: int = 4
    activation: str = "none"
    residual: bool = False
    needs_dresidual: bool = False
    fan_out: bool = False
    strides: Operands | None = None

    @property
    def backward(self) -> bool:
        """Whether gradients are computed."""
        return self.direction == "backward"

    @property
    def title(self) -> str:
        """The pass, for people."""
        return f"{self.direction} {'training' if self.training else 'evaluation'}"

    @property
    def layout(self) -> str:
        """Sizes, for people."""
        return f"[T, N, C, S] = {[self.tasks, self.samples, self.channels, self.positions]}"

    @property
    def form(self) -> str:
        """How they are read, for people."""
        return self.family

    @property
    def values(self) -> int:
        """Values that share statistics: ``M = N * S``."""
        return self.samples * self.positions

    @property
    def ragged(self) -> bool:
        """Whether what shares statistics may have fewer values than ``values`` tells."""
        return False

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
        return self.fan_out and self.backward

    @property
    def operands(self) -> Operands:
        """Where the activations lie."""
        if self.strides is not None:
            return self.strides
        rows = self.family == "rows"
        slab = self.channels * self.positions
        stacked = Strides(self.samples * slab, slab, self.positions if rows else 1, 1 if rows else self.channels)
        x = stacked._replace(t=0) if self.expanded or self.fan_out else stacked
        residual = stacked if self.reads_residual else None
        if not self.backward:
            return Operands(x, None, stacked, residual)
        dx = (x if self.fan_out else stacked) if self.needs_dx else None
        return Operands(x, stacked, dx, residual, stacked if self.writes_dresidual else None)

    @property
    def activation_bytes(self) -> int:
        """Bytes of the activation."""
        return self.tasks * self.channels * self.values * self.item_size

    @property
    def statistics_size(self) -> int:
        """Bytes of a mean or variance, which is also the type of the arithmetic."""
        return 8 if self.item_size == 8 else 4

    @property
    def input_bytes(self) -> int:
        """Bytes of x, and of dx."""
        return self.activation_bytes // self.tasks if self.fan_out else self.activation_bytes

    @property
    def statistics_bytes(self) -> int:
        """Bytes of the means, or variances, of all tasks."""
        return self.tasks * self.channels * self.statistics_size

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weight, or bias."""
        return self.tasks * self.channels * self.parameter_size

    @property
    def reduces(self) -> bool:
        """Whether the pass sums over its slabs."""
        if self.backward:
            return self.two_passes or self.needs_dweight or self.needs_dbias
        return self.training

    @property
    def two_passes(self) -> bool:
        """Whether y or dx needs those sums first."""
        return self.training and (not self.backward or self.needs_dx)

    @property
    def recomputes(self) -> bool:
        """Whether a backward computes anew what went into the activation."""
        return self.backward and self.activation != NONE

    @property
    def reads_residual(self) -> bool:
        """Whether the residual is read."""
        return self.residual and (not self.backward or self.recomputes)

    @property
    def summed_activations(self) -> int:
        """How many activations a sum reads: x, of a backward dy and the residual it recomputes with, too."""
        return 2 + self.reads_residual if self.backward else 1

    @property
    def writes_dresidual(self) -> bool:
        """Whether the gradient of the residual is written."""
        return self.needs_dresidual and self.recomputes

    @property
    def reads_bias(self) -> bool:
        """Whether the bias itself is read."""
        return self.bias and (not self.backward or (self.recomputes and self.activation != INVERSE))

    @property
    def bytes_to_read(self) -> int:
        """Bytes of activations that must be read at least once: x; in a backward also dy, and x only for its values."""
        residual = self.activation_bytes * self.reads_residual
        if not self.backward:
            return self.input_bytes + residual
        return self.activation_bytes + residual + self.input_bytes * (self.reduces or self.recomputes)

    @property
    def keeps_gradient(self) -> bool:
        """Whether dresidual is the gradient as it was computed, so that dx may be made of it without residual."""
        return self.needs_dresidual and (self.item_size == self.statistics_size or EPILOGUES[self.activation].selects)

    @property
    def bytes_to_sum(self) -> int:
        """Bytes of activations that y or dx needs again once they have been summed, where they do not stay on chip."""
        if not self.two_passes:
            return 0
        return self.bytes_to_read if self.backward else self.input_bytes

    @property
    def bytes_to_write(self) -> int:
        """Bytes of activations that must be written."""
        if not self.backward:
            return self.activation_bytes
        return self.input_bytes * self.needs_dx + self.activation_bytes * self.writes_dresidual

    @property
    def useful_bytes(self) -> int:
        """What any implementation must move: forward x, residual and y; backward the same, dy, dx and dresidual."""
        return self.bytes_to_read + self.bytes_to_write

    @property
    def vector_bytes_to_read(self) -> int:
        """Bytes of the ``[T, C]`` vectors that must be read: weight and bias, and the statistics that are given."""
        given = self.backward or not self.training
        return self.parameter_bytes * (1 + self.reads_bias) + 2 * self.statistics_bytes * given

    @property
    def vector_bytes_to_write(self) -> int:
        """Bytes of those that must be written: the gradients of weight and bias, or the statistics."""
        if self.backward:
            return self.parameter_bytes * (self.needs_dweight + self.needs_dbias)
        return 2 * self.statistics_bytes * self.training


def work_of(x: Tensor, options: Options, needs: Needs | None = None, **details: Any) -> Work:
    """The work of a pass over a readable ``x``: of a backward pass where the gradients are given that it ``needs``."""
    own = of_input(options)
    view = layout.task_view(x, own.num_tasks, own.stacking)
    _, N, C, S = view.shape
    expanded = own.num_tasks > 1 and view.stride(0) == 0
    details |= {"expanded": expanded, "activation": options.activation, "fan_out": options.fan_out}
    if needs is not None:
        details |= {"direction": "backward", **{f"needs_{name}": needed for name, needed in needs._asdict().items()}}
    return Work(options.num_tasks, N, C, S, x.element_size(), layout.family(x, own.stacking) or "rows", **details)
