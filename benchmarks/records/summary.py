"""The times of many rounds in a few numbers."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.records.intervals import Interval, interval


@dataclass(frozen=True)
class Summary:
    """Median and interquartile range of all rounds, in seconds.

    Attributes:
        outliers: rounds further from the quartiles than 1.5 interquartile ranges; they count like the others.
        visits: medians of the visits that the rounds were made in, for the interval.
    """

    median: float
    iqr: float
    rounds: int
    outliers: int
    visits: tuple[float, ...]

    @classmethod
    def of(cls, visits: Sequence[Sequence[float]]) -> Summary:
        """Summarizes the rounds of each visit."""
        samples = [sample for visit in visits for sample in visit]
        medians = tuple(map(statistics.median, visits))
        if len(samples) < 2:
            return cls(samples[0], 0.0, 1, 0, medians)
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        fence = 1.5 * (upper - lower)
        outliers = sum(not lower - fence <= sample <= upper + fence for sample in samples)
        return cls(median, upper - lower, len(samples), outliers, medians)

    def ratio(self, other: Summary) -> Interval | None:
        """Gives the interval of this time over the other's, by their visits; None where there was one visit."""
        return interval([a / b for a, b in zip(self.visits, other.visits, strict=True)])
