"""Two runs of the same measurements: what became slower by more than their noise.

The rule. A median of n rounds has a standard error of about 0.93 interquartile ranges over sqrt(n): of normal noise
the range is 1.35 standard deviations, and a median's error is 1.25 of them over sqrt(n). A record's range is of few
rounds, so its error counts as at least that of the median record of its file; and as at least what the medians of its
visits, which lie minutes apart, differ by.

The copies are controls: the same operation in both runs. The median over the layers of their times' ratios is how much
slower the machine was, and every ratio is divided by it. What single copies differ from that median is how far two
runs of an unchanged thing are apart though the rounds of each agree (by where memory came to lie, say): it is added to
the errors of every ratio, and is taken to be at least the typical error of a ratio.

An interval is the ratio times or over exp(z * error), with z so that all intervals together hold with about 95 %
(Bonferroni). A record is slower where its interval lies above 1. Geometric means over all records of a pass see small
differences that single records hide. Only slower records of ours are regressions: where a peer changed, the machine or
PyTorch did.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.records.network_run import VARIANTS
from benchmarks.records.read import RecordsError, identity
from benchmarks.records.record import OURS, TRAINING_STEP, Record

MEDIAN_ERROR = 0.93  # of a median of one round, in interquartile ranges
LEAST_ROUNDS = 3  # what a median needs; taken where a record does not say how many it had
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Machine:
    """How the second run's machine differs from the first one's, by the copies of the same layers.

    Attributes:
        copies: how many there are; without any nothing is known of the rest.
        log_ratio: logarithm of how many times as long a copy takes.
        error: of that.
        spread: how far single copies are from it.
    """

    copies: int
    log_ratio: float = 0.0
    error: float = 0.0
    spread: float = 0.0

    @classmethod
    def of(cls, log_ratios: Sequence[float], typical_error: float) -> Machine:
        if not log_ratios:
            return cls(0)
        middle = statistics.median(log_ratios)
        deviation = statistics.median(abs(ratio - middle) for ratio in log_ratios)
        spread = max(1.483 * deviation, typical_error)
        return cls(len(log_ratios), middle, 1.25 * spread / math.sqrt(len(log_ratios)), spread)


@dataclass(frozen=True)
class Change:
    """Time of the second run over the first one's, corrected for the machine's speed, with its interval.

    ``pairs`` are the two records of one measurement, or all those that a mean is made of.
    """

    pairs: tuple[tuple[Record, Record], ...]
    log_ratio: float
    error: float
    factor: float  # standard errors in half of the interval

    @property
    def ratio(self) -> float:
        return math.exp(self.log_ratio)

    @property
    def interval(self) -> tuple[float, float]:
        half = self.factor * self.error
        return math.exp(self.log_ratio - half), math.exp(self.log_ratio + half)

    @property
    def slower(self) -> bool:
        return self.interval[0] > 1

    @property
    def faster(self) -> bool:
        return self.interval[1] < 1

    @property
    def ours(self) -> bool:
        record = self.pairs[0][0]
        if record.pass_ == TRAINING_STEP:
            return record.impl not in VARIANTS or VARIANTS[record.impl].fused
        return record.impl in OURS

    @property
    def regression(self) -> bool:
        return self.slower and self.ours


@dataclass(frozen=True)
class Comparison:
    """Everything that two runs have in common, and what one of them has alone."""

    machine: Machine
    changes: Sequence[Change]
    means: Sequence[Change]
    only_first: Sequence[Record]
    only_second: Sequence[Record]
    differences: Mapping[str, tuple[str, str]]  # of machine, versions and threads, by name

    @property
    def regressions(self) -> list[Change]:
        return [change for change in (*self.means, *self.changes) if change.regression]


def compare(first: Sequence[Record], second: Sequence[Record]) -> Comparison:
    """Compares all records that both runs have.

    Raises:
        RecordsError: they have none in common, or a run has too few rounds to state its noise.
    """
    tasks_known = all(record.tasks is not None for record in (*first, *second))
    before, after = (_by_identity(records, tasks_known) for records in (first, second))
    common = [key for key in before if key in after]
    if not common:
        raise RecordsError(
            "the files have no measurement in common: workload, tasks, batch, layers, dtypes, memory formats and "
            "implementations must be the same"
        )
    pairs = [(before[key], after[key]) for key in common]
    rounds = [math.hypot(a, b) for a, b in zip(*(_errors(run) for run in zip(*pairs, strict=True)), strict=True)]
    machine = Machine.of(_copies(pairs), statistics.median(rounds))
    own = [math.hypot(error, machine.spread) for error in rounds]
    ratios = [math.log(b.median_ms / a.median_ms) - machine.log_ratio for a, b in pairs]

    groups: dict[tuple[str, str, str], list[int]] = {}
    for index, (record, _) in enumerate(pairs):
        groups.setdefault((record.workload, record.pass_, record.impl), []).append(index)
    several = [group for group in groups.values() if len(group) > 1]
    factor = statistics.NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / 2 / (len(pairs) + len(several)))
    means = [
        Change(
            tuple(pairs[index] for index in group),
            statistics.fmean(ratios[index] for index in group),
            math.hypot(math.hypot(*(own[index] for index in group)) / len(group), machine.error),
            factor,
        )
        for group in several
    ]
    changes = [
        Change((pair,), ratio, math.hypot(error, machine.error), factor)
        for pair, ratio, error in zip(pairs, ratios, own, strict=True)
    ]
    return Comparison(
        machine,
        changes,
        means,
        [record for key, record in before.items() if key not in after],
        [record for key, record in after.items() if key not in before],
        _differences(first, second),
    )


def _by_identity(records: Sequence[Record], tasks_known: bool) -> dict[tuple[object, ...], Record]:
    found = {}
    for record in records:
        if record.rounds is not None and record.rounds < LEAST_ROUNDS:
            raise RecordsError(
                f"{record.layer} {record.pass_} of {record.impl} has {record.rounds} rounds: its noise is not known; "
                f"measure {LEAST_ROUNDS} or more"
            )
        workload, tasks, *rest = identity(record)
        key = (workload, tasks if tasks_known else None, *rest)
        if key in found:
            raise RecordsError(f"{record.layer} {record.pass_} of {record.impl} is there twice; give one run a file")
        found[key] = record
    return found


def _errors(records: Sequence[Record]) -> list[float]:
    """Standard errors of one run's medians, relative."""
    own = [max(_error_by_rounds(record), _error_by_visits(record)) for record in records]
    typical = statistics.median(own)
    return [max(error, typical) for error in own]


def _error_by_rounds(record: Record) -> float:
    return MEDIAN_ERROR * record.iqr_ms / record.median_ms / math.sqrt(record.rounds or LEAST_ROUNDS)


def _error_by_visits(record: Record) -> float:
    visits = record.visits_ms or ()
    return statistics.stdev(map(math.log, visits)) / math.sqrt(len(visits)) if len(visits) > 1 else 0.0


def _copies(pairs: Iterable[tuple[Record, Record]]) -> list[float]:
    """Logarithms of the copies' ratios: one for each layer, dtype and memory format, which its records share."""
    found = {
        (a.workload, a.shape, a.layer, a.dtype, a.memory_format): math.log(b.copy_ms / a.copy_ms)
        for a, b in pairs
        if a.copy_ms and b.copy_ms
    }
    return list(found.values())


def _differences(first: Sequence[Record], second: Sequence[Record]) -> dict[str, tuple[str, str]]:
    def facts(records: Sequence[Record]) -> dict[str, str]:
        found: dict[str, dict[str, None]] = {}
        for record in records:
            for key, value in {"device": record.device, **record.versions}.items():
                found.setdefault(key, {})[str(value)] = None
        return {key: " and ".join(values) for key, values in found.items()}

    ours, theirs = facts(first), facts(second)
    return {
        key: (ours.get(key, "not said"), theirs.get(key, "not said"))
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    }
