"""Whether the measuring core tells 5 % on this machine, now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.records.intervals import Interval
from benchmarks.timing.measure import Candidate, Effort, Timer, measure, step_candidate, summarize, timer_for

EFFORT = Effort(min_rounds=9, max_rounds=9, min_time_s=4e-3, visits=5)
SIZE = 2**14  # values: they stay in a cache, so that a time is in proportion to the work
WORK = 20  # passes over them; 21 are 5 % more


@dataclass(frozen=True)
class SelfTest:
    """Times of two variants over that of a third, which does what ``equal`` does; with their intervals."""

    equal: Interval
    slower: Interval  # 5 % more work

    @property
    def passed(self) -> bool:
        """Whether the slower variant is told from the equal one."""
        return self.slower.low > self.equal.high

    def __str__(self) -> str:
        told = "told" if self.passed else "NOT TOLD"
        return (
            f"self-test: of two equal variants one takes {self.equal} times as long as the other; one with 5 % more "
            f"work {self.slower}: {told} apart"
        )


def judge(candidates: dict[str, Candidate], timer: Timer, effort: Effort = EFFORT) -> SelfTest:
    """Judges the candidates ``one``, ``equal`` and ``slower``."""
    times = summarize(*(measure(candidates, effort, timer) for _ in range(effort.visits)))
    equal, slower = (times[name][-1].ratio(times["one"][-1]) for name in ("equal", "slower"))
    assert equal is not None
    assert slower is not None
    return SelfTest(equal, slower)


def self_test(device: torch.device) -> SelfTest:
    """Runs the self-test, which takes a second."""
    values = torch.rand(SIZE, device=device)
    result = torch.empty_like(values)

    def work(passes: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(passes):
                torch.sin(values, out=result)

        return run

    candidates = {"one": WORK, "equal": WORK, "slower": WORK * 21 // 20}
    return judge({name: step_candidate(work(passes)) for name, passes in candidates.items()}, timer_for(device))
