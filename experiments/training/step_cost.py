"""What a training step costs."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.records.summary import Summary


@dataclass(frozen=True)
class StepCost:
    """Trainable parameters, seconds of a training step, and the most bytes during one above what lay there before."""

    parameters: int
    step: Summary
    peak_bytes: int

    def cells(self) -> tuple[str, str, str]:
        """How a table shows it: parameters, milliseconds, MiB."""
        time = f"{1e3 * self.step.median:.1f} ± {1e3 * self.step.iqr:.1f}"
        return f"{self.parameters:,}", time, f"{self.peak_bytes / 2**20:.0f} MiB"
