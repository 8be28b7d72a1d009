"""The measuring core, on a clock that only the candidates advance."""

from __future__ import annotations

import pytest
import torch

from benchmarks.measure import Plan, Summary, copy_candidate, measure, training_candidate


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

    def run(_):
        start = clock()
        clock.spend(remaining.pop(0) if len(remaining) > 1 else remaining[0])
        if calls is not None:
            calls.append(name)
        return (clock() - start,)

    return run


def test_median_and_interquartile_range_ignore_the_warm_up_and_an_outlier():
    clock = FakeClock()
    result = measure({"a": scripted(clock, [1000, 5, 1, 4, 2, 300])}, Plan(5, 5), clock)
    assert result["a"][0].median == pytest.approx(4)
    assert result["a"][0].iqr == pytest.approx(3)  # quartiles 2 and 5
    assert result["a"][0].rounds == 5


def test_one_sample_has_no_range():
    assert Summary.of([3.0]) == Summary(3.0, 0.0, 1)


def test_candidates_take_turns_and_the_first_one_changes():
    clock, calls = FakeClock(), []
    measure({name: scripted(clock, [1.0], calls, name) for name in "abc"}, Plan(3, 3), clock)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the warm-up first


def test_a_short_candidate_is_repeated_and_divided():
    clock, calls = FakeClock(), []
    candidates = {"short": scripted(clock, [1e-4], calls, "short"), "long": scripted(clock, [1.0], calls, "long")}
    result = measure(candidates, Plan(4, 4, min_time_s=2e-3), clock)
    assert result["short"][0].median == pytest.approx(1e-4)
    assert calls.count("short") == 1 + 4 * 20
    assert calls.count("long") == 1 + 4


@pytest.mark.parametrize(("budget", "rounds"), [(0.0, 3), (4.5, 5), (1e9, 7)])
def test_rounds_end_with_the_budget_within_their_bounds(budget, rounds):
    clock = FakeClock()
    seen = []
    result = measure({"a": scripted(clock, [1.0])}, Plan(3, 7, budget), clock, seen.append)
    assert result["a"][0].rounds == rounds
    assert seen == list(range(1, rounds + 1))


def test_a_step_is_timed_to_the_release_of_its_memory():
    clock = FakeClock()

    class Memory:
        def __del__(self) -> None:
            clock.spend(0.5)

    def forward():
        clock.spend(1)
        return Memory()

    def backward(y):
        clock.spend(2)
        return (Memory(),)

    assert training_candidate(forward, backward)(clock) == (1, 4)  # forward; forward + backward + two releases


def test_copy_copies():
    source, target = torch.randn(2, 3), torch.zeros(2, 3)
    assert copy_candidate(source, target)(FakeClock()) == (0,)
    assert torch.equal(target, source)
