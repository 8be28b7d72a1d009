"""What a fused pass spares: the bytes of the layer, the addition and the activation, one after the other."""

from __future__ import annotations

from dataclasses import replace

from tsbn_kernels.plan.core import Plan
from tsbn_kernels.plan.work import Work


def layer_alone(work: Work) -> Work:
    """The work without what is fused with it; of one input for all tasks each task has a view."""
    shared = work.shared_input or work.fan_out
    return replace(
        work, activation="none", residual=False, needs_dresidual=False, fan_out=False, shared_input=shared
    )  # fmt: skip


def bytes_apart(alone: Plan, work: Work) -> int:
    """Bytes that a sequence of passes loads and stores, the layer's own by the plan ``alone``."""
    activation, forward = work.activation_bytes, work.direction == "forward"
    moved = alone.bytes_read + alone.bytes_written
    if work.residual and forward:
        moved += 3 * activation  # two are read; the gradient of a sum is that of its terms
    if work.activation != "none":
        moved += (2 if forward else 3) * activation  # backward dy and what the activation kept
    if work.gathers and work.needs_dx:
        moved += activation + work.input_bytes  # the tasks' gradients are added up
    return moved
