"""What a fused pass spares: the bytes of the layer, the addition and the activation, one after the other."""

from __future__ import annotations

from dataclasses import replace

from tsbn_kernels.backends.plan.core import Plan
from tsbn_kernels.backends.plan.work import Work


def layer_alone(work: Work) -> Work:
    """The work without what is fused with it; of one input for all tasks each task has a view."""
    alone = replace(work, activation="none", residual=False, needs_dresidual=False, fan_out=False)
    return replace(alone, expanded=work.expanded or work.fan_out)


def unfused_bytes(alone: Plan, work: Work) -> int:
    """Bytes that a sequence of passes loads and stores, the layer's own by the plan ``alone``."""
    activation = work.activation_bytes
    moved = alone.bytes_read + alone.bytes_written
    if work.residual and not work.backward:
        moved += 3 * activation  # two are read; the gradient of a sum is that of its terms
    if work.activation != "none":
        moved += (3 if work.backward else 2) * activation  # backward dy and what the activation kept
    if work.gathers and work.needs_dx:
        moved += activation + work.input_bytes  # the tasks' gradients are added up
    return moved
