"""The measuring core, on a clock that only the candidates advance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from benchmarks.records.intervals import Interval, interval
from benchmarks.records.summary import Summary
from benchmarks.timing import measure as core
from benchmarks.timing.measure import (
    Effort,
    EventTimer,
    HostTimer,
    copy_candidate,
    measure,
    rotating_buffers,
    step_candidate,
    summarize,
    timer_for,
    training_candidate,
)
from benchmarks.timing.self_test import EFFORT, judge, self_test

STEADY = [7.0] * 20


class FakeClock:
    """Seconds that pass only where ``spend`` says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


def scripted(clock: FakeClock, durations: list[float], calls: list[str] | None = None, name: str = ""):
    """A candidate that takes the given seconds, one after the other; the last one for ever."""
    remaining = list(durations)

    def run(mark):
        mark()
        clock.spend(remaining.pop(0) if len(remaining) > 1 else remaining[0])
        if calls is not None:
            calls.append(name)
        mark()

    return run


def test_median_range_and_outliers():
    summary = Summary.of([[5.0, 1.0, 4.0], [2.0, 300.0]])
    assert (summary.median, summary.iqr, summary.rounds) == (4.0, 3.0, 5)  # quartiles 2 and 5
    assert summary.outliers == 1  # the last one lies above 5 + 1.5 * 3, no other below 2 - 1.5 * 3
    assert summary.visits == (4.0, 151.0)


def test_one_sample_has_no_range_and_no_interval():
    alone = Summary.of([[3.0]])
    assert alone == Summary(3.0, 0.0, 1, 0, (3.0,))
    assert alone.ratio(alone) is None


def test_ratio_of_visits():
    found = Summary.of([[2.0], [4.0], [8.0]]).ratio(Summary.of([[1.0], [2.0], [2.0]]))
    # logs of 2, 2 and 4: mean and standard error in units of log 2 are 4/3 and 1/3; Student's t of 2 is 4.3027
    assert found == pytest.approx((2 ** (4 / 3 - 4.3027 / 3), 2 ** (4 / 3 + 4.3027 / 3)), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(count):
    random = np.random.default_rng(count)
    found = [interval(2.0 * np.exp(0.1 * random.standard_normal(count))) for _ in range(2000)]
    assert 0.935 < np.mean([2.0 in one for one in found if one is not None]) < 0.965


def test_intervals_meet():
    assert Interval(2, 8).half_width == 1
    assert Interval(1, 2).meets(Interval(2, 3))
    assert not Interval(1, 2).meets(Interval(2.1, 3))
    assert not Interval(2.1, 3).meets(Interval(1, 2))


def test_candidates_take_turns_and_follow_each_other_in_any_order():
    clock, calls = FakeClock(), []
    measure({name: scripted(clock, [1.0], calls, name) for name in "abc"}, Effort(40, 40), HostTimer(clock))
    rounds = ["".join(calls[start : start + 3]) for start in range(0, len(calls), 3)]
    assert {"".join(sorted(one)) for one in rounds} == {"abc"}
    assert len(set(rounds)) == 6


def test_what_ran_before_is_not_felt():
    clock, last = FakeClock(), [""]

    def candidate(kind):
        def step():
            clock.spend(1e-3 if last[0] == kind else 2e-3)
            last[0] = kind

        return step_candidate(step)

    # Two that share what they warm up, and one that has it cold again.
    candidates = {"a": candidate("fused"), "b": candidate("fused"), "c": candidate("loop")}
    found = measure(candidates, Effort(20, 20), HostTimer(clock))
    assert {name: max(rounds) for name, (rounds,) in found.items()} == pytest.approx(dict.fromkeys("abc", 1e-3))


def test_one_candidate_needs_no_runs_before_it_is_timed():
    clock, calls = FakeClock(), []
    measure({"a": scripted(clock, [1e-3], calls, "a")}, Effort(3, 3, min_time_s=2e-3), HostTimer(clock))
    assert len(calls) == 1 + 3 * 2


def test_it_warms_up_until_nothing_becomes_faster():
    clock = FakeClock()
    candidates = {"a": scripted(clock, [100, 8, *STEADY]), "b": scripted(clock, [3, 3, 3, 2, *[1.875] * 20])}
    found = measure(candidates, Effort(4, 4), HostTimer(clock))
    assert found == {"a": [[7, 7, 7, 7]], "b": [[1.875] * 4]}


def test_noise_does_not_warm_up_for_ever():
    clock = FakeClock()
    found = measure({"a": scripted(clock, [0.5**n for n in range(10)])}, Effort(3, 3, min_time_s=0), HostTimer(clock))
    assert found == {"a": [[0.5**n for n in range(core.MAX_WARM_UP, core.MAX_WARM_UP + 3)]]}


def test_a_short_candidate_is_repeated_and_divided():
    clock, calls = FakeClock(), []
    candidates = {"short": scripted(clock, [1e-4], calls, "short"), "long": scripted(clock, [1.0], calls, "long")}
    result = measure(candidates, Effort(4, 4, min_time_s=2e-3), HostTimer(clock))
    assert result["short"][0] == pytest.approx([1e-4] * 4)
    assert calls.count("short") == 1 + 4 * (50 + 20)  # led in by 5 ms
    assert calls.count("long") == 1 + 4


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (4.5, 5), (1e9, 7)])
def test_rounds_end_with_the_budget_within_their_bounds(budget, rounds):
    clock = FakeClock()
    seen = []
    result = measure({"a": scripted(clock, [1.0])}, Effort(3, 7, budget), HostTimer(clock), seen.append)
    assert result == {"a": [[1.0] * rounds]}
    assert seen == list(range(1, rounds + 1))


def test_a_step_is_timed_to_the_release_of_its_memory():
    clock = FakeClock()
    timer = HostTimer(clock)

    class Memory:
        def __del__(self) -> None:
            clock.spend(0.5)

    def forward():
        clock.spend(1)
        return Memory()

    def backward(y):
        clock.spend(2)
        return (Memory(),)

    training_candidate(forward, backward, lambda: clock.spend(50))(timer.mark)
    assert timer.read() == [0, 1, 4]  # forward; forward + backward + two releases; and not what comes before


def test_passes_of_repeated_steps_are_averaged_each():
    clock = FakeClock()
    durations = iter([1.0, 2.0, 3.0, 4.0] * 10)

    def forward():
        clock.spend(next(durations))
        return torch.empty(0)

    def backward(y):
        clock.spend(next(durations))
        return ()

    taken = core._timed(training_candidate(forward, backward), 2, HostTimer(clock))
    assert taken == [2.0, 5.0]  # of (1, 3) and (3, 7)


def test_copies_take_turns_among_their_buffers():
    source = torch.randn(2, 3)
    seen = []
    run = copy_candidate(source, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda target, source: seen.append((target.data_ptr(), source.clone())))
        for _ in range(6):
            run(lambda: None)
    assert len({target for target, _ in seen}) == 3
    assert [target for target, _ in seen[:3]] == [target for target, _ in seen[3:]]
    assert all(torch.equal(copied, source) for _, copied in seen)


def test_copy_copies():
    target = torch.zeros(2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty_like", lambda _: target)
        copy_candidate(torch.ones(2, 3))(lambda: None)
    assert torch.equal(target, torch.ones(2, 3))


def test_buffers_exceed_the_cache():
    assert rotating_buffers(10, 100) == 10
    assert rotating_buffers(11, 100) == 10
    assert rotating_buffers(1, 1000) == core.MAX_BUFFERS
    assert rotating_buffers(100, 100) == rotating_buffers(1000, 100) == 1


def test_accelerators_are_timed_by_events(monkeypatch):
    now = [0.0]
    waited_for = []

    class Event:
        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert device.type == "cuda" and enable_timing
            self.time = math.nan

        def record(self) -> None:
            self.time = now[0]

        def synchronize(self) -> None:
            waited_for.append(self.time)

        def elapsed_time(self, other: Event) -> float:
            assert waited_for[-1] >= other.time >= self.time
            return 1e3 * (other.time - self.time)

    monkeypatch.setattr(torch, "Event", Event)
    timer = timer_for(torch.device("cuda"))
    assert isinstance(timer, EventTimer)
    assert isinstance(timer_for(torch.device("cpu")), HostTimer)

    def candidate(mark):
        mark()
        now[0] += 0.25
        mark()

    assert measure({"a": candidate}, Effort(3, 3), timer) == {"a": [[0.25] * 3]}


def noisy(clock: FakeClock, seconds: float, random: np.random.Generator):
    """Takes its time, up to half more where the machine is busy, and ten times as much now and then."""

    def step() -> None:
        busy = 1 + 0.25 * (1 + math.sin(clock.now / 3))  # slowly changing, and so common to a round
        spike = 10 if random.random() < 0.02 else 1
        clock.spend(seconds * busy * spike * math.exp(0.02 * random.standard_normal()))

    return step_candidate(step)


def test_five_percent_are_told_from_nothing_on_a_noisy_machine(monkeypatch):
    monkeypatch.setattr(core.gc, "collect", lambda: None)  # takes longer than all the rest
    found = []
    for seed in range(40):
        clock, random = FakeClock(), np.random.default_rng(seed)
        seconds = {"one": 5e-3, "equal": 5e-3, "slower": 5.25e-3}
        found.append(judge({name: noisy(clock, s, random) for name, s in seconds.items()}, HostTimer(clock)))
    assert np.mean([1.0 in one.equal for one in found]) >= 0.85
    assert np.mean([one.slower.low > 1 for one in found]) >= 0.9
    assert np.mean([one.slower.low <= 1.05 <= one.slower.high for one in found]) >= 0.85
    assert np.mean([one.passed for one in found]) >= 0.8


def test_equal_variants_are_not_told_apart():
    clock, random = FakeClock(), np.random.default_rng(0)
    result = judge({name: noisy(clock, 5e-3, random) for name in ("one", "equal", "slower")}, HostTimer(clock))
    assert not result.passed
    assert "NOT TOLD apart" in str(result)


def test_the_self_test_measures_what_it_says(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "sin", lambda values, out: calls.append(1))
    monkeypatch.setattr("benchmarks.timing.self_test.judge", lambda candidates, timer: candidates)
    work = []
    for candidate in self_test(torch.device("cpu")).values():
        candidate(lambda: None)
        work.append(len(calls))
        calls.clear()
    assert work == [20, 20, 21]
    assert EFFORT.visits >= 3


def test_visits_are_joined():
    first, second = {"a": [[1.0, 2.0, 3.0]]}, {"a": [[5.0, 6.0, 7.0]]}
    assert summarize(first, second)["a"][0] == Summary.of([[1, 2, 3], [5, 6, 7]])
