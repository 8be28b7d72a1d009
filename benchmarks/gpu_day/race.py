"""One layer, run by each entrant in turn: verified, timed by calls and by the replay of a CUDA graph, and freed."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.gpu_day import journal
from benchmarks.gpu_day.facts import KERNELS
from benchmarks.gpu_day.risky import risky
from benchmarks.gpu_day.step_api import Setting, SkippedError
from benchmarks.layers.cases import Case, Inputs
from benchmarks.layers.peer import Peer
from benchmarks.layers.registry import PEERS, why_not
from benchmarks.layers.run import COPY, records_of
from benchmarks.layers.verify import MismatchError, check_by_tasks, outcome_of
from benchmarks.records.record import PASSES, USEFUL_TENSORS
from benchmarks.records.summary import Summary
from benchmarks.records.workloads import BATCH_NORM, LAYER_NORM
from benchmarks.timing import environment, replay
from benchmarks.timing.measure import (
    Effort,
    Mark,
    copy_candidate,
    measure,
    rotating_buffers,
    summarize,
    timer_for,
    training_candidate,
)
from tsbn_kernels import backends, use_backend

EFFORT, QUICK_EFFORT = Effort(3, 6, 0.2, 1e-3), Effort(2, 2, 0.0, 0.0)
REPLAY_SECONDS = 1e-3  # so long that the start of a graph does not count
HOST = 20  # how many times as long as the kernels a call may take
CACHED = 2  # times the rate of a copy, at which what a step must move may be moved
SOME_TASKS = 4  # of a peer are verified
RIVALS = {BATCH_NORM: ("loop", "cudnn", "folded"), LAYER_NORM: ("loop", "scaled")}  # those that copy the input last
SLACK = 4.0  # times the tolerances: a GPU's exponential and division have more rounding errors


class Entrant(NamedTuple):
    """A way to run a layer: ours by a backend, or a peer."""

    impl: str
    backend: str = ""

    @property
    def name(self) -> str:
        return self.backend or self.impl


def ours(device: torch.device) -> list[Entrant]:
    """The fused layer by each of our backends with kernels for the device."""
    usable = (b for b in backends.backends() if b.available and b.name in KERNELS and b.runs_on(device.type))
    return [Entrant("fused", backend.name) for backend in usable]


def peers(device: torch.device, norm: str = BATCH_NORM, names: Sequence[str] = ()) -> list[Entrant]:
    """The peers that run a norm on the device, or those that are named."""
    return [Entrant(name) for name in names or RIVALS[norm] if PEERS[norm][name].unavailable(device) is None]


def run(case: Case, entrants: Sequence[Entrant], setting: Setting, kind: str) -> None:
    """Lines of :data:`journal.FILE` for each entrant: two passes by each way of running, or why it was left out.

    Raises:
        AssertionError: one of ours is wrong, or failed.
        RuntimeError: the device is lost.
    """
    effort = QUICK_EFFORT if setting.quick else EFFORT
    inputs = case.inputs()
    buffers = 1 if setting.quick else rotating_buffers(2 * case.tensor_bytes, environment.cache_bytes(case.device))
    copy = _copy_time(inputs, buffers, effort, case.device)
    failures = []  # texts: the frames of an exception would hold tensors
    for entrant in entrants:
        where = {"layer": case.layer.name, "dtype": case.dtype, "memory_format": case.memory_format}
        where |= {"workload": case.workload, "entrant": entrant.name}
        try:
            with risky(entrant.name, setting.folder, case.device):
                try:
                    if why_not(entrant.impl, case) is None:
                        _enter(case, inputs, entrant, setting, kind, effort, buffers, copy)
                except torch.OutOfMemoryError:
                    journal.note(setting.folder, "left out", **where, why="out of memory")
                except Exception as error:
                    traceback.print_exc()
                    why = f"{type(error).__name__}: {error}"[:500]
                    journal.note(setting.folder, "left out", **where, why=why)
                    failures += [f"{entrant.name}: {why}"] * bool(entrant.backend)
        except SkippedError as error:
            journal.note(setting.folder, "left out", **where, why=str(error))
        free(case.device)
    assert not failures, "; ".join(failures)


def _enter(
    case: Case,
    inputs: Inputs,
    entrant: Entrant,
    setting: Setting,
    kind: str,
    effort: Effort,
    buffers: int,
    copy: Summary,
) -> None:
    """Ours is timed even where it is wrong, and marked: such a day has no second chance."""
    wrong = None
    with use_backend(entrant.backend) if entrant.backend else nullcontext():
        started = time.perf_counter()
        peer = PEERS[case.norm][entrant.impl](case, inputs)
        some = None if entrant.backend else range(0, case.tasks, -(-case.tasks // SOME_TASKS))
        errors = {}
        try:
            slack = 1.0 if case.device.type == "cpu" else SLACK
            errors = check_by_tasks(entrant.impl, case, inputs, outcome_of(peer), some, slack)
        except MismatchError as error:
            if not entrant.backend:
                raise
            wrong = error.with_traceback(None)
        verified = time.perf_counter()
        free(case.device)
        peer.rotate_over(buffers)
        for by, passes in _ways(peer, effort, buffers, copy, case.device):
            for record in records_of(case, {COPY: [copy], entrant.impl: passes}):
                values = record.as_json() | {"verified": wrong is None, "entrant": entrant.name, "by": by}
                times = {"verified_s": verified - started, "timed_s": time.perf_counter() - verified}
                journal.note(setting.folder, kind, **values, buffers=buffers, errors=errors, **times)
    if wrong is not None:
        raise wrong


def _ways(
    peer: Peer, effort: Effort, buffers: int, copy: Summary, device: torch.device
) -> Iterator[tuple[str, list[Summary]]]:
    """Times forward, and forward and backward: called by the host, and without it as far as that can be captured."""
    timer = timer_for(device)
    called = training_candidate(peer.forward, peer.backward, peer.next_buffers)
    eager = summarize(measure({"": called}, effort, timer))[""]
    yield "eager", eager
    if not can_capture(device):
        return

    def forward() -> None:
        peer.next_buffers()
        peer.forward()

    def both() -> None:
        peer.next_buffers()
        peer.backward(peer.forward())

    # A step moves at least the useful tensors, a copy two.
    moved = [USEFUL_TENSORS[pass_] / 2 * copy.median / CACHED for pass_ in PASSES]
    least = [max(seconds, called.median / HOST) for seconds, called in zip(moved, eager, strict=True)]
    try:
        steps = zip((forward, both), least, strict=True)
        graph = [replayed(step, effort, buffers, seconds, device) for step, seconds in steps]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise RuntimeError(f"its step is not captured in a CUDA graph: {error}") from error
    yield "graph", graph


def can_capture(device: torch.device) -> bool:
    """Whether there are graphs of the device."""
    return device.type == "cuda"


def replayed(step: Callable[[], None], effort: Effort, buffers: int, seconds: float, device: torch.device) -> Summary:
    """Times one step in a graph of many, as many as fill the time.

    A replay runs before each that is timed: meanwhile the host starts it, and clocks rise.

    Args:
        seconds: the least that a step may take.
    """
    times = buffers * math.ceil(REPLAY_SECONDS / (buffers * seconds))

    def steps() -> None:
        for _ in range(times):
            step()

    graph, _ = replay.captured(steps)

    def second(mark: Mark) -> None:
        graph.replay()
        mark()
        graph.replay()
        mark()

    visit = measure({"": second}, effort, timer_for(device))
    ((rounds,),) = visit.values()
    return Summary.of([[taken / times for taken in rounds]])


def _copy_time(inputs: Inputs, buffers: int, effort: Effort, device: torch.device) -> Summary:
    candidate = copy_candidate(inputs.x, buffers)
    found = summarize(measure({COPY: candidate}, effort, timer_for(device)))[COPY][0]
    if can_capture(device):
        found = replayed(partial(candidate, _nowhere), effort, buffers, found.median, device)
    del candidate
    free(device)
    return found


def _nowhere() -> None:
    """Notes no time."""


def free(device: torch.device) -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
