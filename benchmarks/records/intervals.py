"""What a figure may be off by: 95 % intervals of ratios that a few visits gave."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """Bounds that hold the true value with 95 % confidence."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.3g} to {self.high:.3g}"

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    @property
    def middle(self) -> float:
        """Geometric: what the interval is an interval of."""
        return math.sqrt(self.low * self.high)

    @property
    def half_width(self) -> float:
        """Relative, of the geometric middle."""
        return math.sqrt(self.high / self.low) - 1

    def meets(self, other: Interval) -> bool:
        """Whether some value lies in both."""
        return self.low <= other.high and other.low <= self.high


def interval(ratios: Sequence[float]) -> Interval | None:
    """Student's t interval of the geometric mean of positive values; None of fewer than two, which show no spread."""
    if len(ratios) < 2:
        return None
    from scipy.special import stdtrit

    logs = [math.log(ratio) for ratio in ratios]
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    half = float(stdtrit(len(logs) - 1, (1 + CONFIDENCE) / 2)) * error
    middle = statistics.fmean(logs)
    return Interval(math.exp(middle - half), math.exp(middle + half))
