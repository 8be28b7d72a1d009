"""Whether two runs of unchanged code agree: the mean speed-ups that both print, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.records.groups import groups
from benchmarks.records.intervals import Interval
from benchmarks.records.record import Record


@dataclass(frozen=True)
class Agreement:
    """One mean speed-up of both runs."""

    setting: str
    pass_: str
    dtype: str
    memory_format: str
    over: str  # the implementation
    intervals: tuple[Interval, Interval]

    @property
    def holds(self) -> bool:
        """Whether some speed-up lies in both intervals."""
        first, second = self.intervals
        return first.meets(second)


def agreements(first: Sequence[Record], second: Sequence[Record]) -> list[Agreement]:
    """Finds all means that both runs have of the same layers, with intervals."""
    before, after = _by_key(first), _by_key(second)
    return [Agreement(*key.named, (before[key], after[key])) for key in before if key in after]


class _Key(NamedTuple):
    named: tuple[str, str, str, str, str]
    layers: frozenset[str]


def _by_key(records: Sequence[Record]) -> dict[_Key, Interval]:
    found = {}
    for setting in groups(records):
        layers = frozenset(record.layer for record in setting.records)
        for row in setting.means:
            for name, interval in row.intervals.items():
                named = setting.name, row.pass_, row.dtype, row.memory_format, name
                found[_Key(named, layers)] = interval
    return found
