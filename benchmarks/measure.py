"""The measuring core: candidates take turns, every round times each of them once, and medians are kept."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

Clock = Callable[[], float]  # seconds, monotonic
Candidate = Callable[[Clock], Sequence[float]]  # runs once; returns the seconds of each of its passes


@dataclass(frozen=True)
class Summary:
    """Median and interquartile range of the rounds, in seconds."""

    median: float
    iqr: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary:
        if len(samples) < 2:
            return cls(samples[0], 0.0, len(samples))
        lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, upper - lower, len(samples))


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds until the budget is spent, but neither fewer nor more than the bounds."""

    min_rounds: int = 5
    max_rounds: int = 15
    budget_s: float = 8.0
    min_time_s: float = 2e-3  # a timing shorter than this is repeated, and divided


def clock_for(device: torch.device) -> Clock:
    """The process's monotonic clock, read after the device has finished its work."""
    if device.type == "cpu":
        return time.perf_counter

    def synchronized() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return synchronized


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def measure(
    candidates: Mapping[str, Candidate],
    plan: Plan,
    clock: Clock = time.perf_counter,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, list[Summary]]:
    """Times all candidates in interleaved rounds; one summary for each pass of each candidate.

    A first round warms up and sets how often a short candidate is repeated within one timing. The candidate that
    starts changes from round to round, so that none always follows the same one.
    """
    repeats = {}
    with _no_garbage_collection():
        for name, candidate in candidates.items():
            seconds = max(candidate(clock))
            repeats[name] = max(1, math.ceil(plan.min_time_s / max(seconds, 1e-7)))
        samples: dict[str, list[list[float]]] = {name: [] for name in candidates}
        order = list(candidates)
        start = clock()
        for index in range(plan.max_rounds):
            if index >= plan.min_rounds and clock() - start > plan.budget_s:
                break
            for name in order:
                runs = [candidates[name](clock) for _ in range(repeats[name])]
                samples[name].append([math.fsum(passes) / len(runs) for passes in zip(*runs, strict=True)])
            order.append(order.pop(0))
            on_round(index + 1)
    return {name: [Summary.of(passes) for passes in zip(*rounds, strict=True)] for name, rounds in samples.items()}


def training_candidate(forward: Callable[[], Tensor], backward: Callable[[Tensor], tuple[Tensor, ...]]) -> Candidate:
    """Times a forward, and a forward+backward, of one and the same step.

    The forward ends when y and its autograd graph exist. The step ends when y, the graph and the gradients are freed
    again: memory that is mapped and unmapped at every step is part of what a candidate costs.
    """

    def run(clock: Clock) -> tuple[float, float]:
        start = clock()
        y = forward()
        middle = clock()
        gradients = backward(y)
        del y, gradients
        return middle - start, clock() - start

    return run


def step_candidate(step: Callable[[], object]) -> Candidate:
    """Times the whole of a step."""

    def run(clock: Clock) -> tuple[float]:
        start = clock()
        step()
        return (clock() - start,)

    return run


def copy_candidate(source: Tensor, target: Tensor) -> Candidate:
    """Times ``Tensor.copy_`` into a tensor that exists already."""
    return step_candidate(lambda: target.copy_(source))
