"""The time of a hot path in units of PyTorch's: the machine's speed and its other work change both alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from benchmarks.micro.paths import HotPath, Pair, Step

Clock = Callable[[], float]  # seconds, monotonic

SAMPLE_S = 2e-4  # well below a slice of the scheduler: on a busy machine too most samples are not interrupted
ROUNDS, ATTEMPTS = 150, 5


class Shortest(NamedTuple):
    """Seconds of a call. All that a busy machine does to a sample makes it longer, so the shortest one is kept."""

    fused: float
    pytorch: float

    @property
    def ratio(self) -> float:
        return self.fused / self.pytorch


def _sample(step: Step, calls: int, clock: Clock) -> float:
    start = clock()
    for _ in range(calls):
        step()
    return (clock() - start) / calls


def shortest(pair: Pair, rounds: int = ROUNDS, clock: Clock = time.perf_counter) -> Shortest:
    """Both steps take turns, as often in a sample as its length allows."""
    calls = []
    for step in pair:
        seconds = min(_sample(step, 1, clock) for _ in range(10))
        calls.append(max(1, math.ceil(SAMPLE_S / max(seconds, 1e-7))))
    best = [math.inf, math.inf]
    for _ in range(rounds):
        for index, step in enumerate(pair):
            best[index] = min(best[index], _sample(step, calls[index], clock))
    return Shortest(*best)


def ratios(
    paths: Iterable[HotPath],
    too_slow: Callable[[str, float], bool],
    measure: Callable[[Pair], Shortest] = shortest,
    attempts: int = ATTEMPTS,
) -> dict[str, float]:
    """The ratio of each path. One that is ``too_slow`` gets another chance after the others, in all ``attempts``."""
    found: dict[str, Shortest] = {}
    pending = list(paths)
    for _ in range(attempts):
        for path in pending:
            with path.ready() as pair:
                now = measure(pair)
            before = found.get(path.name, now)
            found[path.name] = Shortest(min(before.fused, now.fused), min(before.pytorch, now.pytorch))
        pending = [path for path in pending if too_slow(path.name, found[path.name].ratio)]
    return {name: times.ratio for name, times in found.items()}
