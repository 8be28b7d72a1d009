"""The part of a GPU's bandwidth that a plan should reach, and what keeps it from the rest: a factor for each reason.

Predicted, not measured. Each factor is of one reason, so that a measurement can contradict it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tsbn_kernels.backends.plan.core import LAUNCH_SECONDS, Plan

# Assumed, nobody measured them.
COPY = 0.9  # of the data sheet's bandwidth: what a copy reaches
LATENCY_SECONDS = 0.8e-6  # of a load under load, which every program waits for at its start
EXCHANGE_SECONDS = 0.4e-6  # in which the sums of a program, or of a cluster, meet
RANK_SECONDS = 0.03e-6  # by which each block of a cluster delays the last one
MEETING_SECONDS = 1.5e-6  # in which blocks meet through the memory of the device


@dataclass(frozen=True)
class Expected:
    """What is expected of a plan: seconds, and factors of at most 1 between the bandwidth and what is reached of it.

    Attributes:
        copy: what a copy reaches.
        useful: the bytes that must be moved, of those that are.
        filled: of the programs that fit at a time, those that there are, over all waves.
        flowing: of the loads that the memory takes at a time, those that are under way.
        busy: of its time, in which a multiprocessor has a program that does not wait.
        launching: of the time, what launches leave.
    """

    seconds: float
    copy: float
    useful: float
    filled: float
    flowing: float
    busy: float
    launching: float

    @property
    def fraction(self) -> float:
        """Useful bytes a second, of the bandwidth."""
        return self.copy * self.useful * self.filled * self.flowing * self.busy * self.launching


def expected(plan: Plan, bandwidth: float | None = None, room: int | None = None) -> Expected:
    """What is expected of a plan.

    Args:
        bandwidth: in bytes a second, the data sheet's by default.
        room: programs that the device runs at a time, those of its registers and shared memory by default.
    """
    device, programs = plan.device, plan.programs
    rate = COPY * (bandwidth or device.bandwidth)
    room = device.multiprocessors * plan.resident_programs if room is None else room
    total = plan.bytes_read + plan.bytes_written
    if room == 0:
        return Expected(math.inf, COPY, plan.work.useful_bytes / total, 0.0, 1.0, 1.0, 1.0)
    waves = plan.rounds if plan.rounds > 1 else programs / room
    filled = waves / math.ceil(waves) if waves > 1 else 1.0
    flowing = min(1.0, min(room, programs) * plan.bytes_in_flight / (rate * LATENCY_SECONDS))
    # While one program of a multiprocessor waits for its first load, or for its sums, others load and store.
    own = total / programs / plan.rounds / plan.launches * device.multiprocessors / (rate * flowing)
    ranks = plan.cluster if plan.cluster > 1 else 0
    waiting = LATENCY_SECONDS + plan.exchanges * EXCHANGE_SECONDS + ranks * RANK_SECONDS
    waiting += plan.meetings * MEETING_SECONDS
    busy = min(1.0, plan.resident_programs * own / (plan.in_step * own + waiting)) if plan.exchanges else 1.0
    moving = total / (rate * filled * flowing * busy)
    seconds = moving + plan.launches * LAUNCH_SECONDS
    return Expected(seconds, COPY, plan.work.useful_bytes / total, filled, flowing, busy, moving / seconds)


def reasons(plan: Plan, found: Expected) -> str:
    """The factors that take more than a hundredth, the largest loss first, with what they come from."""
    room = plan.device.multiprocessors * plan.resident_programs
    sums = plan.exchanges
    told = {
        f"bytes {found.useful:.2f}": found.useful,
        f"waves {found.filled:.2f} ({plan.programs / room:.3g})": found.filled,
        f"loads {found.flowing:.2f}": found.flowing,
        f"exchanges {found.busy:.2f} ({sums}, {plan.resident_programs} resident)": found.busy,
        f"launches {found.launching:.2f} ({plan.launches})": found.launching,
        f"copy {found.copy:.2f}": found.copy,
    }
    return ", ".join(text for text, factor in sorted(told.items(), key=lambda one: one[1]) if factor < 0.99)
