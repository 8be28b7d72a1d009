"""The measuring core: candidates take turns, every round times each of them once, and medians are kept."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.records.summary import Summary

Mark = Callable[[], None]
Candidate = Callable[[Mark], None]  # runs once; marks its start, and the end of each of its passes
Rounds = list[list[float]]  # seconds of each pass, of each round; a pass is timed from the start of the run

STEADY = 0.9  # a round that takes less of the best one before it belongs to the warm-up
MAX_BUFFERS = 64
MAX_WARM_UP = 5  # rounds; what still becomes faster then is noise
LEAD_IN = 2.5  # times the shortest timing, 5 ms: so long the candidate before was felt, by 0.9 ms of the first run
_turns = random.Random(0)


class Timer(Protocol):
    """Takes the time of marks."""

    def mark(self) -> None:
        """Notes the time."""

    def read(self) -> list[float]:
        """Seconds of all marks from the first one on; forgets them."""


class HostTimer:
    """A monotonic clock of the host."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._marks: list[float] = []

    def mark(self) -> None:
        """Notes the time."""
        self._marks.append(self._clock())

    def read(self) -> list[float]:
        """Seconds of all marks from the first one on; forgets them."""
        marks, self._marks = self._marks, []
        return [mark - marks[0] for mark in marks]


class EventTimer:
    """Events on the device's stream: what is queued is timed where it runs, and waited for at the end only."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.Event] = []

    def mark(self) -> None:
        """Records an event."""
        event = torch.Event(self._device, enable_timing=True)
        event.record()
        self._events.append(event)

    def read(self) -> list[float]:
        """Seconds of all events from the first one on; forgets them."""
        events, self._events = self._events, []
        events[-1].synchronize()
        return [events[0].elapsed_time(event) / 1e3 for event in events]


def timer_for(device: torch.device) -> Timer:
    """The host's clock for the CPU, events for accelerators."""
    return HostTimer() if device.type == "cpu" else EventTimer(device)


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        min_rounds, max_rounds, budget_s: of a visit: rounds until the seconds are spent, within the bounds.
        min_time_s: a timing shorter than this is repeated, and divided.
        visits: how often a candidate is come back to, each time with new buffers, after all others had their visit.
    """

    min_rounds: int = 3
    max_rounds: int = 8
    budget_s: float = 3.0
    min_time_s: float = 2e-3
    visits: int = 4


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


def _timed(candidate: Candidate, repeats: int, timer: Timer, led_in: int = 0) -> list[float]:
    """Mean seconds of each pass, behind so many runs that are not timed."""
    for _ in range(led_in):
        candidate(_nothing)
    for _ in range(repeats):
        candidate(timer.mark)
    marks = timer.read()
    each = len(marks) // repeats
    starts = marks[::each]
    return [
        math.fsum(end - start for start, end in zip(starts, marks[pass_::each], strict=True)) / repeats
        for pass_ in range(1, each)
    ]


def measure(
    candidates: Mapping[str, Candidate],
    effort: Effort,
    timer: Timer | None = None,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Rounds]:
    """Times all candidates in interleaved rounds: one visit.

    The first round, and all in which a candidate was still getting faster, warm up; they also set how often a short
    candidate is repeated within one timing. What ran before leaves caches and branches in its own state: a candidate
    that resembles it would be timed as faster. So the order changes from round to round, and short candidates run for
    :data:`LEAD_IN` before each timing.
    """
    timer = timer or HostTimer()
    order = list(candidates)
    repeats, led_in = dict.fromkeys(candidates, 1), dict.fromkeys(candidates, 0)
    best = dict.fromkeys(candidates, math.inf)
    kept: list[dict[str, list[float]]] = []
    spent, warming_up = 0.0, MAX_WARM_UP
    with _no_garbage_collection():
        while len(kept) < effort.min_rounds or (len(kept) < effort.max_rounds and spent <= effort.budget_s):
            taken = {name: _timed(candidates[name], repeats[name], timer, led_in[name]) for name in order}
            _turns.shuffle(order)
            if warming_up and any(passes[-1] < STEADY * best[name] for name, passes in taken.items()):
                best = {name: min(best[name], passes[-1]) for name, passes in taken.items()}
                repeats = {name: max(1, math.ceil(effort.min_time_s / max(best[name], 1e-7))) for name in candidates}
                if len(candidates) > 1:
                    led_in = {name: round(LEAD_IN * effort.min_time_s / max(best[name], 1e-7)) for name in candidates}
                warming_up -= 1
                continue
            warming_up = 0
            kept.append(taken)
            spent += sum(repeats[name] * passes[-1] for name, passes in taken.items())
            on_round(len(kept))
    return {
        name: [list(rounds) for rounds in zip(*(taken[name] for taken in kept), strict=True)] for name in candidates
    }


def summarize(*visits: Mapping[str, Rounds]) -> dict[str, list[Summary]]:
    """One summary for each pass of each candidate, of all its visits."""
    return {
        name: [Summary.of(passes) for passes in zip(*(visit[name] for visit in visits), strict=True)]
        for name in visits[0]
    }


def _nothing() -> None:
    pass


def training_candidate(
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], tuple[Tensor | None, ...]],
    before: Callable[[], None] = _nothing,
) -> Candidate:
    """Times a forward, and a forward+backward, of one and the same step; ``before`` each step is not timed.

    The forward ends when y and its autograd graph exist. The step ends when y, the graph and the gradients are freed
    again: memory that is mapped and unmapped at every step is part of what a candidate costs.
    """

    def run(mark: Mark) -> None:
        before()
        mark()
        y = forward()
        mark()
        gradients = backward(y)
        del y, gradients
        mark()

    return run


def step_candidate(step: Callable[[], object]) -> Candidate:
    """Times the whole of a step."""

    def run(mark: Mark) -> None:
        mark()
        step()
        mark()

    return run


def copy_candidate(source: Tensor, buffers: int = 1) -> Candidate:
    """Times ``Tensor.copy_`` into a tensor that exists already; as many pairs of them as ``buffers`` take turns."""
    pairs = cycle([(source.clone() if index else source, torch.empty_like(source)) for index in range(buffers)])

    def run(mark: Mark) -> None:
        source, target = next(pairs)
        mark()
        target.copy_(source)
        mark()

    return run


def rotating_buffers(bytes_of_a_step: int, cache_bytes: int) -> int:
    """How many sets of buffers must take turns so that none is still in a cache when its turn comes again.

    At most :data:`MAX_BUFFERS`: what is as small as that stays in a cache in training too.
    """
    return min(MAX_BUFFERS, math.ceil(cache_bytes / bytes_of_a_step))
