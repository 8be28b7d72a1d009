"""Plans: which kernels do a pass over an activation on which GPU, and the bytes they move. Pure functions, no GPU."""

from __future__ import annotations

from tsbn_kernels.backends.plan.core import Plan
from tsbn_kernels.backends.plan.devices import DEVICES, Device
from tsbn_kernels.backends.plan.work import Work

__all__ = ["DEVICES", "Device", "Plan", "Work"]
